"""Measurements, not tests: `make bench` runs each, and each prints a table."""
