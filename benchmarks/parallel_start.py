"""How much longer many instances take to get ready than one.

8 servers whose start takes 3 s, and 4 real Triton servers whose model initialises for 2 s.

    python -m benchmarks.parallel_start [TRIES]
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks._common import Target, judge, machine, median, table
from tests.integration.job_world import World, server

EIGHT = 6.0  # seconds for 8 servers that take 3 s each
FOUR = 2.0  # times what one Triton takes, for 4 of them


def main(tries: int) -> None:
    with machine("mic-test/server:1", "mic-test/triton:1", gpus=8) as job:
        job.repository.model("MAM", initialise_seconds=2)
        servers = _measure(job, tries, server(START_DELAY=3), 8)
        tritons = _measure(job, tries, "{backend: triton}", 4)
    table(
        f"From nothing to ready, {tries} tries each, {os.cpu_count()} cores",
        ("", "one", "many", "ratio", "one by one"),
        [
            _row("8 x server, 3 s to start", 8, *servers),
            _row("4 x Triton, 2 s to initialise", 4, *tritons),
        ],
    )
    judge(
        Target("8 servers", servers[1], EIGHT, " s"),
        Target("4 Tritons, of the time of one", tritons[1] / tritons[0], FOUR),
    )


def _measure(job: World, tries: int, model: str, count: int) -> tuple[float, float]:
    """Seconds for one, and for `count` of them."""
    taken: dict[int, list[float]] = {1: [], count: []}
    for _ in range(tries):
        for number, values in taken.items():
            job.write(dict.fromkeys(range(number), "MAM"), MAM=model)
            begun = time.perf_counter()
            job.apply()
            values.append(time.perf_counter() - begun)
            assert len(job.runs()) == number
            job.mic("down", "--yes", rc=0)
    return median(taken[1]), median(taken[count])


def _row(name: str, count: int, one: float, many: float) -> tuple[str, ...]:
    return name, f"{one:.1f} s", f"{many:.1f} s", f"{many / one:.2f}", f"{one * count:.1f} s"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
