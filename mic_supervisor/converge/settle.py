"""Waiting for the loop to have nothing left to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from mic_supervisor.plan.settled import settled
from mic_supervisor.plan.status import chosen_rows

if TYPE_CHECKING:
    from mic_supervisor.converge.loop import Converger
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.plan.selection import Selection


class Settling:
    """Lets many wait, each for a round that began after it had asked."""

    def __init__(self, converger: Converger, clock: Callable[[], float]) -> None:
        self._converger = converger
        self._clock = clock
        self._waiters: list[_Waiter] = []
        self._seen = asyncio.Event()
        self._last: Snapshot | None = None

    def look(self, snapshot: Snapshot) -> None:
        """To be called with every snapshot."""
        self._last = snapshot
        self._seen.set()
        for waiter in [*self._waiters]:
            waiter.look(snapshot)

    async def first(self) -> Snapshot:
        """The last snapshot, once there is one."""
        if self._last is None:
            self._converger.wake()
        await self._seen.wait()
        assert self._last is not None  # set before the event
        return self._last

    async def next(self) -> Snapshot:
        """The first snapshot of a round that begins from now on."""
        return await self.seen(lambda _snapshot: True)

    async def settled(self, targets: Selection | None = None) -> Snapshot:
        """The first snapshot of a round from now on that leaves nothing to wait for.

        With `targets` it is about those alone.
        """
        began = self._clock()
        return await self.seen(lambda snapshot: all_settled(snapshot, began, targets))

    async def seen(self, enough: Callable[[Snapshot], bool]) -> Snapshot:
        """The first snapshot of a round from now on that is enough."""
        waiter = _Waiter(self._converger.rounds_begun, enough)
        self._waiters.append(waiter)
        self._converger.wake()
        try:
            return await waiter.future
        finally:
            self._waiters.remove(waiter)


class _Waiter:
    def __init__(self, after: int, enough: Callable[[Snapshot], bool]) -> None:
        self.future: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._after = after
        self._enough = enough

    def look(self, snapshot: Snapshot) -> None:
        if self.future.done() or snapshot.round <= self._after:
            return
        if self._enough(snapshot):
            self.future.set_result(snapshot)


def all_settled(snapshot: Snapshot, began: float, targets: Selection | None = None) -> bool:
    """Whether an apply that began then has nothing left to wait for."""
    only = None
    if targets is not None:
        only = {row.id for row in chosen_rows(targets, snapshot.desired, snapshot.statuses)}
    if snapshot.busy if only is None else snapshot.busy & only:
        return False
    return settled(
        snapshot.desired,
        snapshot.plan,
        snapshot.statuses,
        snapshot.memory,
        began=began,
        now=snapshot.now,
        only=only,
    )
