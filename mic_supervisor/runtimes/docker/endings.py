"""Which containers have ended although the engine still lists them as running.

An engine tells of a death before it cleans up, and lists the container as running until it is done
with that, about 0.1 s later, of which it tells nobody (seen on Engine 20.10). It holds the
container's lock meanwhile: an inspection waits for it, and so does a start. So a start that is
asked for at once happens as soon as it can.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from mic_supervisor.model import ObservedWorkload, RunState


class Endings:
    """What the engine's events say that its list does not say yet. Thread-safe.

    `settle` returns once the engine has written down that a container ended. A death may be read
    late, when the container runs again: of one that we started since, and whose start was not
    read yet, it is of the run before, and only waited for.
    """

    def __init__(self, settle: Callable[[str], None]) -> None:
        self._settle = settle
        self._lock = threading.Lock()
        self._ended: dict[str, int | None] = {}  # id -> exit code
        self._starting: set[str] = set()

    def starting(self, ref: str) -> None:
        """We are about to start it."""
        with self._lock:
            self._starting.add(ref)

    def runs(self, ref: str) -> None:
        """Our start succeeded: it is listed as running, and rightly."""
        with self._lock:
            self._ended.pop(ref, None)

    def refused(self, ref: str) -> None:
        """Our start did not succeed, so that nothing will be read of it."""
        with self._lock:
            self._starting.discard(ref)

    def started(self, ref: str) -> None:
        """An event says that it was started."""
        with self._lock:
            self._starting.discard(ref)
            self._ended.pop(ref, None)

    def ended(self, ref: str, code: int | None) -> None:
        """An event says that it ended."""
        with self._lock:
            late = ref in self._starting
            if not late:
                self._ended[ref] = code
        if late:
            self._settle(ref)
        else:
            threading.Thread(
                target=self._wait, args=(ref,), name="docker-ending", daemon=True
            ).start()

    def now(self) -> dict[str, int | None]:
        """To be asked before the engine's list is: what settles meanwhile may be old in it."""
        with self._lock:
            return dict(self._ended)

    def _wait(self, ref: str) -> None:
        try:
            self._settle(ref)
        finally:
            with self._lock:
                self._ended.pop(ref, None)


def as_ended(
    workloads: Iterable[ObservedWorkload], endings: dict[str, int | None]
) -> tuple[ObservedWorkload, ...]:
    """The workloads, those that have ended as such."""
    return tuple(
        replace(
            item, state=RunState.EXITED, exit_code=endings[item.ref], address=None, closing=True
        )
        if item.ref in endings and item.state is RunState.RUNNING
        else item
        for item in workloads
    )
