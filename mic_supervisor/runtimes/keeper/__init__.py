"""Host processes where systemd is not PID 1: one keeper beside each, and records on disk."""
