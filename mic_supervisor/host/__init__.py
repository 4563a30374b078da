"""This machine: its processes, who it is, the lock of a scope, and helpers run to their end."""
