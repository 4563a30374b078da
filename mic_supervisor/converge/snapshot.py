"""What the loop is given, and what it gives out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mic_supervisor.backends import Backend
from mic_supervisor.converge.hooks import HookState
from mic_supervisor.desired.claims import Claims
from mic_supervisor.model import DesiredState, GpuInventory
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.look import Look
from mic_supervisor.views import view
from mic_supervisor.views.endpoints import Endpoints
from mic_supervisor.views.status import ConfigInUse


class Desired(Protocol):
    """Where the desired state comes from; it may depend on what GPUs there are."""

    def state(self, inventory: GpuInventory, bindings: Mapping[str, str]) -> DesiredState:
        """The desired state for this inventory. Blocking; may read files."""
        ...

    def with_claims(
        self, state: DesiredState, claims: Claims, inventory: GpuInventory
    ) -> DesiredState:
        """What `state` gave, with an instance for each claim that has GPUs. Blocking, too."""
        ...

    def backend(self, name: str) -> Backend:
        """The backend of an instance that `state` gave."""
        ...


_LONGEST_GAP = 0.5  # seconds
_CRASH_WATCH = 0.5  # seconds between two rounds while something starts
_QUEUE_WATCH = 2.0  # seconds between two rounds while something waits for a foreign process to go
_ON_ITS_WAY = (Phase.PENDING, Phase.STARTING, Phase.LOADING)


@dataclass(frozen=True, slots=True)
class ConfigState:
    """Which configuration runs. `error` says where the file as it is now is not valid, or is None.

    `unconfirmed` says why the file as it is now waits until a person confirms it. `generation`
    counts accepted configurations, over restarts; None: this one was not accepted. `hash` is ""
    while there is none.
    """

    path: str
    hash: str
    generation: int | None
    loaded_at: float | None
    last_reload_ok: bool
    error: str | None
    error_at: float | None
    models: Mapping[str, str] = field(default_factory=dict)  # name -> backend
    unconfirmed: str | None = None
    profile: str | None = None  # that is on

    @property
    def in_use(self) -> ConfigInUse:
        """As `status --json` tells it."""
        return view(ConfigInUse, self)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """`error` says where the file is not valid; then nothing was swapped.

    `changed`: another document runs. `warning`: it runs, and may not run again after a restart with
    a broken file. `unconfirmed`: nothing was swapped, since the file may have been cut; why, and
    the way out. `confirmed`: what waited for a person's word may be done now.
    """

    changed: bool
    generation: int
    error: str | None = None
    warning: str | None = None
    unconfirmed: str | None = None
    confirmed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Look):
    """One round's look, and what the loop knows besides: what status, HTTP and metrics show.

    Plan, statuses and hook are told to people, so their times are the wall clock's, as `at` is. The
    memory's are steady, as `now` is, the same moment.
    """

    busy: frozenset[str]  # instances that steps are being executed for
    round: int = 0
    seconds: float = 0.0  # that the round took
    hook: HookState = field(default_factory=HookState)
    endpoints: Endpoints = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Seconds until the next round at the earliest, whatever wakes the loop meanwhile.

        So rounds take a quarter of a core at most, also where the engine reports a thousand events
        a second.
        """
        return min(3 * self.seconds, _LONGEST_GAP)

    def pause(self, resync: float, now: float) -> float:
        """Seconds until the next round, unless something wakes the loop before. `now` is steady."""
        pause = resync
        if any(row.phase in _ON_ITS_WAY for row in self.statuses):
            pause = _CRASH_WATCH
        elif any(row.phase is Phase.WAITING_VRAM for row in self.statuses):
            pause = min(pause, _QUEUE_WATCH)
        wake = self.plan.next_wake  # of the wall clock, as the snapshot is told
        left = -1.0 if wake is None else wake - self.offset - now
        return max(self.gap, min(pause, left) if left > 0 else pause)
