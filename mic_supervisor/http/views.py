"""What is served, made once per round however many ask."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mic_supervisor.converge.observe import SOURCE_TIMEOUT
from mic_supervisor.http.documents import Published
from mic_supervisor.http.verdict import overall_verdict
from mic_supervisor.model import GpuInventory

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """A body that is ready to be sent. `etag` is weak: it leaves out the time of the look."""

    body: bytes
    media: str
    etag: str
    modified: float  # since the epoch: since when a request would have been answered alike


def stall_limit(resync: float) -> float:
    """Seconds without a round after which the loop counts as stalled.

    A round that nothing wakes comes every `resync` seconds, and may wait for a late source twice.
    """
    return 3 * resync + 2 * SOURCE_TIMEOUT


class Views:
    """The last published view and what was made of it. Belongs to one thread.

    The age of a view is measured from when it was first seen here, on the monotonic clock: a wall
    clock that is set, or a machine that slept, stalls nothing.
    """

    def __init__(
        self,
        latest: Callable[[], Published],
        *,
        stall_after: float,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.samples = Samples()
        self._firsts: dict[tuple[int, str], float] = {}  # steady
        self._latest = latest
        self._clock = clock
        self._wall = wall
        self._stall_after = stall_after
        self._last: Published | None = None
        self._seen_at = clock()
        self._made: dict[str, Answer] = {}
        self._before: dict[str, Answer] = {}

    def current(self) -> Published:
        published = self._latest()
        if published is not self._last:
            # A rejected file is published between two rounds, and makes the last one no younger.
            if self._last is None or published.snapshot is not self._last.snapshot:
                self._seen_at = self._clock()
            self._last = published
            self._before |= self._made
            self._made = {}
            self._note(published)
        return published

    def _note(self, published: Published) -> None:
        """Remember what a single view does not tell: what was measured, and what began when."""
        if published.snapshot is not None:
            self.samples.add(published.snapshot.now, published.snapshot.observed.inventory)
        at = published.snapshot.at if published.snapshot is not None else self._wall()
        keys = [problem.key for problem in overall_verdict(published, None).problems]
        self._firsts = {key: self._firsts.get(key, at - published.offset) for key in keys}

    @property
    def firsts(self) -> dict[tuple[int, str], float]:
        """Since when each problem that does not tell itself has been seen."""
        offset = self.current().offset
        return {key: at + offset for key, at in self._firsts.items()}

    def age(self) -> float:
        """Seconds since the last round, or since the start while there was none."""
        self.current()
        return self._clock() - self._seen_at

    def now(self) -> float:
        """The time on the loop's own clock."""
        published = self.current()
        if published.snapshot is None:
            return self._wall()
        return published.snapshot.at + self.age()

    def stalled(self) -> str | None:
        """Why the loop does not count as alive."""
        age = self.age()
        if age > self._stall_after:
            return f"the loop has not finished a round for {age:.0f} s"
        if self.current().snapshot is None:
            return "the first round is not done yet"
        return None

    def down(self) -> str | None:
        """Which parts of the daemon are not alive. Everybody may ask that, so not why."""
        return "; ".join(f"{part} is not alive" for part in self.current().down) or None

    def json(self, name: str, make: Callable[[Published], Any]) -> Answer:
        """The document called `name`."""

        def both(published: Published) -> tuple[bytes, bytes]:
            document = make(published)
            body = encode(document)
            if isinstance(document, dict) and "at" in document:
                return body, encode({**document, "at": None})
            return body, body

        return self.answer(name, JSON, both)

    def answer(
        self, name: str, media: str, make: Callable[[Published], tuple[bytes, bytes]]
    ) -> Answer:
        """What `make` gives: the body, and the part of it that makes a difference to a client."""
        published = self.current()
        made = self._made.get(name)
        if made is None:
            body, meant = make(published)
            etag = _etag(meant)
            before = self._before.get(name)
            alike = before is not None and before.etag == etag
            modified = before.modified if before is not None and alike else self._wall()
            made = self._made[name] = Answer(body, media, etag, modified)
        return made

    def once(self, document: Any) -> Answer:
        """A document that depends on the request, and so is not kept."""
        body = encode(document)
        return Answer(body, JSON, _etag(body), self._wall())


def _etag(meant: bytes) -> str:
    return f'W/"{hashlib.sha256(meant).hexdigest()[:24]}"'


def encode(document: Any) -> bytes:
    """As JSON. A name that is no UTF-8 must not keep the rest from being served."""
    text = json.dumps(document, default=asdict, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


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
