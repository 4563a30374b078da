"""How long the tour of `mic-supervisor demo --once` takes.

python -m benchmarks.demo_tour [TRIES]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._common import Target, alternating, installed, judge, median, times
from tests.support.mic import PROGRAM

TARGET = 20.0  # seconds


def main(tries: int) -> None:
    with tempfile.TemporaryDirectory(prefix="mic-bench-") as home:
        environment = installed({"PATH": "/usr/bin:/bin"}, Path(home) / "bytecode")

        def tour() -> None:
            command = [PROGRAM, "demo", "--once"]
            subprocess.run(command, env=environment, check=True, capture_output=True)

        taken = alternating(tries, {"mic-supervisor demo --once": tour})
    took = median(taken["mic-supervisor demo --once"])
    times(f"The tour, {tries} tries", taken, took, "ratio")
    judge(Target("the tour", took, TARGET, " s"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
