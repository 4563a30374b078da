"""What the loop is given, and what it gives out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Protocol

from mic_supervisor.backends import Backend
from mic_supervisor.converge.publisher import HookState
from mic_supervisor.model import DesiredState, GpuInventory, ObservedState
from mic_supervisor.plan.actions import Plan
from mic_supervisor.plan.endpoints import Endpoints
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.records import dataclass


class Desired(Protocol):
    """Where the desired state comes from; it may depend on what GPUs there are."""

    def state(self, inventory: GpuInventory, bindings: Mapping[str, str]) -> DesiredState:
        """The desired state for this inventory. Blocking; may read files."""
        ...

    def backend(self, name: str) -> Backend:
        """The backend of an instance that `state` gave."""
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One round's view of everything, immutable: what status, HTTP and metrics show.

    Plan, statuses and hook are told to people, so their times are the wall clock's, as `at` is. The
    memory's are steady, as `now` is, the same moment; `offset` is what lies between the two.
    """

    at: float
    desired: DesiredState
    observed: ObservedState
    memory: Memory
    plan: Plan
    statuses: tuple[InstanceStatus, ...]
    busy: frozenset[str]  # instances that steps are being executed for
    failing: frozenset[str]  # instances whose last change failed
    round: int = 0
    seconds: float = 0.0  # that the round took
    hook: HookState = HookState()
    endpoints: Endpoints = field(default_factory=dict)
    offset: float = 0.0

    @property
    def now(self) -> float:
        return self.at - self.offset
