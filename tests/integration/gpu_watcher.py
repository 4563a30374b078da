"""Sees from outside which runs hold which GPU, again and again while a test does something."""

from __future__ import annotations

from pathlib import Path

from tests.integration.daemon_world import DaemonWorld, start_time
from tests.support.watch import Watch

Run = tuple[int, int]
"""PID, and the kernel's start time of it."""


class Watcher(Watch):
    """Sees what a world says that runs: no instance twice, and no GPU of two."""

    def __init__(self, world: DaemonWorld) -> None:
        super().__init__()
        self._world = world

    def _look(self) -> list[str]:
        if self._twice() is None:
            return []
        again = self._twice()
        return [again] if again is not None else []

    def _twice(self) -> str | None:
        try:
            self._world.marks()
        except AssertionError as error:
            return str(error)
        return None


class GpuWatcher(Watch):
    """Sees every process of some scope.

    A model has to say what it holds in its environment: `HOLDS: "${gpu_uuids}"`. Of a tree of
    processes the first counts.
    """

    def __init__(self, marker: str) -> None:
        """`marker` stands in the environment of all that counts: `SCOPE=test-1`."""
        super().__init__()
        self.runs: set[Run] = set()
        self._marker = marker.encode()

    def _look(self) -> list[str]:
        first = self.holders()
        self.runs |= {run for runs in first.values() for run in runs}
        if all(len(runs) == 1 for runs in first.values()):
            return []
        second = self.holders()
        both = {gpu: runs & second.get(gpu, set()) for gpu, runs in first.items()}
        return [f"{gpu}: {sorted(runs)}" for gpu, runs in both.items() if len(runs) > 1]

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
