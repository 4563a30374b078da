"""Reads the machine into one immutable state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mic_supervisor.gpu import GpuSource
from mic_supervisor.model import (
    GpuInventory,
    Health,
    Listener,
    ObservedState,
    RuntimeView,
)

if TYPE_CHECKING:
    from mic_supervisor.runtimes import Runtime


@dataclass(frozen=True, slots=True)
class Sources:
    """Where facts come from. Each may be slow or gone without the others' being so."""

    gpus: GpuSource
    runtimes: Mapping[str, Runtime]  # by name
    listeners: Callable[[], tuple[Listener, ...] | None]


def observe(sources: Sources, now: float) -> ObservedState:
    """Everything, one source after the other, without health. For commands that run once."""
    return combine(
        sources.gpus.observe(),
        [runtime.observe() for runtime in sources.runtimes.values()],
        sources.listeners(),
        {},
        now,
    )


def combine(
    inventory: GpuInventory,
    views: Iterable[RuntimeView],
    listeners: tuple[Listener, ...] | None,
    health: Mapping[str, Health],
    now: float,
) -> ObservedState:
    """One state from the parts, with every GPU process mapped to its owner."""
    views = tuple(views)
    return ObservedState(
        inventory=_with_owners(inventory, views),
        runtimes=views,
        health=health,
        listeners=listeners,
        at=now,
    )


def _with_owners(inventory: GpuInventory, views: tuple[RuntimeView, ...]) -> GpuInventory:
    if not any(gpu.processes for gpu in inventory.gpus):
        return inventory
    from mic_supervisor.gpu.owners import annotate, managed_refs

    return annotate(inventory, managed_refs(views))


def with_health(observed: ObservedState, health: Mapping[str, Health]) -> ObservedState:
    return replace(observed, health=health)
