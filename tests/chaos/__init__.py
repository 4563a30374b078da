"""Everything that goes wrong, mixed by a seed, against a daemon on the real engine.

    python -m tests.chaos [--seconds 1800] [--seed N]

A run is a row of storms. Each is a few disturbances one after the other; then all of them are
undone, and what runs has to be what the file says: see `judge.py` for what is held against it.

| File | What it has |
|---|---|
| `script.py` | which disturbances come, in which order: of the seed alone |
| `machine.py` | the machine that is disturbed, and how |
| `judge.py` | what must hold once it is quiet |
| `play.py` | one storm after another, until the time is up |
"""
