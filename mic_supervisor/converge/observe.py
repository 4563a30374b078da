"""Reads the machine into one immutable state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from mic_supervisor.runtimes import Runtime


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
    return ObservedState(
        inventory=_with_owners(inventory, views),
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
            gpu.uuid for gpu in inventory.gpus if gpu.uuid.lower().startswith(f"gpu-{ends}-")
        )
        return replace(item, identity=replace(item.identity, gpus=named or rest))

    return replace(view, workloads=tuple(placed(item) for item in view.workloads))


def _with_owners(inventory: GpuInventory, views: tuple[RuntimeView, ...]) -> GpuInventory:
    if not any(gpu.processes for gpu in inventory.gpus):
        return inventory
    return annotate(inventory, managed_refs(views))


def with_holders(observed: ObservedState, desired: DesiredState, sources: Sources) -> ObservedState:
    """Who listens on the ports that the file fixes, where that is not the instance itself.

    It takes a walk through every open file of the machine, so it is done for those ports alone.
    """
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
        owners.get(item.port, item) if item.port in asked and item.pid is None else item
        for item in observed.listeners
    )
    return replace(observed, listeners=named)
