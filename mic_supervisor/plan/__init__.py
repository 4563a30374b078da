"""Decisions. Nothing in here reads a clock, a file or a socket, logs, or draws a random number."""
