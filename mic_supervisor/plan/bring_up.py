"""How one instance that does not run is brought up: what to launch, where, and what is early."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mic_supervisor.model import Gpu, Launch, ObservedState, ObservedWorkload, RunState
from mic_supervisor.plan import ports as port_choice
from mic_supervisor.plan.actions import Blocked, ChangeKind, Create, Prepare, Restart, Start, Step
from mic_supervisor.plan.assess import Assessment, Context, is_alive
from mic_supervisor.plan.health import ended
from mic_supervisor.plan.launch import launch
from mic_supervisor.plan.memory import InstanceMemory
from mic_supervisor.plan.obstacles import Ports, in_the_way


@dataclass(frozen=True, slots=True)
class BringUp:
    """`early` runs while whatever must go still serves; `late` is the start itself.

    `stops` is the instance's own workload where it is alive but unhealthy.
    """

    kind: ChangeKind
    cause: str
    early: tuple[Step, ...]
    late: Step
    stops: ObservedWorkload | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a start has to fit into. `reserved` are ports that this plan gave away already."""

    observed: ObservedState
    gpus: Mapping[str, Gpu]
    ports: Ports
    reserved: Collection[int]
    leaving: Collection[str]  # instances that are on their way out


def bring_up(
    assessment: Assessment,
    entry: InstanceMemory,
    unhealthy: str | None,
    around: Surroundings,
    context: Context,
) -> BringUp | Blocked:
    """The way up, or what stands in it."""
    instance, match = assessment.instance, assessment.match
    numbers = _numbers(assessment, around, context)
    if numbers is None:
        first, last = context.port_range
        return blocked(
            assessment, f"no port is free from {first} to {last}", hint="widen MIC_PORT_RANGE"
        )
    indices = {uuid: gpu.index for uuid, gpu in around.gpus.items()}
    target = launch(assessment, numbers, indices, context)
    obstacle = in_the_way(
        instance, target, around.gpus, around.observed, around.ports, around.leaving
    )
    if obstacle is not None:
        return blocked(assessment, obstacle.reason, hint=obstacle.hint)
    kind, cause = _why(assessment, entry, unhealthy, context)
    stops = match if match is not None and is_alive(match) else None
    if assessment.runtime not in context.creates_ahead:
        prepare = Prepare(f"prepare {target.name}", instance.id, target)
        return BringUp(
            kind, cause, (prepare,), Start(f"start {target.name}", instance.id, target), stops
        )
    if match is not None and dict(match.identity.ports) == numbers:
        return BringUp(kind, cause, (), Restart(f"restart {match.name}", instance.id, match), stops)
    return _create(kind, cause, target, instance.id)


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


def _create(kind: ChangeKind, cause: str, target: Launch, instance: str) -> BringUp:
    prepare = Prepare(f"prepare {target.name}", instance, target)
    create = Create(f"create {target.name}", instance, target, depends_on=(prepare.id,))
    return BringUp(kind, cause, (prepare, create), Start(f"start {target.name}", instance, target))


def _numbers(
    assessment: Assessment, around: Surroundings, context: Context
) -> dict[str, int] | None:
    instance, match = assessment.instance, assessment.match
    if match is not None and is_alive(match):
        return dict(match.identity.ports)  # it holds them
    known = [match] if match is not None else []
    known += [*assessment.alive, *assessment.ended]
    recorded: Mapping[str, int] = known[0].identity.ports if known else {}
    return port_choice.choose(
        instance.id,
        instance.workload.ports,
        recorded=recorded,
        taken={*around.ports.taken(instance.id), *around.reserved},
        port_range=context.port_range,
    )


def _why(
    assessment: Assessment, entry: InstanceMemory, unhealthy: str | None, context: Context
) -> tuple[ChangeKind, str]:
    match = assessment.match
    if assessment.instance.id in context.forced:
        return "restart", "asked for"
    if unhealthy is not None:
        return "restart", unhealthy
    if match is not None and match.state is RunState.CREATED:
        if assessment.alive:
            return "replace", "its replacement was interrupted"
        return "start", "it was created and never started"
    if match is not None:
        return "start", ended(assessment)
    if assessment.alive:
        return "replace", _drift(assessment)
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
