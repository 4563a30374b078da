"""Sees from outside which processes hold which GPU: in /proc, not by what an engine lists."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.integration.daemon_world import start_time

Run = tuple[int, int]
"""PID, and the kernel's start time of it."""


class Eye:
    """Looks every 50 ms, for as long as it is entered, at every process of some scope.

    A model has to say what it holds in its environment: `HOLDS: "${gpu_uuids}"`. Of a tree of
    processes the first counts. `doubled` is what two looks in a row found held twice.
    """

    PAUSE = 0.05

    def __init__(self, marker: str) -> None:
        """`marker` stands in the environment of all that counts: `SCOPE=test-1`."""
        self.looks = 0
        self.runs: set[Run] = set()
        self.doubled: list[str] = []
        self._marker = marker.encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Eye:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self.PAUSE):
            first = self.holders()
            self.looks += 1
            self.runs |= {run for runs in first.values() for run in runs}
            if all(len(runs) == 1 for runs in first.values()):
                continue
            # One that was ending while it was looked at is gone from the second look.
            second = self.holders()
            for gpu, runs in first.items():
                both = runs & second.get(gpu, set())
                if len(both) > 1:
                    self.doubled.append(f"{gpu}: {sorted(both)}")

    def holders(self) -> dict[str, set[Run]]:
        """By GPU, the runs that hold it."""
        held: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            try:
                environ = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            except OSError:
                continue  # it has ended
            lines = environ.split(b"\0")
            if self._marker in lines:
                values = dict(line.split(b"=", 1) for line in lines if b"=" in line)
                held[int(entry.name)] = values[b"HOLDS"].decode()
        found: dict[str, set[Run]] = {}
        for pid, gpus in held.items():
            born = start_time(pid)
            if born is not None and _parent(pid) not in held:
                for gpu in gpus.split(","):
                    found.setdefault(gpu, set()).add((pid, born))
        return found


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return None
