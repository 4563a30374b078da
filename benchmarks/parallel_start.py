"""How much longer many instances take to get ready than one.

8 servers whose start takes 3 s, and 4 real Triton servers whose model initialises for 2 s.

    python -m benchmarks.parallel_start [TRIES]
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks._common import machine, median, table
from tests.integration.job_world import World, server


def main(tries: int) -> None:
    with machine("mic-test/server:1", "mic-test/triton:1", gpus=8) as job:
        job.repository.model("MAM", initialise_seconds=2)
        rows = [
            _measure(job, tries, "server, 3 s to start", server(START_DELAY=3), 8),
            _measure(job, tries, "Triton, 2 s to initialise", "{backend: triton}", 4),
        ]
    table(
        f"From nothing to ready, {tries} tries each, {os.cpu_count()} cores",
        ("", "one", "many", "ratio", "one by one"),
        rows,
    )


def _measure(job: World, tries: int, name: str, model: str, count: int) -> tuple[str, ...]:
    taken: dict[int, list[float]] = {1: [], count: []}
    for _ in range(tries):
        for number, values in taken.items():
            job.write(dict.fromkeys(range(number), "MAM"), MAM=model)
            begun = time.perf_counter()
            job.apply()
            values.append(time.perf_counter() - begun)
            job.mic("down", "--yes", rc=0)
    one, many = median(taken[1]), median(taken[count])
    return (
        f"{count} x {name}",
        f"{one:.1f} s",
        f"{many:.1f} s",
        f"{many / one:.2f}",
        f"{one * count:.1f} s",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
