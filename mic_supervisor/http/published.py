"""What the daemon publishes after every round, and all that HTTP may look at."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mic_supervisor.converge.events import Event
from mic_supervisor.converge.snapshot import ConfigState, Snapshot
from mic_supervisor.gpu.events import XidRecord
from mic_supervisor.model import GpuInventory
from mic_supervisor.views.status import StatusDocument, status_document

RELEASE_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Durations:
    """How often something took how long, in seconds.

    `counts[i]` are those of at most `bounds[i]` that no smaller bound holds; the last count is of
    those above every bound.
    """

    bounds: tuple[float, ...] = RELEASE_BOUNDS
    counts: tuple[int, ...] = (0,) * (len(RELEASE_BOUNDS) + 1)
    total: float = 0.0

    def with_one(self, seconds: float) -> Durations:
        place = bisect_left(self.bounds, seconds)
        counts = (*self.counts[:place], self.counts[place] + 1, *self.counts[place + 1 :])
        return replace(self, counts=counts, total=self.total + seconds)


@dataclass(frozen=True, slots=True)
class LoopState:
    """How the loop itself is. Durations in seconds, times since the epoch.

    `errors` counts changes that failed. `releases` are the waits for the memory of a GPU after its
    holder was stopped.
    """

    rounds: int = 0
    errors: int = 0
    last_duration: float | None = None
    last_success_at: float | None = None
    started_at: float = 0.0
    releases: Durations = Durations()


@dataclass(frozen=True, slots=True)
class Published:
    """One consistent view. `snapshot` is None until the first round is done.

    `history` is the newest first. `xids` counts since the daemon started. `down` names the parts of
    the daemon that are not alive, and says why.
    All times are the wall clock's as it is set now; less `offset` they are steady.
    """

    host: str
    version: str
    config: ConfigState
    loop: LoopState
    snapshot: Snapshot | None = None
    offset: float = 0.0
    history: tuple[Event, ...] = ()
    xids: tuple[XidRecord, ...] = ()
    down: Mapping[str, str] = field(default_factory=dict)


def status_of(published: Published) -> StatusDocument | None:
    """The document of `status --json`; None until the first round is done."""
    if published.snapshot is None:
        return None
    return status_document(published.snapshot, published.config.in_use, published.host)


# --- what the page's sparklines show ------------------------------------------------------------

KEPT = 90
SPACING = 9.0  # seconds between two samples at least: 90 of them are a quarter of an hour or more


@dataclass(frozen=True, slots=True)
class Sample:
    """`memory` is a ratio, `power` is in watts; None was unknown then."""

    at: float  # steady
    memory: float | None
    power: float | None


class Samples:
    """The last samples of each GPU that is there now. A GPU that was away leaves a gap."""

    def __init__(self) -> None:
        self._of: dict[str, deque[Sample]] = {}
        self._last = float("-inf")

    def add(self, at: float, inventory: GpuInventory) -> None:
        if at - self._last < SPACING:
            return
        self._last = at
        found = {gpu.uuid: gpu for gpu in inventory.gpus}
        for uuid in found:
            self._of.setdefault(uuid, deque(maxlen=KEPT))
        for uuid, ring in [*self._of.items()]:
            gpu = found.get(uuid)
            memory = gpu.memory if gpu is not None else None
            used = None
            if memory is not None and memory.used is not None and memory.total:
                used = memory.used / memory.total
            ring.append(Sample(at, used, gpu.power_draw if gpu is not None else None))
            if all(sample.memory is None and sample.power is None for sample in ring):
                del self._of[uuid]

    def of(self, uuid: str) -> tuple[Sample, ...]:
        """Oldest first; empty for a GPU that nothing was measured of."""
        return tuple(self._of.get(uuid, ()))
