"""Who is on a GPU and is not ours, and when that is in somebody's way.

Whoever computes there is. Who only draws, as a desktop does, is none of the model's business while
it has little memory: `foreign_threshold` says how little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mic_supervisor.model import DesiredState, Gpu, GpuProcess, ObservedState, OwnerKind
from mic_supervisor.plan.assess import is_alive, workloads
from mic_supervisor.plan.words import moment, size

THRESHOLD = 512 << 20  # bytes, of who only draws on a GPU that is to be kept empty
SLACK = 512 << 20  # bytes; what is less is not worth a word

_COMPUTES = frozenset({"compute", "mps"})


@dataclass(frozen=True, slots=True)
class Intruder:
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
    if lets_go(process):
        return False
    owner = process.owner
    if owner is not None and owner.kind is OwnerKind.MANAGED:
        return owner.instance not in expected
    return True


def lets_go(process: GpuProcess) -> bool:
    """Whether it has ended, and the driver still has to notice."""
    owner = process.owner
    return process.start_time is None and owner is not None and owner.kind is OwnerKind.ORPHAN


def intruders(
    desired: DesiredState, observed: ObservedState, busy: Collection[str] = ()
) -> tuple[Intruder, ...]:
    """Strangers where they were not when it began, by GPU and PID.

    Nobody is called a stranger while a runtime cannot be read, since it may be that one's, nor on
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
    found: list[Intruder] = []
    for gpu in observed.inventory.gpus:
        instance = running.get(gpu.uuid)
        if gpu.uuid in passing or instance in busy:
            continue
        if instance is None and gpu.uuid not in desired.kept_empty:
            continue
        found += [
            Intruder(gpu, process, instance)
            for process in sorted(gpu.processes or (), key=lambda item: item.pid)
            if (process.owner is None or process.owner.kind is not OwnerKind.MANAGED)
            and is_foreign(process, (), thresholds.get(gpu.uuid, THRESHOLD))
        ]
    return tuple(found)


def sentence(intruder: Intruder, observed: ObservedState) -> str:
    """What a warning says of one that is there."""
    gpu, who = intruder.gpu, describe(intruder.process)
    whose = belongs(intruder.process, observed)
    tail = f": {whose}" if whose else ""
    if intruder.instance is None:
        return f"GPU {gpu.index} is to be kept empty, and {who} holds it{tail}"
    return f"GPU {gpu.index} is for {intruder.instance} alone, and {who} is on it as well{tail}"


def describe(process: GpuProcess) -> str:
    """ "PID 4121 (python, 18.2 GiB)" """
    used = "memory unknown" if process.used_memory is None else size(process.used_memory)
    return f"PID {process.pid} ({process.name or 'gone'}, {used})"


def belongs(process: GpuProcess, observed: ObservedState) -> str:
    """ "container jupyter, since 12:04:10": whose it is and since when, as far as is known."""
    owner = process.owner
    parts: list[str] = []
    if owner is not None and owner.kind is OwnerKind.MANAGED:
        parts.append(f"instance {owner.instance}")
    elif owner is not None and owner.kind is OwnerKind.CONTAINER and owner.ref:
        parts.append(f"container {_name(owner.ref, observed) or owner.ref[:12]}")
    elif owner is not None and owner.kind is OwnerKind.UNIT and owner.ref:
        parts.append(f"unit {owner.ref}")
    if process.started_at is not None:
        parts.append(f"since {moment(process.started_at, observed.at)}")
    return ", ".join(parts)


def memory_of(processes: Iterable[GpuProcess]) -> int:
    """Bytes that they have together, as far as the driver tells."""
    return sum(process.used_memory or 0 for process in processes)


def _name(ref: str, observed: ObservedState) -> str | None:
    for view in observed.runtimes:
        for stranger in view.strangers:
            if stranger.ref == ref:
                return stranger.name
    return None
