"""Reads the machine into one immutable state: slow sources side by side, each for so long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from mic_supervisor.converge.mps import with_servers
from mic_supervisor.gpu import GpuSource
from mic_supervisor.gpu.owners import annotate, managed_refs
from mic_supervisor.model import (
    DesiredState,
    GpuInventory,
    Health,
    Listener,
    ObservedState,
    ObservedWorkload,
    RunState,
    RuntimeView,
)
from mic_supervisor.plan.actions import Restart, Start, Step
from mic_supervisor.plan.assess import is_alive
from mic_supervisor.runtimes import Runtime
from mic_supervisor.text import quoted

_LOGGER = logging.getLogger("mic")
_LONGEST_ERROR = 300  # characters of what an unexpected exception says


@dataclass(frozen=True, slots=True)
class Sources:
    """Where facts come from. Each may be slow or gone without the others' being so.

    `listener_owners` says who listens, by port, as far as that can be known.
    """

    gpus: GpuSource
    runtimes: Mapping[str, Runtime]  # by name
    listeners: Callable[[], tuple[Listener, ...] | None]
    listener_owners: Callable[[], Mapping[int, Listener]] = dict


def observe(sources: Sources, at: float) -> ObservedState:
    """Everything, one source after the other, without health. For commands that run once.

    `at` is when, in wall time.
    """
    return combine(
        sources.gpus.observe(),
        [runtime.observe() for runtime in sources.runtimes.values()],
        sources.listeners(),
        {},
        at,
    )


def combine(
    inventory: GpuInventory,
    views: Iterable[RuntimeView],
    listeners: tuple[Listener, ...] | None,
    health: Mapping[str, Health],
    at: float,
) -> ObservedState:
    """One state from the parts, with every GPU process mapped to its owner. `at` is wall time."""
    views = tuple(_with_doubtful_gpus(view, inventory) for view in views)
    processes = any(gpu.processes for gpu in inventory.gpus)
    return ObservedState(
        inventory=annotate(inventory, managed_refs(views)) if processes else inventory,
        runtimes=views,
        health=health,
        listeners=listeners,
        at=at,
    )


def _with_doubtful_gpus(view: RuntimeView, inventory: GpuInventory) -> RuntimeView:
    """What is in doubt and names no GPU has the one of its id, else any that has no other owner."""
    if all(item.doubt is None or item.identity.gpus for item in view.workloads):
        return view
    known = {uuid for item in view.workloads for uuid in item.identity.gpus}
    rest = tuple(gpu.uuid for gpu in inventory.gpus if gpu.uuid not in known)

    def placed(item: ObservedWorkload) -> ObservedWorkload:
        if item.doubt is None or item.identity.gpus:
            return item
        ends = item.identity.instance.rpartition("-")[2]
        named = tuple(
            gpu.uuid for gpu in inventory.gpus if gpu.uuid.lower()[4:].startswith(f"{ends}-")
        )
        return replace(item, identity=replace(item.identity, gpus=named or rest))

    return replace(view, workloads=tuple(placed(item) for item in view.workloads))


def with_holders(observed: ObservedState, desired: DesiredState, sources: Sources) -> ObservedState:
    """Who listens on the ports that the file fixes, where that is not the instance itself, and
    which instances the MPS servers on GPUs serve.

    The first takes a walk through every open file of the machine, so it is done for those ports
    alone.
    """
    on_gpus = {uuid: instance for instance in desired.instances for uuid in instance.gpus}
    observed = replace(observed, inventory=with_servers(observed.inventory, on_gpus))
    ours = {
        (workload.identity.instance, number)
        for view in observed.runtimes
        for workload in view.workloads
        if workload.state is RunState.RUNNING
        for number in workload.identity.ports.values()
    }
    asked = {
        port.host
        for instance in desired.instances
        for port in instance.workload.ports
        if port.host is not None and (instance.id, port.host) not in ours
    }
    if observed.listeners is None or not any(item.port in asked for item in observed.listeners):
        return observed
    owners = sources.listener_owners()
    named = tuple(
        replace(owners.get(item.port, item), addresses=item.addresses)
        if item.port in asked and item.pid is None
        else item
        for item in observed.listeners
    )
    return replace(observed, listeners=named)


class LastViews:
    """What each runtime may run while it cannot be read, see RuntimeView.last."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[ObservedWorkload, ...]] = {}  # alive, by runtime
        self._begun: list[ObservedWorkload] = []  # that no look has shown yet

    def begins(self, step: Step) -> None:
        """Before a step is carried out: it may do what it is for, whatever is heard of it."""
        if isinstance(step, Start):
            one = step.launch
            self._begun.append(
                ObservedWorkload(one.runtime, one.name, "", one.identity, RunState.UNKNOWN)
            )
        elif isinstance(step, Restart):
            self._begun.append(replace(step.workload, state=RunState.UNKNOWN))

    def noted(self, view: RuntimeView, busy: Collection[str]) -> RuntimeView:
        """The view, with what is known from before where it has an error.

        What `busy` instances begin may be newer than the view.
        """
        name = view.runtime
        if view.error is None:
            self._read[name] = tuple(item for item in view.workloads if is_alive(item))
            self._begun = [
                item
                for item in self._begun
                if item.runtime != name or item.identity.instance in busy
            ]
            return view
        if name not in self._read:
            return view
        begun = (item for item in self._begun if item.runtime == name)
        return replace(view, last=(*self._read[name], *begun))


