"""The supervisor: the loop, and everything that wakes, asks or watches it."""
