"""What a plan is made of.

A `Change` is what an operator reads: "replace MAM-f15ae561". Its `steps` are what the executor
does: one runtime call each, in the order that `depends_on` gives. Steps of different changes may
depend on each other within a lane: the old model is stopped only after the new one was prepared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mic_supervisor.clocks import later
from mic_supervisor.model import HttpCall, Launch, ObservedWorkload, Placement, Preparation
from mic_supervisor.plan.memory import Floor
from mic_supervisor.plan.words import Code, Reason

ChangeKind = Literal[
    "create", "start", "restart", "stop", "remove", "replace", "load", "unload", "adopt"
]


@dataclass(frozen=True, slots=True)
class FieldDiff:
    """One field of a specification that differs. Secrets stand as "(hidden)"."""

    path: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Step:
    """Base of all steps. `id` is unique in its plan."""

    id: str
    instance: str
    depends_on: tuple[str, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, slots=True)
class ToLaunch(Step):
    """Base of those that make a new workload."""

    launch: Launch


@dataclass(frozen=True, slots=True)
class Prepare(ToLaunch):
    """Everything that can fail early: image, paths, programs. Stops nothing.

    `command` goes before that where it is due, with all filled in: what the file `asked` for.
    Once it has been run, `key` says so.
    """

    command: tuple[str, ...] = field(default=(), kw_only=True, repr=False)
    asked: Preparation | None = field(default=None, kw_only=True)
    key: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Create(ToLaunch):
    """Make it, and start nothing yet."""


@dataclass(frozen=True, slots=True)
class Start(ToLaunch):
    """Make it where that was not done ahead, and start it."""


@dataclass(frozen=True, slots=True)
class ToWorkload(Step):
    """Base of those that are done to a workload that is there."""

    workload: ObservedWorkload


@dataclass(frozen=True, slots=True)
class Restart(ToWorkload):
    """Start an ended workload again as it is."""


@dataclass(frozen=True, slots=True)
class Withdraw(ToWorkload):
    """Have those who forward requests to it stop doing so, and wait until they have."""


@dataclass(frozen=True, slots=True)
class Remove(ToWorkload):
    """Remove what is left of it."""


@dataclass(frozen=True, slots=True)
class Drain(ToWorkload):
    """Ask `call` until the backend says that nothing is in flight, at most `timeout` seconds.

    `listen` is the address that the workload serves on.
    """

    call: HttpCall
    timeout: float
    listen: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Stop(ToWorkload):
    signal: str
    grace: float  # seconds


@dataclass(frozen=True, slots=True)
class ToModel(ToWorkload):
    """Base of those that are done inside a server that runs."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Load(ToModel):
    """Load it, or load it anew."""


@dataclass(frozen=True, slots=True)
class Unload(ToModel):
    """Have the server give it up."""


@dataclass(frozen=True, slots=True)
class Release(Step):
    """Wait until the GPUs are free of the former workloads: their processes, then their memory.

    `floors` is what was used before they started, by GPU, where that is known; `vram` is what is
    to start there needs on each of them, in bytes. See plan/release.py.
    """

    gpus: tuple[str, ...]
    former: tuple[ObservedWorkload, ...]
    floors: Mapping[str, Floor] = field(default_factory=dict, kw_only=True)
    vram: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Change:
    """Everything that happens to one instance in one plan.

    `lane` groups changes that must see each other; lanes run in parallel. `waits` set: it is this
    change's turn later, and that is why; `until` when the passing of time alone brings it.
    """

    kind: ChangeKind
    instance: str
    model: str
    backend: str
    gpus: tuple[str, ...]
    lane: str
    why: Reason
    diff: tuple[FieldDiff, ...] = ()
    steps: tuple[Step, ...] = ()
    waits: Reason | None = None
    until: float | None = None  # steady while deciding

    @property
    def cause(self) -> str:
        return str(self.why)

    def behind(self, ids: Collection[str]) -> Iterator[tuple[Step, str]]:
        """Its steps that depend on any of these, and on which."""
        for step in self.steps:
            yield from ((step, needed) for needed in step.depends_on if needed in ids)

    @property
    def runs(self) -> tuple[str, ...]:
        """The programs of `prepare` that it runs before anything else."""
        return tuple(
            one.command[0] for one in self.steps if isinstance(one, Prepare) and one.command
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """The names of the workloads that it stops."""
        return tuple(step.workload.name for step in self.steps if isinstance(step, Stop))

    @property
    def removes(self) -> tuple[str, ...]:
        """The names of the workloads of which nothing is left afterwards."""
        return tuple(step.workload.name for step in self.steps if isinstance(step, Remove))


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why nothing happens although something should."""

    instance: str  # an instance id, or how the file calls the entry
    why: Reason
    gpus: tuple[str, ...] = ()
    model: str | None = None
    until: float | None = None  # when the passing of time alone may end it; steady while deciding

    @property
    def reason(self) -> str:
        return str(self.why)

    @property
    def hint(self) -> str | None:
        return self.why.hint

    @property
    def paused(self) -> bool:
        """Somebody asked for it to be left as it is, be there anything due or not."""
        return self.why.kind is Code.PAUSED

    @property
    def drained(self) -> bool:
        """Somebody took the host out of service."""
        return self.why.kind is Code.DRAINED

    @property
    def chosen(self) -> bool:
        """It is no other one than those that the plan was limited to."""
        return self.why.kind is not Code.NOT_CHOSEN

    @property
    def queued(self) -> bool:
        """The file says to wait for it: a stranger has the GPU."""
        return self.why.queued


@dataclass(frozen=True, slots=True)
class Plan:
    """The difference between desired and observed state, and how it goes away.

    Sorted by lane and instance, so that equal inputs give equal texts. `left_out` is due, and not
    part of the plan because others were chosen.
    """

    changes: tuple[Change, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    warnings: tuple[str, ...] = ()
    left_out: tuple[Change, ...] = ()

    @property
    def next_wake(self) -> float | None:
        """When something may go on by the passing of time alone."""
        times = [item.until for item in self.blocked] + [one.until for one in self.changes]
        return min((at for at in times if at is not None), default=None)

    def in_wall(self, offset: float) -> Plan:
        """For people: steady times made times since the epoch by the clocks' offset."""
        return replace(
            self,
            changes=tuple(replace(one, until=later(one.until, offset)) for one in self.changes),
            blocked=tuple(replace(one, until=later(one.until, offset)) for one in self.blocked),
        )

    @property
    def count(self) -> int:
        """Changes that act. An adoption is a report."""
        return sum(change.kind != "adopt" for change in self.changes)

    @property
    def empty(self) -> bool:
        return self.count == 0 and not self.blocked


def in_order(steps: list[Step]) -> list[Step]:
    """Each step after those that it depends on, otherwise as given.

    A dependency on a step that is not among them is met.
    """
    waiting = {step.id: step for step in steps}
    out: list[Step] = []
    while waiting:
        ready = [step for step in waiting.values() if not waiting.keys() & set(step.depends_on)]
        if not ready:
            raise AssertionError(f"steps depend on each other in a circle: {sorted(waiting)}")
        out.append(ready[0])
        del waiting[ready[0].id]
    return out
