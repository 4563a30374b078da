"""Calls that may never return, kept from taking their callers with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class DidNotReturn(Exception):
    """The call, or one before it, still runs. `timeout` is what it was given, in seconds."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.timeout = timeout


class Contained:
    """Runs one call at a time, each on a thread of its own, and waits no longer than asked.

    A call that outlives its time is left running, since a thread inside a C library cannot be
    ended. Until it returns every further call fails at once; its own result is dropped, being
    old by then. The threads are daemons: they do not keep the interpreter from exiting.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = threading.Lock()
        self._thread: threading.Thread | None = None
        self._timeout = 0.0

    def call(self, function: Callable[[], T], timeout: float) -> T:
        """What `function` returns or raises.

        Raises DidNotReturn after `timeout` seconds, the wait for other callers included, and
        RuntimeError if no thread can be started.
        """
        deadline = time.monotonic() + timeout
        if not self._turn.acquire(timeout=timeout):
            raise DidNotReturn(self._timeout)
        try:
            if self._thread is not None and self._thread.is_alive():
                raise DidNotReturn(self._timeout)
            results: list[T] = []
            errors: list[BaseException] = []

            def run() -> None:
                try:
                    results.append(function())
                # Whatever it is belongs to the caller, who gets it below.
                except BaseException as error:  # noqa: BLE001
                    errors.append(error)

            self._timeout = timeout
            thread = threading.Thread(target=run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise DidNotReturn(self._timeout)
            self._thread = None
        finally:
            self._turn.release()
        if errors:
            raise errors[0]
        return results[0]
