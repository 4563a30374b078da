"""Tasks and threads that are ended, and that may not end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_LOGGER = logging.getLogger("mic")
_AGAIN = 0.5  # seconds until a task that did not end is cancelled once more


async def blocking(pool: Executor, work: Callable[..., T], *args: Any) -> T:
    """What a call that blocks gives, in a thread of `pool`."""
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


async def end(tasks: Iterable[asyncio.Task[Any]], timeout: float = 2.0) -> None:
    """Cancel them, and wait until they have ended, `timeout` seconds at most.

    A cancellation can get lost on its way, in a library or in asyncio.wait_for of Python 3.11, so
    it is sent again. A task that stays is named in the log and left.
    """
    loop = asyncio.get_running_loop()
    left, over = set(tasks), loop.time() + timeout
    while left and loop.time() < over:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=min(_AGAIN, timeout))
        for task in done:
            log_exception(task)
    for task in left:
        _LOGGER.error("%s does not end; it is left behind", task.get_name())


def log_exception(task: asyncio.Task[Any]) -> None:
    """Write down what a task died of, as a callback of it, too. Being cancelled is no death."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOGGER.error("%s has died", task.get_name(), exc_info=error)


class Threads(Executor):
    """A thread for each call, and `most` of them at a time; further calls wait for their turn.

    A pool would keep as many threads as were ever needed at once, with the memory that is theirs,
    and the daemon needs many only while everything starts.
    """

    def __init__(self, most: int, name: str) -> None:
        self._free = most
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        call = partial(_complete, future, partial(work, *args, **kwargs))
        with self._lock:
            if self._free == 0:
                self._waiting.append(call)
            else:
                threading.Thread(
                    target=self._run, args=(call,), name=self._name, daemon=True
                ).start()
                self._free -= 1
        return future

    def _run(self, call: Callable[[], None] | None) -> None:
        while call is not None:
            call()
            with self._lock:
                call = self._waiting.popleft() if self._waiting else None
                self._free += call is None

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:  # noqa: ARG002
        """What has not begun never will. What has is not waited for: it may hang."""
        with self._lock:
            self._waiting.clear()


def _complete(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    # It is raised where the future is waited for.
    except BaseException as error:  # noqa: BLE001 - see above
        future.set_exception(error)
