"""Transient services of systemd. `runtime.SystemdRuntime` is what the rest uses."""
