"""What stands in the way of a start: foreign processes on GPUs, ports and names. And what is
amiss."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mic_supervisor.config.document import WAY_OUT
from mic_supervisor.model import (
    ContainerSpec,
    DesiredState,
    Gpu,
    GpuProcess,
    Instance,
    ObservedState,
    OwnerKind,
)
from mic_supervisor.plan.assess import is_alive, workloads
from mic_supervisor.plan.launch import near_of
from mic_supervisor.plan.situation import Situation
from mic_supervisor.plan.spec import keys_of
from mic_supervisor.plan.words import Code, Reason, because, gpus_down, moment, size
from mic_supervisor.text import one_line, printable


def in_the_way(
    s: Situation, instance: Instance, runtime: str, name: str, numbers: Collection[int]
) -> Reason | None:
    """The first thing that keeps a workload called `name` from starting, or None.

    What is known to run of ours is no obstacle: the start comes after its end, or is blocked by it.
    """
    for view in s.observed.runtimes:
        if view.runtime == runtime and view.off is not None:
            return because(Code.RUNTIME_OFF, off=view.off, hint=view.hint)
        asks = isinstance(instance.workload, ContainerSpec) and instance.workload.devices
        if view.runtime == runtime and view.ignores_gpus is not None and asks:
            return because(Code.GPUS_IGNORED, engine=view.ignores_gpus)
    for number in sorted(numbers):
        who = s.ports.foreign(number, instance.workload.listen)
        holders = s.instances_by_port.get(number, ())
        if who is not None:
            who = f"{who}, not ours"
        elif min(holders, default=instance.id) < instance.id:
            who = min(holders)
        if who is not None:
            return because(Code.PORT_TAKEN, port=number, who=who, model=instance.model)
    for view in s.observed.runtimes:
        for foreign in view.foreign_workloads:
            if view.runtime == runtime and foreign.name == name:
                hint = f"rename or remove it: docker rm {name}" if runtime == "docker" else None
                return because(Code.NAME_TAKEN, name=name, foreign=foreign.reason, hint=hint)
    return _too_small(s, instance) or _foreign(s, instance)


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
            "gpu": gpu.number,
            "name": gpu.name,
        }
        if instance.vram > total:
            return because(Code.GPU_TOO_SMALL, **facts, total=size(total), model=instance.model)
        others = [process for process in gpu.processes or () if not process.managed]
        taken = memory_of(process for process in others if not has_exited(process))
        if taken and instance.vram > total - taken:
            who = ", ".join(describe(process) for process in others if process.used_memory)
            waits = instance.on_foreign == "wait"
            return because(
                Code.GPU_TOO_FULL, **facts, free=size(total - taken), who=who, queued=waits
            )
    return None


def _foreign(s: Situation, instance: Instance) -> Reason | None:
    for gpu in (s.gpus[uuid] for uuid in instance.gpus):
        if gpu.simulated:
            continue
        if gpu.processes is None and gpu.unlisted is None:
            return because(Code.HOLDERS_UNREADABLE, gpu=gpu.number)
        if instance.on_foreign == "ignore":
            continue
        if gpu.processes is None:
            untold = gpu.unlisted == "untold"
            code = Code.HOLDERS_UNTOLD if untold else Code.HOLDERS_IMPLAUSIBLE
            return because(code, gpu=gpu.number, model=instance.model)
        expected = {instance.id, *s.on_gpu(gpu.uuid)}
        for process in sorted(gpu.processes, key=lambda item: item.pid):
            if is_foreign(process, expected, instance.foreign_threshold):
                waits = instance.on_foreign == "wait"
                return because(
                    Code.WAITS_FOR_STRANGER if waits else Code.STRANGER,
                    gpu=gpu.number,
                    who=describe(process),
                    whose=_whose(process, s.observed),
                )
    return None


def in_trouble(gpu: Gpu) -> Reason:
    """Nothing is started on a GPU that is in trouble: it would fail, again and again."""
    facts = {"gpu": gpu.number, "index": gpu.index, "trouble": gpu.trouble}
    return because(Code.GPU_UNHEALTHY, **facts)


def warnings(s: Situation) -> tuple[str, ...]:
    """What an operator should know and no plan changes. Another scope's workloads concern nobody
    here."""
    out = [s.context.hook_error] if s.context.hook_error is not None and s.desired.hook else []
    out += [s.memory.lost] if s.memory.lost is not None else []
    out += [f"{s.drained}; to end that: {s.drained.hint}"] if s.drained is not None else []
    unreadable = {view.runtime for view in s.observed.runtimes if view.error is not None}
    out += [text for what, text in sorted(s.context.amiss.items()) if what not in unreadable]
    if s.context.unconfirmed is not None:
        out.append(f"{s.context.unconfirmed}: {WAY_OUT}")
    found = [*s.desired.warnings]
    found += [f"GPU {gpu.index}: {gpu.error_line}" for gpu in s.observed.inventory.unopened]
    found += [
        sentence(one, s.observed)
        for one in foreign_processes(s.desired, s.observed, s.context.busy)
    ]
    found += [*_of_gpus(s), *_unconfined(s)]
    for view in s.observed.runtimes:
        found += [
            f"{view.runtime} {foreign.name} looks like ours and is not: {foreign.reason}"
            for foreign in view.foreign_workloads
            if foreign.claims is not None
            or (foreign.name.startswith(f"mic-{s.context.scope}-") and not foreign.elsewhere)
        ]
    out += sorted(found)
    if s.observed.inventory.error_line is not None:
        out.append(gpus_down(s.observed.inventory.error_line))
    return tuple(map(one_line, (*out, *_on_trust(s), *_left_behind(s))))


def _unconfined(s: Situation) -> Iterable[str]:
    """Who is to run next to its GPUs, and nobody says where that is."""
    if s.observed.inventory.error is not None:
        return
    for one in s.desired.instances:
        limits = one.workload.limits
        if limits.numa is not None and near_of(limits, one.gpus, s.gpus) is None:
            yield (
                f"{one.id}: limits.numa has no effect: the driver does not say which CPUs are "
                "next to its GPUs"
            )


def _of_gpus(s: Situation) -> Iterable[str]:
    """What is amiss with GPUs that the file names, or that something of ours runs on."""
    named = {uuid: item.id for item in s.desired.instances for uuid in item.gpus}
    for gpu in s.observed.inventory.gpus:
        if gpu.uuid not in named and gpu.uuid not in s.desired.kept_empty:
            continue
        if gpu.trouble is not None:
            yield str(in_trouble(gpu))
        errors = dict(gpu.telemetry.ecc_errors) if gpu.telemetry is not None else {}
        if count := errors.get("uncorrected"):
            yield (
                f"GPU {gpu.number} has had {count} uncorrected memory error{'s'[: count > 1]} "
                "since the driver was loaded"
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
                process for process in gpu.processes or () if process.instance == instance
            )
            if count > SLACK:
                yield (
                    f"GPU {gpu.number}: {instance} still holds {size(count)} there although "
                    f"nothing is placed on it; only a restart releases it: mic-supervisor restart "
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


# --- strangers on GPUs --------------------------------------------------------------------------
#
# Whoever computes there is one. Who only draws, as a desktop does, is none of the model's business
# while it has little memory: `foreign_threshold` says how little.

THRESHOLD = 512 << 20  # bytes, of who only draws on a GPU that is to be kept empty
SLACK = 512 << 20  # bytes; what is less is not worth a word

_COMPUTES = frozenset({"compute", "mps"})


@dataclass(frozen=True, slots=True)
class ForeignProcess:
    """A stranger on a GPU where one of ours runs, or that is to be kept empty (`instance` None)."""

    gpu: Gpu
    process: GpuProcess
    instance: str | None

    @property
    def key(self) -> tuple[str, int, int | None]:
        """What it is known by from one look to the next."""
        return self.gpu.uuid, self.process.pid, self.process.start_time


def is_foreign(process: GpuProcess, expected: Collection[str], threshold: int) -> bool:
    """Whether it is in the way of the instances that are `expected` on its GPU."""
    draws = bool(process.kinds) and not _COMPUTES & set(process.kinds)
    # What a desktop has is not always told; then it is taken for one.
    if draws and (process.used_memory is None or process.used_memory < threshold):
        return False
    if has_exited(process):
        return False
    return process.instance not in expected


def has_exited(process: GpuProcess) -> bool:
    """Whether it has ended, and the driver still has to notice."""
    owner = process.owner
    return process.start_time is None and owner is not None and owner.kind is OwnerKind.ORPHAN


def foreign_processes(
    desired: DesiredState, observed: ObservedState, busy: Collection[str] = ()
) -> tuple[ForeignProcess, ...]:
    """Foreign processes that were not there when it began, by GPU and PID.

    No process is called foreign while a runtime cannot be read, since it may be that one's, nor on
    the GPU of an instance that is `busy`: its processes may be newer than what its runtime told.
    """
    if any(view.error is not None for view in observed.runtimes):
        return ()
    running: dict[str, str] = {}
    for workload in workloads(observed):
        if is_alive(workload):
            running.update(dict.fromkeys(workload.identity.gpus, workload.identity.instance))
    thresholds = {
        uuid: instance.foreign_threshold for instance in desired.instances for uuid in instance.gpus
    }
    passing = {uuid for item in desired.instances if item.id in busy for uuid in item.gpus}
    found: list[ForeignProcess] = []
    for gpu in observed.inventory.gpus:
        instance = running.get(gpu.uuid)
        if gpu.uuid in passing or instance in busy:
            continue
        if instance is None and gpu.uuid not in desired.kept_empty:
            continue
        found += [
            ForeignProcess(gpu, process, instance)
            for process in sorted(gpu.processes or (), key=lambda item: item.pid)
            if process.instance is None
            and is_foreign(process, (), thresholds.get(gpu.uuid, THRESHOLD))
        ]
    return tuple(found)


def sentence(foreign: ForeignProcess, observed: ObservedState) -> str:
    """What a warning says of one that is there."""
    gpu, who = foreign.gpu, describe(foreign.process)
    tail = _whose(foreign.process, observed)
    if foreign.instance is None:
        return f"GPU {gpu.number} should be empty, but {who} holds it{tail}"
    return f"GPU {gpu.number} is for {foreign.instance} alone, and {who} is on it as well{tail}"


def describe(process: GpuProcess) -> str:
    """ "PID 4121 (python, 18.2 GiB)" """
    used = "memory unknown" if process.used_memory is None else size(process.used_memory)
    return f"PID {process.pid} ({printable(process.name or 'gone')}, {used})"


def _whose(process: GpuProcess, observed: ObservedState) -> str:
    """ ": container jupyter, since 12:04:10": whose it is and since when, as far as is known."""
    owner = process.owner
    parts: list[str] = []
    if owner is not None and owner.kind is OwnerKind.MANAGED:
        parts.append(f"instance {owner.instance}")
    elif owner is not None and owner.kind is OwnerKind.CONTAINER and owner.ref:
        foreign_workloads = (
            foreign for view in observed.runtimes for foreign in view.foreign_workloads
        )
        names = (foreign.name for foreign in foreign_workloads if foreign.ref == owner.ref)
        parts.append(f"container {next(names, None) or owner.ref[:12]}")
    elif owner is not None and owner.kind is OwnerKind.UNIT and owner.ref:
        parts.append(f"unit {owner.ref}")
    if process.started_at is not None:
        parts.append(f"since {moment(process.started_at, observed.at)}")
    return f": {', '.join(parts)}" if parts else ""


def memory_of(processes: Iterable[GpuProcess]) -> int:
    """Bytes that they have together, as far as the driver tells."""
    return sum(process.used_memory or 0 for process in processes)
