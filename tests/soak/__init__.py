"""A crash every few seconds, for an hour: does anything grow?

    python -m tests.soak [--seconds 3600] [--every 3] [--write]

| File | What it has |
|---|---|
| `measure.py` | what is looked at, and when it counts as growing; pure but for the looks |
| `__main__.py` | the daemon, the crashes, the figures and the plot |
"""
