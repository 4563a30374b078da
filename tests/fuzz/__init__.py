"""Bytes of any kind for whatever reads what others wrote.

`targets.py` has a function for each reader. It takes bytes, and raises only for a defect. `make
fuzz` gives them what atheris makes up: it follows which lines are reached, and keeps what reached a
new one. `tests/unit/test_fuzz.py` gives them the seeds, a few changes of these, and what was found
once: `tests/corpus/fuzz/TARGET/`.
"""
