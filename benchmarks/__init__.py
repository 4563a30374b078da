"""Measurements, not tests: `make bench` runs each.

Each prints a table and which of its targets were met, and exits with 1 where one was missed. The
targets are meant for a machine that does nothing else.
"""
