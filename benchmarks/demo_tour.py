"""How long the tour of `mic-supervisor demo --once` takes."""

from __future__ import annotations

import subprocess

from benchmarks._common import Options, seconds
from benchmarks.sheets import Cell, Outcome, Row, Sheet, Target
from tests.support.mic import PROGRAM

MOST = 20.0  # seconds


def tour() -> None:
    command = [str(PROGRAM), "demo", "--once"]
    subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, check=True, capture_output=True)


def measure(options: Options) -> Outcome:
    cell = Cell(tuple(seconds(tour) for _ in range(max(1, options.tries // 3))), "s")
    rows = (Row("mic-supervisor demo --once", (cell,)),)
    return Outcome(
        [Sheet("demo", "The tour", ("all of it",), rows, compares=False)],
        [Target("demo", "the tour", cell.median, MOST, " s")],
    )
