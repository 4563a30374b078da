"""Asks slow sources side by side, and bounds the wait for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE = 15.0  # seconds that a source has to answer before it counts as unreadable


class Source(Generic[T]):
    """One source of facts.

    A call that hangs is left to hang in its thread, once: until it returns, the source counts as
    unreadable, and no second call is made. `late` builds that answer from a sentence.
    """

    def __init__(
        self, name: str, read: Callable[[], T], late: Callable[[str], T], pool: Executor
    ) -> None:
        self.name = name
        self._read = read
        self._late = late
        self._pool = pool
        self._pending: asyncio.Future[T] | None = None
        self._was_late = False

    async def get(self) -> T:
        """What the source says now: of a call that began after `get` did, or that it is late."""
        loop = asyncio.get_running_loop()
        # Once late, it is not waited for again: others would wait with it, round after round.
        patience = 0.0 if self._was_late else PATIENCE
        if self._pending is not None and not await self._finished(self._pending, patience):
            return self._late(f"{self.name} has not answered for more than {PATIENCE:g} s")
        self._was_late = False
        self._pending = loop.run_in_executor(self._pool, self._read)
        if not await self._finished(self._pending, PATIENCE):
            self._was_late = True
            return self._late(f"{self.name} has not answered for more than {PATIENCE:g} s")
        pending, self._pending = self._pending, None
        return pending.result()

    async def _finished(self, future: asyncio.Future[T], patience: float) -> bool:
        done, _ = await asyncio.wait({future}, timeout=patience)
        return bool(done)
