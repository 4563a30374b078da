"""What stands in the way of a start: strangers on GPUs, ports and names."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mic_supervisor.config.document import WAY_OUT
from mic_supervisor.model import Instance, OwnerKind
from mic_supervisor.plan.situation import Situation
from mic_supervisor.plan.spec import keys_of
from mic_supervisor.plan.strangers import (
    SLACK,
    belongs,
    describe,
    intruders,
    is_foreign,
    lets_go,
    memory_of,
    sentence,
)
from mic_supervisor.plan.words import Code, Reason, because, gpus_down, size


def in_the_way(
    s: Situation,
    instance: Instance,
    runtime: str,
    name: str,
    numbers: Collection[int],
) -> Reason | None:
    """The first thing that keeps a workload called `name` from starting, or None.

    What is known to run of ours is no obstacle: the start comes after its end, or is blocked by it.
    """
    for view in s.observed.runtimes:
        if view.runtime == runtime and view.off is not None:
            return because(Code.RUNTIME_OFF, off=view.off, hint=view.hint)
    for number in sorted(numbers):
        who = s.ports.stranger(number)
        holders = [id_ for id_, held in s.numbers.items() if number in (held or {}).values()]
        if who is not None:
            who = f"{who}, not ours"
        elif min(holders, default=instance.id) < instance.id:
            who = min(holders)
        if who is not None:
            return because(Code.PORT_TAKEN, port=number, who=who, model=instance.model)
    for view in s.observed.runtimes:
        for stranger in view.strangers:
            if view.runtime == runtime and stranger.name == name:
                hint = f"rename or remove it: docker rm {name}" if runtime == "docker" else None
                return because(Code.NAME_TAKEN, name=name, stranger=stranger.reason, hint=hint)
    return _too_small(s, instance) or _strangers(s, instance)


def _too_small(s: Situation, instance: Instance) -> Reason | None:
    """Where the card cannot hold what the model says it needs, whoever leaves it."""
    if instance.vram is None:
        return None
    for gpu in (s.gpus[uuid] for uuid in instance.gpus):
        if gpu.memory is None:
            continue
        total = gpu.memory.total
        facts = {
            "vram": size(instance.vram) + (" on each GPU" if len(instance.gpus) > 1 else ""),
            "gpu": gpu.index,
            "name": gpu.name,
        }
        if instance.vram > total:
            return because(Code.GPU_TOO_SMALL, **facts, total=size(total), model=instance.model)
        others = [
            process
            for process in gpu.processes or ()
            if process.owner is None or process.owner.kind is not OwnerKind.MANAGED
        ]
        taken = memory_of(process for process in others if not lets_go(process))
        if taken and instance.vram > total - taken:
            who = ", ".join(describe(process) for process in others if process.used_memory)
            waits = instance.on_foreign == "wait"
            return because(
                Code.GPU_TOO_FULL, **facts, free=size(total - taken), who=who, queued=waits
            )
    return None


def _strangers(s: Situation, instance: Instance) -> Reason | None:
    for gpu in (s.gpus[uuid] for uuid in instance.gpus):
        if gpu.simulated:
            continue
        if gpu.processes is None and gpu.unlisted is None:
            return because(Code.HOLDERS_UNREADABLE, gpu=gpu.index)
        if instance.on_foreign == "ignore":
            continue
        if gpu.processes is None:
            untold = gpu.unlisted == "untold"
            code = Code.HOLDERS_UNTOLD if untold else Code.HOLDERS_IMPLAUSIBLE
            return because(code, gpu=gpu.index, model=instance.model)
        expected = {instance.id, *s.on_gpu(gpu.uuid)}
        for process in sorted(gpu.processes, key=lambda item: item.pid):
            if is_foreign(process, expected, instance.foreign_threshold):
                waits = instance.on_foreign == "wait"
                whose = belongs(process, s.observed)
                return because(
                    Code.WAITS_FOR_STRANGER if waits else Code.STRANGER,
                    gpu=gpu.index,
                    who=describe(process),
                    whose=f": {whose}" if whose else "",
                )
    return None


def warnings(s: Situation) -> tuple[str, ...]:
    """What an operator should know and no plan changes. Another scope's workloads are no news."""
    out = [s.context.hook_error] if s.context.hook_error is not None and s.desired.hook else []
    out += [s.memory.lost] if s.memory.lost is not None else []
    if s.context.unconfirmed is not None:
        out.append(f"{s.context.unconfirmed}: {WAY_OUT}")
    found = [*s.desired.warnings]
    found += [
        f"GPU {gpu.index} cannot be opened: {gpu.told}" for gpu in s.observed.inventory.unopened
    ]
    found += [sentence(one, s.observed) for one in intruders(s.desired, s.observed, s.context.busy)]
    found += _of_gpus(s)
    for view in s.observed.runtimes:
        found += [
            f"{view.runtime} {stranger.name} looks like ours and is not: {stranger.reason}"
            for stranger in view.strangers
            if stranger.claims is not None
            or (stranger.name.startswith(f"mic-{s.context.scope}-") and not stranger.elsewhere)
        ]
    out += sorted(found)
    if s.observed.inventory.told is not None:
        out.append(gpus_down(s.observed.inventory.told))
    return (*out, *_on_trust(s), *_left_behind(s))


def _of_gpus(s: Situation) -> Iterable[str]:
    """What is amiss with GPUs that the file names, or that something of ours runs on."""
    named = {uuid: item.id for item in s.desired.instances for uuid in item.gpus}
    for gpu in s.observed.inventory.gpus:
        if gpu.uuid not in named and gpu.uuid not in s.desired.kept_empty:
            continue
        if gpu.trouble is not None:
            yield str(because(Code.GPU_UNHEALTHY, gpu=gpu.index, trouble=gpu.trouble))
        if gpu.mig and gpu.uuid in named:
            yield (
                f"GPU {gpu.index} has MIG on, which is reported and not managed: "
                f"{named[gpu.uuid]} gets the whole GPU, or nothing of it"
            )
        errors = dict(gpu.telemetry.ecc_errors) if gpu.telemetry is not None else {}
        if count := errors.get("uncorrected"):
            yield (
                f"GPU {gpu.index} has had {count} uncorrected memory error{'s'[: count > 1]} since "
                "the driver was loaded"
            )


def _left_behind(s: Situation) -> Iterable[str]:
    """Memory that a server keeps on GPUs where nothing is placed any more: an unload need not give
    it back, only the end of the process does.
    """
    for item in s.assessments:
        instance = item.instance.id
        if not item.instance.shared or not item.runs:
            continue
        for uuid in item.instance.gpus:
            gpu = s.gpus.get(uuid)
            if gpu is None or uuid in item.placed_gpus:
                continue
            count = memory_of(
                process
                for process in gpu.processes or ()
                if process.owner is not None and process.owner.instance == instance
            )
            if count > SLACK:
                yield (
                    f"GPU {gpu.index}: {instance} still holds {size(count)} there although nothing "
                    f"is placed on it; only its end gives that back: mic-supervisor restart "
                    f"{instance}"
                )


def _on_trust(s: Situation) -> Iterable[str]:
    """Where what a workload was started with cannot be compared in full."""
    for item in s.assessments:
        if item.match is None or not item.runs:
            continue
        spec = item.match.identity.spec
        if spec is None:
            yield (
                f"{item.match.name}: the record of its specification cannot be read, so whether it "
                "is what the file asks for is unknown"
            )
        elif keys_of(spec) - {s.context.key.id}:
            yield (
                f"{item.match.name}: its secrets were recorded with another key, so whether they "
                "changed is unknown"
            )
