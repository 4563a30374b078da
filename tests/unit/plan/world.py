"""A machine in memory: runtimes, GPUs and servers that carry out the steps of plans.

It copies what is awkward about the real ones. Containers keep their name until they are removed, a
record or a unit is replaced by the next start of its name, the driver lists processes for a while
after their end, starts take time, and everything can fail. What must never happen is asserted the
moment it would: `Broken` is raised, and no test expects it.

Time passes by argument; chance comes from the `Random` that the caller gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from random import Random

from mic_supervisor.converge.observe import LastViews
from mic_supervisor.errors import (
    LoadFailed,
    MicError,
    PreflightFailed,
    RuntimeRefused,
    StopFailed,
)
from mic_supervisor.model import (
    DesiredState,
    Gpu,
    GpuInventory,
    GpuProcess,
    Health,
    Launch,
    Listener,
    LoadState,
    ObservedState,
    ObservedWorkload,
    Owner,
    OwnerKind,
    Pairs,
    PlacementState,
    ProbeResult,
    RunState,
    RuntimeView,
)
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import (
    Change,
    Create,
    Drain,
    Load,
    Plan,
    Prepare,
    Release,
    Remove,
    Restart,
    Start,
    Step,
    Stop,
)
from mic_supervisor.plan.assess import Assessment, Context
from mic_supervisor.plan.look import look
from mic_supervisor.plan.memory import Memory
from tests.unit.plan.builders import gpus

BOOT = 20.0  # seconds from a start until the startup probe passes


class Broken(AssertionError):
    """Something happened that must never happen."""


class Killed(Exception):
    """The supervisor was killed in the middle of a plan."""


@dataclass
class Box:
    """One container, record or unit. `pid` is another one after each start."""

    launch: Launch
    ref: str
    created_at: float
    state: RunState = RunState.CREATED
    pid: int | None = None
    started_at: float | None = None
    exit_code: int | None = None
    error: str | None = None
    hung: bool = False
    flying: bool = False  # somebody asked for its start, which has not come to an end
    loaded: dict[str, tuple[str, Pairs]] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return self.state is RunState.RUNNING

    @property
    def instance(self) -> str:
        return self.launch.identity.instance

    @property
    def gpus(self) -> frozenset[str]:
        return frozenset(self.launch.identity.gpus)

    def observed(self) -> ObservedWorkload:
        return ObservedWorkload(
            runtime=self.launch.runtime,
            name=self.launch.name,
            ref=self.ref,
            identity=self.launch.identity,
            state=RunState.UNKNOWN if self.flying else self.state,
            pid=self.pid,
            exit_code=self.exit_code,
            created_at=self.created_at,
            started_at=self.started_at,
            error=self.error,
        )


@dataclass
class World:
    """`desired` is what the file says; `fails(step)` says why a step fails, or None.

    `dies(box)` says whether what was just started ends at once. `between` is called before every
    step, and may change the machine or raise Killed.
    """

    context: Context
    desired: DesiredState = field(default_factory=DesiredState)
    gpus: tuple[Gpu, ...] = field(default_factory=lambda: gpus(4))
    now: float = 1_000_000.0
    memory: Memory = field(default_factory=Memory)
    boxes: dict[str, Box] = field(default_factory=dict)  # by ref
    # UUIDs of GPUs that a foreign process computes on
    foreign: set[str] = field(default_factory=set)
    listening: set[int] = field(default_factory=set)  # ports that foreign processes listen on
    unreadable: set[str] = field(default_factory=set)  # runtimes, and "nvml"
    fails: Callable[[Step], str | None] = lambda step: None
    dies: Callable[[Box], bool] = lambda box: False
    between: Callable[[Step], None] = lambda step: None
    log: list[str] = field(default_factory=list)
    last_views: LastViews = field(default_factory=LastViews)
    _lingering: dict[str, set[int]] = field(default_factory=dict)  # UUID -> PIDs that have ended
    _counter: itertools.count[int] = field(default_factory=lambda: itertools.count(1000))
    _assessments: dict[str, Assessment] = field(default_factory=dict)

    # --- looking ------------------------------------------------------------------------------

    def observe(self) -> ObservedState:
        names = ("docker", self.context.process_runtime)
        return ObservedState(
            inventory=self._inventory(),
            runtimes=tuple(self._view(name) for name in names),
            health={box.ref: self._health(box) for box in self.boxes.values() if box.alive},
            listeners=tuple(
                Listener(port)
                for port in sorted(
                    self.listening
                    | {
                        port
                        for box in self.boxes.values()
                        if box.alive
                        for port in box.launch.identity.ports.values()
                    }
                )
            ),
            at=self.now,
        )

    def _inventory(self) -> GpuInventory:
        if "nvml" in self.unreadable:
            return GpuInventory("nvml", error="cannot read the GPUs: driver mismatch")
        return GpuInventory("nvml", tuple(self._gpu(gpu) for gpu in self.gpus))

    def _gpu(self, gpu: Gpu) -> Gpu:
        found = [
            GpuProcess(box.pid, "server", 1 << 30, 7, ("compute",), _managed(box))
            for box in self.boxes.values()
            if box.alive and box.pid is not None and gpu.uuid in box.gpus
        ]
        found += [
            GpuProcess(pid, None, 1 << 30, None, ("compute",), Owner(OwnerKind.ORPHAN))
            for pid in sorted(self._lingering.get(gpu.uuid, ()))
        ]
        if gpu.uuid in self.foreign:
            found.append(GpuProcess(13, "train", 1, 7, ("compute",), Owner(OwnerKind.ORPHAN)))
        return replace(gpu, processes=tuple(found))

    def _view(self, name: str) -> RuntimeView:
        if name in self.unreadable:
            return self.last_views.noted(RuntimeView(name, error="connection refused"), ())
        found = [box.observed() for box in self.boxes.values() if box.launch.runtime == name]
        return self.last_views.noted(RuntimeView(name, tuple(found)), ())

    def _health(self, box: Box) -> Health:
        up = box.started_at is not None and self.now - box.started_at >= BOOT
        started = ProbeResult(up, "" if up else "connection refused", self.now, 0 if up else 9)
        if not up:
            return Health(startup=started)
        lives = ProbeResult(not box.hung, "no answer" if box.hung else "", self.now, 9)
        wanted = next((i for i in self.desired.instances if i.id == box.instance), None)
        return Health(
            startup=started,
            liveness=lives,
            readiness=lives,
            placements=tuple(
                PlacementState(model, LoadState.LOADED, *box.loaded[model][:1])
                if model in box.loaded
                else PlacementState(model, LoadState.ABSENT)
                for model in (item.model for item in (wanted.placements if wanted else ()))
            ),
        )

    def alive(self, instance: str | None = None) -> list[Box]:
        return [
            box
            for box in self.boxes.values()
            if box.alive and instance in (None, box.launch.identity.instance)
        ]

    # --- what happens by itself, or by hand -----------------------------------------------------

    def kill(self, box: Box, code: int = 137) -> None:
        if box.alive:
            box.state, box.exit_code = RunState.EXITED, code
            for uuid in box.gpus:
                self._lingering.setdefault(uuid, set()).add(box.pid or 0)
            box.pid = None
            box.hung = False
            box.loaded.clear()

    def erase(self, box: Box) -> None:
        self.kill(box)
        self.boxes.pop(box.ref, None)

    def pass_time(self, seconds: float) -> None:
        """The driver lets go of what has ended."""
        self.now += seconds
        for box in [box for box in self.boxes.values() if box.flying]:
            self._land(box)
        if seconds >= 1.0:
            self._lingering.clear()

    def fly(self, step: Start | Restart) -> None:
        """The supervisor was killed when it had asked for a start: the engine goes on with that."""
        name = step.launch.name if isinstance(step, Start) else step.workload.name
        for box in self._of("docker"):
            if box.launch.name == name and not box.alive:
                box.flying = True

    def _land(self, box: Box) -> None:
        box.flying = False
        self._run(box)

    # --- one round ------------------------------------------------------------------------------

    def look(self, jitter: float = 0.0) -> Plan:
        """Observe, remember and decide, as the converger does."""
        seen = look(
            self.desired, self.observe(), self.memory, self.now, self.context, jitter=jitter
        )
        self._assessments = {item.instance.id: item for item in seen.assessments}
        self.memory = seen.memory
        return seen.plan

    def round(self, chance: Random) -> Plan:
        """Look, and carry out the plan: lanes at the same time, the order of steps by chance."""
        plan = self.look(chance.random())
        lanes: dict[str, list[Step]] = {}
        for change in plan.changes:
            if change.waits is None:
                lanes.setdefault(change.lane, []).extend(change.steps)
        waiting = [(lane, step) for lane, steps in lanes.items() for step in steps]
        failed: set[str] = set()
        while waiting:
            # What a step depends on in another lane is not waited for: lanes are independent.
            ready = [
                (lane, step)
                for lane, step in waiting
                if not {other.id for name, other in waiting if name == lane} & {*step.depends_on}
            ]
            if not ready:
                raise Broken(f"steps depend on each other in a circle: {waiting}")
            pick = chance.choice(ready)
            waiting.remove(pick)
            if failed & {*pick[1].depends_on}:
                failed.add(pick[1].id)
                continue
            self.between(pick[1])
            try:
                self._step(pick[1], next(c for c in plan.changes if pick[1] in c.steps))
            except MicError as error:
                failed.add(pick[1].id)
                self.log.append(f"{pick[1].id} failed: {error}")
                item = self._assessments.get(pick[1].instance)
                self.memory = ledger.failed(
                    self.memory, pick[1], error, item, self.now, chance.random()
                )
        for change in plan.changes:
            if change.waits is None and not failed & {step.id for step in change.steps}:
                self.memory = ledger.finished(self.memory, change)
        return plan

    # --- steps ----------------------------------------------------------------------------------

    def _step(self, step: Step, change: Change) -> None:
        self.now += 0.01
        self.log.append(f"{self.now:.2f} {step.id}")
        self.memory = ledger.begun(self.memory, step)
        self.last_views.begins(step)
        reason = self.fails(step)
        if isinstance(step, Prepare):
            if reason:
                raise PreflightFailed(reason)
        elif isinstance(step, Create):
            self._create(step.launch, reason)
        elif isinstance(step, Start):
            self._begin(self._to_start(step.launch), reason)
        elif isinstance(step, Restart):
            box = self.boxes.get(step.workload.ref)
            if box is None:
                raise RuntimeRefused("it is gone")
            if box.launch.runtime != "docker":
                raise Broken("a process is restarted, whose secrets are not kept")
            self._begin(box, reason)
        elif isinstance(step, Stop):
            self._stop(step, reason)
        elif isinstance(step, Release):
            if reason:
                raise StopFailed(reason)
            for uuid in step.gpus:
                self._lingering.pop(uuid, None)
        elif isinstance(step, Remove):
            self._remove(step, reason)
        elif isinstance(step, Load):
            self._load(step, reason)
        elif not isinstance(step, Drain):
            raise Broken(f"unknown step {step}")
        self.memory = ledger.done(self.memory, step, change, self.now, {})

    def _create(self, launch: Launch, reason: str | None) -> None:
        if launch.runtime != "docker":
            raise Broken("only a container is created ahead")
        if any(box.launch.name == launch.name for box in self._of("docker")):
            raise Broken(f"the name {launch.name} is in use already")
        if reason:
            raise RuntimeRefused(reason)
        box = Box(launch, f"c{next(self._counter)}", self.now)
        self.boxes[box.ref] = box

    def _to_start(self, launch: Launch) -> Box:
        """What `start` is about: a created container, or the next run of a record or a unit."""
        if launch.runtime == "docker":
            for box in self._of("docker"):
                if box.launch.name == launch.name:
                    return box
            raise RuntimeRefused("it is gone")
        unit = launch.runtime == "systemd"
        ref = f"mic-{launch.identity.instance}.service" if unit else launch.name
        was = self.boxes.get(ref)
        if was is not None and was.alive:
            raise Broken(f"{ref} is started while it runs")
        self.boxes.pop(ref, None)
        return Box(launch, ref, self.now)

    def _begin(self, box: Box, reason: str | None) -> None:
        if box.alive:
            raise Broken(f"{box.launch.name} is started while it runs")
        if box.instance not in {item.id for item in self.desired.instances}:
            raise Broken(f"{box.instance} is started, and the file does not name it")
        for uuid in box.gpus:
            if uuid in self.foreign:
                raise Broken(f"{box.launch.name} is started beside a stranger")
            if self._lingering.get(uuid):
                raise Broken(f"{box.launch.name} is started before {uuid} was released")
        if reason:
            box.error = reason  # and a process leaves nothing behind
            raise RuntimeRefused(reason)
        self._run(box)
        if self.dies(box):
            self.kill(box, 1)

    def _run(self, box: Box) -> None:
        for other in self.boxes.values():
            if other is box or not (other.alive or other.flying):
                continue
            if other.gpus & box.gpus:
                raise Broken(f"{box.launch.name} is started beside {other.launch.name}")
            if {*other.launch.identity.ports.values()} & {*box.launch.identity.ports.values()}:
                raise Broken(f"{box.launch.name} is started on a port of {other.launch.name}")
        self.boxes[box.ref] = box
        box.state, box.pid, box.started_at = RunState.RUNNING, next(self._counter), self.now
        box.exit_code = box.error = None

    def _stop(self, step: Stop, reason: str | None) -> None:
        box = self.boxes.get(step.workload.ref)
        if box is not None and box.flying:
            self._land(box)
        if box is None or not box.alive:
            return
        if reason:
            raise StopFailed(reason)
        self.kill(box, 143)
        if box.launch.runtime == "systemd":
            self.boxes.pop(box.ref)  # a transient unit is collected once it was stopped

    def _remove(self, step: Remove, reason: str | None) -> None:
        box = self.boxes.get(step.workload.ref)
        if box is None:
            return
        if box.flying:
            self._land(box)
            raise RuntimeRefused("it still runs")
        if box.alive or box.launch.name != step.workload.name:
            raise Broken(f"{step.workload.name} is removed, and {box.launch.name} runs there")
        if reason:
            raise RuntimeRefused(reason)
        del self.boxes[box.ref]

    def _load(self, step: Load, reason: str | None) -> None:
        box = self.boxes.get(step.workload.ref)
        if reason or box is None or not box.alive:
            raise LoadFailed(reason or "no answer")
        box.loaded[step.placement.model] = (step.placement.digest, step.placement.summary)

    def _of(self, runtime: str) -> list[Box]:
        return [box for box in self.boxes.values() if box.launch.runtime == runtime]

    # --- settling -------------------------------------------------------------------------------

    def retry(self, instances: Collection[str]) -> None:
        """What `mic-supervisor retry` does."""
        self.memory = ledger.forgiven(self.memory, instances)

    def converge(self, chance: Random, rounds: int, pause: float = BOOT) -> int:
        """Rounds, with nothing failing any more, until nothing is left to do and everything
        serves. How many it took.

        Raises Broken when `rounds` are not enough.
        """
        for count in range(rounds):
            plan = self.round(chance)
            if plan.empty and all(item.serves for item in self._assessments.values()):
                return count
            wake = plan.next_wake - self.now if plan.next_wake is not None else pause
            self.pass_time(max(pause, wake))
            given_up = [i.instance for i in plan.blocked if "the last good one" in i.reason]
            if plan.count == 0 and given_up:
                self.retry(given_up)
        story = "\n".join(self.log[-60:])
        raise Broken(f"not settled after {rounds} rounds:\n{plan}\n{story}")


def _managed(box: Box) -> Owner:
    return Owner(OwnerKind.MANAGED, box.ref, box.instance)
