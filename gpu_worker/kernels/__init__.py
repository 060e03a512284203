"""Kernels of our own for the CPU: C++ in `src`, called through ctypes (`library`).

They compute on float32 activations; weights and KV-cache pages may be narrower. Without the
library (another processor, no compiler at installation) the engine uses torch's operations.
"""
