"""What goes next, with whom, and where: pure functions of values and a clock."""
