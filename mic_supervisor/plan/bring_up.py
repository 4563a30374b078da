"""How one instance that does not run is brought up: what to launch, where, and what is early."""

from __future__ import annotations

from mic_supervisor.model import Launch, ObservedWorkload, RunState
from mic_supervisor.plan.actions import Blocked, ChangeKind, Create, Prepare, Restart, Start, Step
from mic_supervisor.plan.assess import Assessment, Context, is_alive
from mic_supervisor.plan.health import ended
from mic_supervisor.plan.launch import launch
from mic_supervisor.plan.memory import InstanceMemory
from mic_supervisor.plan.obstacles import Surroundings, in_the_way
from mic_supervisor.records import dataclass


@dataclass(frozen=True, slots=True)
class BringUp:
    """`early` runs while whatever must go still serves; `late` is the start itself.

    `stops` is the instance's own workload where it is alive but unhealthy.
    """

    kind: ChangeKind
    cause: str
    early: tuple[Step, ...]
    late: Start | Restart
    stops: ObservedWorkload | None = None

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
) -> BringUp | Blocked:
    """The way up, or what stands in it."""
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
        return blocked(assessment, obstacle.reason, hint=obstacle.hint)
    kind, cause = _why(assessment, entry, unhealthy, context)
    stops = match if match is not None and is_alive(match) else None
    if assessment.runtime not in context.creates_ahead:
        start = Start(f"start {target.name}", instance.id, target)
        return BringUp(kind, cause, (_prepare(target, instance.id),), start, stops)
    again = [match] if match is not None and dict(match.identity.ports) == numbers else []
    # The name tells specification and ports: what has it already is what would be created.
    again += [workload for workload in assessment.ended if workload.name == target.name]
    if again:
        restart = Restart(f"restart {again[0].name}", instance.id, again[0])
        # Only where something serves meanwhile: what is down loses nothing by a failing start.
        early = (_prepare(target, instance.id),) if assessment.alive else ()
        return BringUp(kind, cause, early, restart, stops)
    return _create(kind, cause, target, instance.id)


def take_over(
    assessment: Assessment, back: ObservedWorkload, entry: InstanceMemory, around: Surroundings
) -> BringUp | Blocked:
    """The way back to the last good specification, or what stands in it."""
    instance, numbers = assessment.instance, back.identity.ports.values()
    obstacle = in_the_way(instance, back.runtime, back.name, numbers, around)
    if obstacle is not None:
        return blocked(assessment, f"{rolled_back(entry)}; {obstacle.reason}", hint=obstacle.hint)
    restart = Restart(f"restart {back.name}", instance.id, back)
    return BringUp("start", f"rollback: {entry.failed_reason}", (), restart)


def rolled_back(entry: InstanceMemory) -> str:
    return f"the new specification failed ({entry.failed_reason}); the last good one runs"


def blocked(
    assessment: Assessment, reason: str, *, hint: str | None = None, until: float | None = None
) -> Blocked:
    instance = assessment.instance
    return Blocked(instance.id, reason, instance.gpus, instance.model, hint, until)


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
    if paths == ["gpus"]:
        return "its set of GPUs changed"
    shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return f"its specification changed: {shown}"
