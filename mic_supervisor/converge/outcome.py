"""How an order ends: waiting until the loop has nothing left to do, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mic_supervisor.converge.events import Event
from mic_supervisor.converge.loop import Converger
from mic_supervisor.converge.observe import SOURCE_TIMEOUT
from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.host import host_name
from mic_supervisor.plan.actions import Change
from mic_supervisor.plan.assess import Selection, is_alive, workloads
from mic_supervisor.plan.status import chosen_rows, converged
from mic_supervisor.views.apply import Failure, apply_document

Emit = Callable[[Event], None]


class Snapshots:
    """Lets many wait, each for a round that began after it had asked.

    `complete`: what has not answered yet is waited for, also for the first one.
    """

    def __init__(
        self, converger: Converger, clock: Callable[[], float], *, complete: bool = False
    ) -> None:
        self._converger = converger
        self._clock = clock
        self._complete = complete
        self._waiting: list[Callable[[Snapshot], None]] = []
        self._last: Snapshot | None = None

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """To be called with every snapshot."""
        self._last = snapshot
        for emit in [*self._waiting]:
            emit(snapshot)

    async def first(self) -> Snapshot:
        """The last snapshot, once there is one."""
        began = self._clock()
        return self._last or await self._wait(
            lambda snapshot: not (self._complete and _may_answer_yet(snapshot, began))
        )

    async def next(self) -> Snapshot:
        """The first snapshot of a round that begins from now on."""
        return await self.seen(lambda _snapshot: True)

    async def converged(
        self,
        targets: Selection | None = None,
        leaving: Callable[[Snapshot], set[str]] = lambda _snapshot: set(),
    ) -> Snapshot:
        """The first snapshot of a round from now on that leaves nothing to wait for.

        With `targets` it is about those alone, and about what is `leaving`, by its id.
        """
        began = self._clock()
        return await self.seen(
            lambda snapshot: all_converged(
                snapshot,
                began,
                None if targets is None else ids(targets, snapshot) | leaving(snapshot),
            )
        )

    async def seen(self, enough: Callable[[Snapshot], bool]) -> Snapshot:
        """The first snapshot of a round from now on that is enough."""
        after = self._converger.rounds_begun
        return await self._wait(lambda snapshot: snapshot.round > after and enough(snapshot))

    async def _wait(self, enough: Callable[[Snapshot], bool]) -> Snapshot:
        found: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()

        def emit(snapshot: Snapshot) -> None:
            if not found.done() and enough(snapshot):
                found.set_result(snapshot)

        self._waiting.append(emit)
        self._converger.wake()
        try:
            return await found
        finally:
            self._waiting.remove(emit)


def all_converged(snapshot: Snapshot, began: float, only: set[str] | None = None) -> bool:
    """Whether an apply that began then has nothing left to wait for; `only` of these instances."""
    if snapshot.busy if only is None else snapshot.busy & only:
        return False
    if _may_answer_yet(snapshot, began):
        return False
    return converged(
        snapshot.desired,
        snapshot.plan,
        snapshot.statuses,
        snapshot.memory,
        began=began,
        now=snapshot.now,
        only=only,
    )


def _may_answer_yet(snapshot: Snapshot, began: float) -> bool:
    """On a machine that is busy an engine takes longer than it usually does."""
    return snapshot.observed.late and snapshot.now - began < SOURCE_TIMEOUT


def ids(targets: Selection, snapshot: Snapshot) -> set[str]:
    """Of the instances by which it is told how the chosen fare."""
    return {row.id for row in chosen_rows(targets, snapshot.desired, snapshot.statuses)}


@dataclass(slots=True)
class Noted:
    """What happened while an order was carried out."""

    pass_on: Emit
    failures: dict[str, Failure] = field(default_factory=dict)  # the last of each instance
    begun: dict[str, tuple[str, ...]] = field(default_factory=dict)  # instance -> its GPUs

    def emit(self, event: Event) -> None:
        if event.kind == "failed":
            self.failures[event.instance] = Failure(event.instance, event.text, event.hint)
        elif event.kind in ("begin", "done"):
            self.begun[event.instance] = event.gpus
        if event.kind != "config":  # whoever has the file read learns of it by the outcome
            self.pass_on(event)


def outcome(
    snapshot: Snapshot,
    noted: Noted,
    targets: Selection | None = None,
    left_out: Iterable[Change] = (),
    not_pulled: Collection[str] = (),
) -> dict[str, Any]:
    """The document of `apply`, and of all that converge as it does."""
    found = noted.failures.values(), host_name(), targets, left_out, not_pulled
    return asdict(apply_document(snapshot, *found, begun=noted.begun))


def running(snapshot: Snapshot) -> dict[str, str]:
    """The model of each instance of which something is alive, by its id."""
    found = [one.identity for one in workloads(snapshot.observed) if is_alive(one)]
    return {one.instance: one.model for one in found}