T = TypeVar("T")

SOURCE_TIMEOUT = 15.0  # seconds that a source has to answer at most before it counts as unreadable
_QUICK = 2.0  # seconds for a source that has always answered quickly
_USUAL = 4.0  # a source may take so many times what it took when it last answered well


@dataclass(eq=False, slots=True)
class Source(Generic[T]):
    """One source of facts.

    Everything else waits with a round, so a source is waited for as long as it usually takes, with
    room, and from 2 s to 15 s. A call that hangs is left to hang in its thread, once: until it
    returns, the source counts as unreadable, and no second call is made; `awake` is called then.
    `late` builds that answer from a sentence; it is also the answer where `read` raises what nobody
    expected, which stands in the log with its traceback. `well` says whether an answer is one.
    """

    name: str
    read: Callable[[], T]
    late: Callable[[str], T]
    well: Callable[[T], bool]
    pool: Executor
    awake: Callable[[], None]
    _pending: asyncio.Future[T] | None = field(default=None, init=False)
    _began: float = field(default=0.0, init=False)
    _was_late: bool = field(default=False, init=False)
    _timeout: float = field(default_factory=lambda: _QUICK, init=False)
    _defect: str | None = field(default=None, init=False)  # that is in the log

    async def get(self) -> T:
        """What the source says now: of a call that began after `get` did, or that it is late."""
        loop = asyncio.get_running_loop()
        # Once late, it is not waited for again: others would wait with it, round after round.
        timeout = 0.0 if self._was_late else self._timeout
        if self._pending is not None and not await self._finished(self._pending, timeout):
            return self._give_up()
        self._was_late = False
        self._began = loop.time()
        self._pending = loop.run_in_executor(self.pool, self.read)
        self._pending.add_done_callback(self._measure)
        if not await self._finished(self._pending, self._timeout):
            return self._give_up()
        pending, self._pending = self._pending, None
        try:
            found = pending.result()
        # Whatever a reader dies of, what it reads is unknown, and everything else is looked after.
        except Exception as error:  # noqa: BLE001
            return self.late(self._died(error))
        self._defect = None
        return found

    def _died(self, error: Exception) -> str:
        defect = quoted(f"{type(error).__name__}: {error}", _LONGEST_ERROR)
        if defect != self._defect:  # else each round would say so
            _LOGGER.error("%s cannot be read: %s", self.name, defect, exc_info=error)
        self._defect = defect
        return f"its answer is not what was expected: {defect}"

    def _give_up(self) -> T:
        self._was_late = True
        waited = asyncio.get_running_loop().time() - self._began
        return self.late(f"{self.name} has not answered for {waited:.0f} s")

    def _measure(self, call: asyncio.Future[T]) -> None:
        if self._was_late:
            self.awake()
        if call.cancelled() or call.exception() is not None or not self.well(call.result()):
            return
        took = asyncio.get_running_loop().time() - self._began
        self._timeout = min(max(_QUICK, _USUAL * took), SOURCE_TIMEOUT)

    async def _finished(self, future: asyncio.Future[T], timeout: float) -> bool:
        done, _ = await asyncio.wait({future}, timeout=timeout)
        return bool(done)


def read_in(
    sources: Sources, pool: Executor, awake: Callable[[], None]
) -> tuple[Source[GpuInventory], list[Source[RuntimeView]], Source[tuple[Listener, ...] | None]]:
    """The machine's sources, to be asked side by side in `pool`: GPUs, runtimes, listeners."""
    gpus = Source(
        "NVML",
        sources.gpus.observe,
        lambda error: GpuInventory("nvml", error=error, late=True),
        lambda inventory: inventory.error is None,
        pool,
        awake,
    )
    views = [
        Source(
            name, runtime.observe, _late_view(name), lambda view: view.error is None, pool, awake
        )
        for name, runtime in sources.runtimes.items()
    ]
    listeners: Source[tuple[Listener, ...] | None] = Source(
        "/proc/net",
        sources.listeners,
        lambda _error: None,
        lambda found: found is not None,
        pool,
        awake,
    )
    return gpus, views, listeners


def _late_view(name: str) -> Callable[[str], RuntimeView]:
    return lambda error: RuntimeView(name, error=error, late=True)
