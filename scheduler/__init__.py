"""The scheduler: takes requests from the intake, forms batches, routes them to worker groups.

`scheduler.policy` decides and knows no I/O; the modules beside it read, write and wait.
"""
