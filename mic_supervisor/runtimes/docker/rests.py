"""Whether what the engine lists as created or ended is at rest, and why it ended.

An engine lists a container as created, or exited, until its start has come to an end, and the start
goes on although whoever asked for it was killed (seen on Engine 20.10: with a port, the listener is
there long before the list says "running"). It holds the container's lock meanwhile, and an
inspection waits for that. So what rests by the list is inspected before it is believed, once. The
inspection also tells what the list does not: that it was killed for its memory, or could not be
started.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from mic_supervisor.errors import MicError, RuntimeUnavailable, WorkloadGone
from mic_supervisor.model import ObservedWorkload, RunState

PATIENCE = 1.0  # seconds that a look waits for all the inspections that it begins
_AT_REST = frozenset({RunState.CREATED, RunState.EXITED})

Inspect = Callable[[ObservedWorkload], ObservedWorkload]


class Rests:
    """Which containers are at rest when the list says so. Thread-safe.

    `inspect` looks at one more closely; it raises WorkloadGone, or another MicError.
    """

    def __init__(self, inspect: Inspect) -> None:
        self._inspect = inspect
        self._lock = threading.Lock()
        self._errors: dict[str, str | None] = {}  # by id, of what rests: what went wrong
        self._starting: set[str] = set()  # by id: we start it, and know how that ends
        self._asked: dict[str, _Inspection] = {}  # by id: what rests by the list, not told yet

    @contextmanager
    def starting(self, ref: str) -> Iterator[None]:
        """While we start it. How that ended is not believed, but looked at."""
        with self._lock:
            self._errors.pop(ref, None)
            self._asked.pop(ref, None)
            self._starting.add(ref)
        try:
            yield
        finally:
            with self._lock:
                self._starting.discard(ref)

    def sure(self, listed: Iterable[ObservedWorkload]) -> tuple[ObservedWorkload, ...]:
        """The workloads as they are; what cannot be told in time is in an unknown state."""
        listed = tuple(listed)
        end = time.monotonic() + PATIENCE
        for one in self._ask(listed):
            # One that was waited for before is not again: others would wait with it, look by look.
            one.done.wait(max(0.0, end - time.monotonic()))
        with self._lock:
            found = [self._judge(item) for item in listed]
        return tuple(item for item in found if item is not None)

    def _ask(self, listed: Iterable[ObservedWorkload]) -> list[_Inspection]:
        with self._lock:
            resting = {item.ref: item for item in listed if item.state in _AT_REST}
            self._errors = {ref: one for ref, one in self._errors.items() if ref in resting}
            self._asked = {ref: one for ref, one in self._asked.items() if ref in resting}
            unknown = resting.keys() - self._errors.keys() - self._starting - self._asked.keys()
            fresh = {ref: _Inspection(self._inspect, resting[ref]) for ref in unknown}
            self._asked |= fresh
            return [*fresh.values()]

    def _judge(self, item: ObservedWorkload) -> ObservedWorkload | None:
        asked = self._asked.get(item.ref)
        if asked is None:
            return replace(item, error=self._errors.get(item.ref) or item.error)
        if not asked.done.is_set():
            return replace(item, state=RunState.UNKNOWN, error="it is being started or removed")
        del self._asked[item.ref]
        if isinstance(asked.found, WorkloadGone):
            return None
        if isinstance(asked.found, MicError):
            return replace(item, state=RunState.UNKNOWN, error=asked.found.message)
        if asked.found.state not in _AT_REST:
            return asked.found
        if item.ref not in self._starting:
            self._errors[item.ref] = asked.found.error
        return replace(item, error=asked.found.error or item.error)


class _Inspection:
    """One inspection, in a thread that nobody waits for: it takes as long as a start may take."""

    def __init__(self, inspect: Inspect, item: ObservedWorkload) -> None:
        self.done = threading.Event()
        self.found: ObservedWorkload | MicError = RuntimeUnavailable("its inspection failed")
        self._inspect = inspect
        threading.Thread(target=self._run, args=(item,), name="docker-rest", daemon=True).start()

    def _run(self, item: ObservedWorkload) -> None:
        try:
            self.found = self._inspect(item)
        except MicError as error:
            self.found = error
        finally:
            self.done.set()
