"""mic-supervisor: keeps one model per GPU running, as one YAML file says."""

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here
