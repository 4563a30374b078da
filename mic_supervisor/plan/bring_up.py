"""How one instance that does not run is brought up: what to launch, where, and what is early."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mic_supervisor.model import Gpu, Launch, ObservedWorkload, RunState
from mic_supervisor.plan.actions import (
    Blocked,
    ChangeKind,
    Create,
    Prepare,
    Remove,
    Restart,
    Start,
    Step,
)
from mic_supervisor.plan.assess import Assessment, Context, is_alive
from mic_supervisor.plan.health import ended
from mic_supervisor.plan.launch import launch
from mic_supervisor.plan.loads import loads
from mic_supervisor.plan.memory import InstanceMemory
from mic_supervisor.plan.obstacles import Obstacle, Surroundings, in_the_way
from mic_supervisor.plan.rebuild import rebuilt, relaunch

RETRY = "change the file, or: mic-supervisor retry"


@dataclass(frozen=True, slots=True)
class BringUp:
    """`early` runs while whatever must go still serves; `late` is the start itself.

    `stops` is the instance's own workload where it is alive but unhealthy. `again` is set where it
    is to be made anew under the same name, so only once it is gone.
    """

    kind: ChangeKind
    cause: str
    early: tuple[Step, ...]
    late: Start | Restart
    stops: ObservedWorkload | None = None
    again: Create | None = None

    @property
    def target(self) -> str:
        """The name of the workload that will run."""
        return self.late.launch.name if isinstance(self.late, Start) else self.late.workload.name


def bring_up(
    assessment: Assessment,
    entry: InstanceMemory,
    unhealthy: str | None,
    around: Surroundings,
    context: Context,
    blind: str | None = None,
) -> BringUp | Blocked:
    """The way up, or what stands in it. `blind`: it must be made anew, and that is why."""
    instance, match = assessment.instance, assessment.match
    numbers = around.numbers[instance.id]
    if numbers is None:
        first, last = context.port_range
        return blocked(
            assessment, f"no port is free from {first} to {last}", hint="widen MIC_PORT_RANGE"
        )
    indices = {uuid: gpu.index for uuid, gpu in around.gpus.items()}
    try:
        target = launch(assessment, numbers, indices, context)
    except KeyError as error:
        return blocked(assessment, f"its texts refer to {error}, which it does not have")
    obstacle = in_the_way(instance, target.runtime, target.name, numbers.values(), around)
    if obstacle is not None:
        return blocked(assessment, obstacle.reason, hint=obstacle.hint, queued=obstacle.queued)
    kind, cause = _why(assessment, entry, unhealthy, context)
    stops = match if match is not None and is_alive(match) else None
    if assessment.runtime not in context.creates_ahead:
        start = Start(f"start {target.name}", instance.id, target)
        return BringUp(kind, cause, (_prepare(target, instance.id),), start, stops)
    if blind is not None:
        prepare = _prepare(target, instance.id)
        create = Create(f"create {target.name}", instance.id, target)
        start = Start(f"start {target.name}", instance.id, target)
        return BringUp("replace", blind, (prepare,), start, stops, again=create)
    again = [match] if match is not None and dict(match.identity.ports) == numbers else []
    # The name tells specification and ports: what has it already is what would be created.
    again += [workload for workload in assessment.ended if workload.name == target.name]
    if again:
        restart = Restart(f"restart {again[0].name}", instance.id, again[0])
        # Only where something serves meanwhile: what is down loses nothing by a failing start.
        early = (_prepare(target, instance.id),) if assessment.alive else ()
        return BringUp(kind, cause, early, restart, stops)
    return _create(kind, cause, target, instance.id)


def cleared(up: BringUp, item: Assessment) -> BringUp:
    """`up`, after what was created for the instance and is not what it starts is gone.

    A start of it may be in flight, from a supervisor that was killed: it must not come to its end
    beside another one. A remove waits for it, and then fails, before anything was stopped.
    """
    early = [*up.early]
    for workload in (item.match, *item.ended):
        if workload is None or workload.state is not RunState.CREATED:
            continue
        if workload.name != up.target:
            after = tuple(step.id for step in early[-1:])
            early.append(
                Remove(f"remove {workload.name}", item.instance.id, workload, depends_on=after)
            )
    return replace(up, early=tuple(early))


def fall_back(
    good: Assessment, entry: InstanceMemory, around: Surroundings, now: float
) -> tuple[BringUp | None, Blocked]:
    """What is due for what was rolled back to, see plan/fallback.py, and why no more than that."""
    failed = f"the new specification failed ({entry.failed_reason})"
    told = blocked(good, f"{failed}; the last good one runs", hint=RETRY)
    unhealthy = good.live_failure or good.overdue(entry.started_at, now)
    patient = entry.retry_at is not None and entry.retry_at > now
    if good.runs and unhealthy is None and not (patient and loads(good)):
        return None, told
    if patient:
        again = "cannot be loaded again" if good.runs and unhealthy is None else "failed as well"
        reason = f"{failed}; the last good one {again}; backoff: {entry.reason}"
        return None, blocked(good, reason, hint=RETRY, until=entry.retry_at)
    up = _take_over(good, unhealthy, entry, around)
    if isinstance(up, BringUp):
        return up, told
    reason = f"{failed}; the last good one is to take over; {up.reason}"
    return None, blocked(good, reason, hint=up.hint or RETRY)


def _take_over(
    good: Assessment, unhealthy: str | None, entry: InstanceMemory, around: Surroundings
) -> BringUp | Obstacle:
    """The way back to the last good specification, or what stands in it."""
    instance, back, record = good.instance, good.match, entry.ready_record
    lost = [uuid for uuid in instance.gpus if uuid not in around.gpus]
    if lost:
        return Obstacle(f"{', '.join(lost)} is not there")
    early: tuple[Step, ...] = ()
    late: Start | Restart
    spec = rebuilt(record, good)
    if spec is not None and record is not None:
        target = relaunch(record, spec, {uuid: gpu.index for uuid, gpu in around.gpus.items()})
        name, numbers = target.name, target.identity.ports.values()
        early = (_prepare(target, instance.id),)
        late = Start(f"start {name}", instance.id, target)
    else:
        assert back is not None  # it is what was rolled back to
        name, numbers = back.name, back.identity.ports.values()
        late = Restart(f"restart {name}", instance.id, back)
    obstacle = in_the_way(instance, good.runtime, name, numbers, around)
    if obstacle is not None:
        return obstacle
    if unhealthy is not None:
        return BringUp("restart", f"rolled back, and {unhealthy}", early, late, back)
    return BringUp("start", f"rollback: {entry.failed_reason}", early, late)


def unhealthy_gpu(assessment: Assessment, gpu: Gpu) -> Blocked:
    """Nothing is started on a GPU that is in trouble: it would fail, again and again."""
    return blocked(
        assessment,
        f"GPU {gpu.index} is unhealthy: {gpu.trouble}",
        hint=f"stop what uses it, then: nvidia-smi --gpu-reset -i {gpu.index}; or reboot",
    )


def blocked(
    assessment: Assessment,
    reason: str,
    *,
    hint: str | None = None,
    until: float | None = None,
    queued: bool = False,
) -> Blocked:
    instance = assessment.instance
    return Blocked(instance.id, reason, instance.gpus, instance.model, hint, until, queued=queued)


def host_ports(step: Step) -> set[int]:
    """The ports that a step gives to its instance."""
    if isinstance(step, Start):
        return set(step.launch.identity.ports.values())
    if isinstance(step, Restart):
        return set(step.workload.identity.ports.values())
    return set()


def _prepare(target: Launch, instance: str) -> Prepare:
    return Prepare(f"prepare {target.name}", instance, target)


def _create(kind: ChangeKind, cause: str, target: Launch, instance: str) -> BringUp:
    prepare = _prepare(target, instance)
    create = Create(f"create {target.name}", instance, target, depends_on=(prepare.id,))
    return BringUp(kind, cause, (prepare, create), Start(f"start {target.name}", instance, target))


def _why(
    assessment: Assessment, entry: InstanceMemory, unhealthy: str | None, context: Context
) -> tuple[ChangeKind, str]:
    match = assessment.match
    if unhealthy is not None:
        return "restart", unhealthy
    if assessment.runs and assessment.instance.id in context.forced:
        return "restart", "asked for"
    if assessment.alive:
        if match is not None and match.state is RunState.CREATED:
            return "replace", "its replacement was interrupted"
        return "replace", _drift(assessment)
    if match is not None and match.state is RunState.CREATED:
        return "start", "it was created and never started"
    if match is not None:
        return "start", ended(match)
    if assessment.diff:
        return "create", f"{_drift(assessment)}, and the earlier one does not run"
    if entry.ready is not None:
        return "create", "it is missing: its workload was removed"
    return "create", "nothing runs for it yet"


def _drift(assessment: Assessment) -> str:
    paths = [diff.path for diff in assessment.diff]
    models = [placement.model for placement in assessment.instance.placements]
    # What is in a server that is replaced is gone until the new one has it loaded.
    down = f"; {' and '.join(models)} go down with it" if len(models) > 1 else ""
    if paths == ["gpus"]:
        return f"its set of GPUs changed{down}"
    shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return f"its specification changed: {shown}{down}"
