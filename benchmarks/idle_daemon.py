"""What the daemon costs while there is nothing to do: processor, memory and threads.

8 small HTTP servers as host processes on simulated GPUs, each asked every 5 s, as is the default.
The machine needs nothing for it: neither Docker nor a GPU nor root.

    python -m benchmarks.idle_daemon [SECONDS]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks._common import table
from tests.support import scopes
from tests.support.mic import Mic
from tests.support.ports import PortBlock
from tests.support.waiting import until

COUNT = 8
TARGETS = {"processor": 0.4, "memory": 60.0, "threads": 8.0}
_SETTLE = 15.0  # seconds, until what a start leaves to be done is done
_SERVER = Path(__file__).parents[1] / "tests/support/server/server.py"


class Used(NamedTuple):
    """Seconds of processor time so far, MiB that are resident, and threads."""

    seconds: float
    memory: float
    threads: int


def used(process: psutil.Process) -> Used:
    with process.oneshot():
        times = process.cpu_times()
        memory = process.memory_info().rss / (1 << 20)
        return Used(times.user + times.system, memory, process.num_threads())


@contextmanager
def idle_daemon(home: Path) -> Iterator[psutil.Process]:
    """A daemon whose instances are all ready."""
    scope, ports = scopes.new_scope(), PortBlock()
    mic = Mic(home / "mic", scope, ports, gpus=COUNT, env={"MIC_DOCKER_HOST": "none"})
    command = json.dumps([sys.executable, str(_SERVER), "--port", "${port}"])
    mic.write(f"""\
        version: 1
        models:
          a: {{backend: process, command: {command}, probe: {{http: /health}}}}
        gpus: {{0-{COUNT - 1}: a}}
        """)
    try:
        daemon = mic.run()
        until(lambda: mic("status").rc == 0, "all to be ready", timeout=120, period=2.0)
        yield psutil.Process(daemon.pid)
    finally:
        mic.close()
        scopes.end_processes(scope)
        ports.close()


def main(seconds: float) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mic-bench-") as home,
        idle_daemon(Path(home)) as daemon,
    ):
        time.sleep(_SETTLE)
        before, began = used(daemon), time.monotonic()
        time.sleep(seconds)
        after, took = used(daemon), time.monotonic() - began
    found = {
        "processor": (after.seconds - before.seconds) / took * 100,
        "memory": after.memory,
        "threads": float(after.threads),
    }
    units = {"processor": "% of a core", "memory": "MiB", "threads": ""}
    table(
        f"An idle daemon, {COUNT} servers asked every 5 s, {took:.0f} s, {os.cpu_count()} cores",
        ("", "found", "target", ""),
        [
            (
                name,
                f"{value:.2f}" if name == "processor" else f"{value:.0f}",
                f"{TARGETS[name]:g}",
                f"{units[name]} {'met' if value <= TARGETS[name] else 'missed'}".strip(),
            )
            for name, value in found.items()
        ],
    )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
