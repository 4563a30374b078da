"""Containers of a Docker Engine. `runtime.DockerRuntime` is what the rest uses."""
