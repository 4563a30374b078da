"""Keeps the parts of the daemon alive: the loop, and what wakes and shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mic_supervisor.converge import tasks
from mic_supervisor.daemon.log import LOGGER
from mic_supervisor.errors import MicError
from mic_supervisor.text import quoted

_FIRST_DELAY = 1.0  # seconds before a part that ended is started again, doubling to the last
_LAST_DELAY = 30.0
_PROVEN = 10.0  # seconds that a part has to live to count as alive after it had ended


class Parts:
    """Runs each part, which never ends by itself, until `stop`. For the event loop's thread.

    One that ends all the same, by an error or not, is told of in the log and started again.
    `down` says of those that ended why, until they have lived for a while; `changed` is called when
    that becomes another.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.down: dict[str, str] = {}
        self._changed = changed
        self._tasks: list[asyncio.Task[None]] = []
        self._over = False

    def keep(self, name: str, run: Callable[[], Awaitable[object]]) -> None:
        """Run this part from now on; `run` is called again each time that it has ended."""
        self._tasks.append(asyncio.create_task(self._keep(name, run), name=name))

    async def stop(self) -> None:
        """End all parts. One that does not end within 2 s is named in the log and left."""
        self._over = True
        await tasks.end(self._tasks)

    async def _keep(self, name: str, run: Callable[[], Awaitable[object]]) -> None:
        loop, delay = asyncio.get_running_loop(), _FIRST_DELAY
        while not self._over:
            began = loop.time()
            proven = loop.call_later(_PROVEN, self._note, name, None)
            try:
                await run()
                why = "it ended"
            except asyncio.CancelledError:
                if self._over:
                    raise
                why = "it was cancelled"
            except MicError as error:
                why = error.message
            # Whatever a part dies of, the others live on, and it is told of with its traceback.
            except Exception as error:  # noqa: BLE001 - see above
                why = quoted(f"{type(error).__name__}: {error}")
                LOGGER.exception("%s has died", name)
            finally:
                proven.cancel()
            if self._over:
                return
            if loop.time() - began >= _PROVEN:
                delay = _FIRST_DELAY
            LOGGER.error("%s is not alive: %s; it is started again in %g s", name, why, delay)
            self._note(name, why)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_DELAY)

    def _note(self, name: str, why: str | None) -> None:
        if self.down.get(name) == why:
            return
        if why is None:
            del self.down[name]
        else:
            self.down[name] = why
        self._changed()


async def in_thread(name: str, work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own, and return, or raise, as it did.

    A thread cannot be cancelled: one that is waited for no more is left, and keeps nothing alive.
    """
    try:
        await asyncio.wrap_future(tasks.Threads(1, name).submit(work))
    except SystemExit:
        raise RuntimeError(f"the thread {name} exited") from None
