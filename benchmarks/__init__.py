"""Measurements, not tests: `make bench` runs them, `python -m benchmarks --help` tells its options.

| File | What it has |
|---|---|
| `__main__.py` | the table of measurements; a run |
| `sheets.py` | what a measurement gives, and its text: tables with ratios, targets; pure |
| `contenders.py` | who is measured: the same jobs as the file of each, and the commands of each |
| `changes.py` | no change, one change, a dry run, a status; beside 500 unrelated containers |
| `killed.py` | until something that was killed runs, and answers |
| `starts.py` | until many that start slowly answer |
| `idle.py` | what a daemon costs that has nothing to do, and a scrape of it |
| `growth.py`, `slow_clients.py`, `demo_tour.py` | ours alone |

Each judges its targets, and a run that misses one exits with 1. Figures are meant for a machine
that does nothing else; with `--write` they go to docs/benchmarks.md.
"""
