"""Whether what the engine lists as created or ended is at rest.

An engine lists a container as created, or exited, until its start has come to an end, and the start
goes on although whoever asked for it was killed (seen on Engine 20.10: with a port, the listener is
there long before the list says "running"). It holds the container's lock meanwhile, and an
inspection waits for that. So what rests by the list is inspected before it is believed, once: from
then on nobody starts it but this program.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from mic_supervisor.errors import MicError, RuntimeUnavailable
from mic_supervisor.model import ObservedWorkload, RunState

PATIENCE = 1.0  # seconds that a look waits for all the inspections that it begins
_AT_REST = frozenset({RunState.CREATED, RunState.EXITED})

Look = Callable[[ObservedWorkload], ObservedWorkload | None]


class Rests:
    """Which containers are known to be at rest when the list says so. Thread-safe.

    `look` inspects one: None is that it is gone; raises MicError.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._known: set[str] = set()  # by id: the list is right about it
        self._starting: set[str] = set()  # by id: we start it, and know how that ends
        self._looks: dict[str, _Inspection] = {}  # by id: not answered yet

    @contextmanager
    def starting(self, ref: str) -> Iterator[None]:
        """While we start it. How that ended is not believed, but looked at."""
        with self._lock:
            self._known.discard(ref)
            self._starting.add(ref)
        try:
            yield
        finally:
            with self._lock:
                self._starting.discard(ref)

    def sure(self, listed: Iterable[ObservedWorkload]) -> tuple[ObservedWorkload, ...]:
        """The workloads as they are; what cannot be told in time is in an unknown state."""
        listed = tuple(listed)
        self._wait(self._ask(listed))
        found = (self._judge(item) for item in listed)
        return tuple(item for item in found if item is not None)

    def _wait(self, asked: Iterable[_Inspection]) -> None:
        """One that was waited for before is not again: others would wait with it, look by look."""
        end = time.monotonic() + PATIENCE
        for one in asked:
            one.done.wait(max(0.0, end - time.monotonic()))

    def _ask(self, listed: tuple[ObservedWorkload, ...]) -> list[_Inspection]:
        with self._lock:
            resting = {item.ref: item for item in listed if item.state in _AT_REST}
            there = {item.ref for item in listed}
            # What runs by the list has been started to the end, whoever asked for that.
            self._known = self._known & there | (there - resting.keys())
            self._looks = {ref: one for ref, one in self._looks.items() if ref in resting}
            unknown = resting.keys() - self._known - self._starting - self._looks.keys()
            fresh = {ref: _Inspection(self._look, resting[ref]) for ref in unknown}
            self._looks |= fresh
            return [*fresh.values()]

    def _judge(self, item: ObservedWorkload) -> ObservedWorkload | None:
        with self._lock:
            asked = self._looks.get(item.ref)
            if asked is None:
                return item
            if not asked.done.is_set():
                return replace(item, state=RunState.UNKNOWN, error="it is being started or removed")
            del self._looks[item.ref]
            if asked.error is not None:
                return replace(item, state=RunState.UNKNOWN, error=asked.error.message)
            if asked.found is not None and asked.found.state in _AT_REST:
                if item.ref not in self._starting:
                    self._known.add(item.ref)
                return item
            return asked.found


class _Inspection:
    """One inspection, in a thread that nobody waits for: it takes as long as a start may take."""

    def __init__(self, look: Look, item: ObservedWorkload) -> None:
        self.done = threading.Event()
        self.found: ObservedWorkload | None = None
        self.error: MicError | None = RuntimeUnavailable("its inspection failed")
        self._look = look
        threading.Thread(target=self._run, args=(item,), name="docker-rest", daemon=True).start()

    def _run(self, item: ObservedWorkload) -> None:
        try:
            self.found, self.error = self._look(item), None
        except MicError as error:
            self.error = error
        finally:
            self.done.set()
