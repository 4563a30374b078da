"""Sees from outside who has which GPU of each host, and whether somebody claims it.

A process is of the host in whose network namespace it is: models and holders have no other one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.watch import Watch

MODEL = "/opt/chat/serve"  # its GPUs stand in OWNED: a simulated GPU is in no CUDA variable


class Model(NamedTuple):
    """A process on a GPU, and the instance that it is of."""

    gpu: str
    pid: int
    instance: str


class Seen(NamedTuple):
    """What is in one network namespace: `ready` are the instances that holders say are ready."""

    models: tuple[Model, ...] = ()
    holders: tuple[int, ...] = ()
    ready: frozenset[str] = frozenset()

    @property
    def doubled(self) -> list[str]:
        """The GPUs that more than one process has."""
        return [gpu for gpu, count in Counter(one.gpu for one in self.models).items() if count > 1]

    @property
    def unclaimed(self) -> set[int]:
        """The processes that no holder names, where they are more than the other holders."""
        free = {one.pid for one in self.models if one.instance not in self.ready}
        return free if len(free) > len(self.holders) - len(self.ready) else set()


def network_of(pid: int | str) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def _processes() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                yield int(entry.name), words


def _models(pid: int) -> tuple[Model, ...]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    environment = dict(one.partition("=")[::2] for one in entries)
    gpus = environment.get("OWNED", "").split(",")
    return tuple(Model(gpu, pid, environment.get("INSTANCE", "")) for gpu in gpus if gpu)


def _ready(holder: int) -> Iterator[str]:
    """What its ready file names, as `claim` writes it where no path is given."""
    for path in Path(f"/proc/{holder}/root/tmp/mic-claims-0").glob("*.json"):
        with suppress(OSError):  # it is gone since
            yield json.loads(path.read_text())["instance"]


def look() -> dict[str, Seen]:
    """By network namespace. A process that is started or ends meanwhile may be missing."""
    found: dict[str, Seen] = {}
    for pid, words in _processes():
        holds = "claim" in words and any(one.endswith("/mic-supervisor") for one in words)
        if MODEL not in words[:3] and (not holds or "--check" in words):
            continue
        with suppress(OSError):
            network = network_of(pid)
            seen = found.get(network, Seen())
            if holds:
                ready = seen.ready.union(_ready(pid))
                seen = seen._replace(holders=(*seen.holders, pid), ready=ready)
            else:
                seen = seen._replace(models=seen.models + _models(pid))
            found[network] = seen
    return found


class Watcher(Watch):
    """Sees every host. `excuse` begins the times of one anew: what was unclaimed there gets another
    grace, since its supervisor is another one.
    """

    PAUSE = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0.0  # seconds in which a process was unclaimed
        self._since: dict[int, float] = {}
        self._excused: set[str] = set()

    def excuse(self, network: str) -> None:
        self._excused.add(network)

    def _look(self) -> list[str]:
        found = look()
        again = look() if any(seen.doubled for seen in found.values()) else {}
        now = time.monotonic()
        since: dict[int, float] = {}
        while self._excused:
            network = self._excused.pop()
            for pid in found.get(network, Seen()).unclaimed:
                self._since.pop(pid, None)
        for pid in (pid for seen in found.values() for pid in seen.unclaimed):
            since[pid] = self._since.get(pid, now)
            self.longest = max(self.longest, now - since[pid])
        self._since = since
        return [f"{gpu}: {seen.models}" for seen in again.values() for gpu in seen.doubled]
