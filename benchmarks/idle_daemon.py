"""What the daemon costs while there is nothing to do: processor, memory and threads.

8 small HTTP servers on simulated GPUs, each asked every 5 s, as is the default: host processes, and
containers.

    python -m benchmarks.idle_daemon [SECONDS]
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import NamedTuple

import psutil

from benchmarks._common import Target, judge, machine, table
from mic_supervisor.demo import server
from tests.integration.job_world import World, web
from tests.support.waiting import until

COUNT = 8
_WARM_UP = 15.0  # seconds, until what a start leaves to be done is done


class Used(NamedTuple):
    """Percent of a core, MiB that are resident, and threads."""

    processor: float
    memory: float
    threads: float


TARGET = Used(0.4, 60, 8)


def process() -> str:
    command = json.dumps([sys.executable, server.__file__, "--port", "${port}"])
    return f"{{backend: process, command: {command}, probe: {{http: /health}}}}"


def measure(job: World, model: str, seconds: float) -> Used:
    job.write({f"0-{COUNT - 1}": "a"}, a=model)
    daemon = psutil.Process(job.mic.run().pid)
    until(lambda: job.mic("status").rc == 0, "all to be ready", timeout=120, period=2.0)
    time.sleep(_WARM_UP)
    before, began = daemon.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after, took = daemon.cpu_times(), time.monotonic() - began
    spent = after.user + after.system - before.user - before.system
    return Used(100 * spent / took, daemon.memory_info().rss / 2**20, daemon.num_threads())


def main(seconds: float) -> None:
    found: dict[str, Used] = {}
    for name, model in {"host processes": process(), "containers": web()}.items():
        with machine("mic-test/busybox:1", gpus=COUNT) as job:
            found[f"{COUNT} {name}"] = measure(job, model, seconds)
    table(
        f"An idle daemon, servers asked every 5 s, {seconds:g} s each, {os.cpu_count()} cores",
        ("", "of a core", "memory", "threads"),
        [
            (name, f"{used.processor:.2f} %", f"{used.memory:.0f} MiB", f"{used.threads:.0f}")
            for name, used in [*found.items(), ("target, at most", TARGET)]
        ],
    )
    judge(
        *(
            Target(f"{name}: {what}", value, most, unit)
            for name, used in found.items()
            for what, value, most, unit in zip(
                ("of a core", "memory", "threads"), used, TARGET, (" %", " MiB", ""), strict=True
            )
        )
    )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
