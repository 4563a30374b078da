"""When a GPU that somebody had is free again: first of processes, then of memory.

A process that has ended stays in the driver's list for a while, and what it had allocated may stay
longer. A model that is started into that fails in ways that nobody understands. So a start waits:

1. Until the driver lists none of the former processes, nor any that are gone.
2. Then, at most `TIMEOUT`, until memory is back at the floor: what was used before the former
   owner started, and `SLACK`. What known foreign processes have taken since is theirs, and is not
   waited for. Where no floor is known, `UNKNOWN_FLOOR` beside them counts as free.
3. Then it starts with a warning, if the rest that nobody is listed for leaves room for what the
   model says it needs; else it does not start.

Memory that cannot be read says nothing: the processes alone decide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mic_supervisor.model import Gpu, GpuInventory, GpuProcess
from mic_supervisor.plan.memory import Floor
from mic_supervisor.plan.obstacles import SLACK, memory_of
from mic_supervisor.plan.words import size

TIMEOUT = 30.0  # seconds for each of the two
UNKNOWN_FLOOR = 1 << 30  # bytes


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not yet. `for_memory`: the processes are gone, and only their memory is not."""

    reason: str
    for_memory: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """Not at all, for now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """It may start. `floors` are what is used now, by GPU, where that is known."""

    floors: Mapping[str, Floor]
    warning: str | None = None


def check_release(
    gpus: Collection[str],
    floors: Mapping[str, Floor],
    vram: int | None,
    inventory: GpuInventory,
    waited: float,
    waited_for_memory: float | None,
) -> Waiting | Refused | Released:
    """Whether these GPUs are free, in an inventory whose owners are known.

    A process of ours on them is a former owner's. `waited_for_memory` is how long the processes
    have been gone, None while they were not.
    """
    if inventory.error is not None:
        return _late(f"waiting for the GPUs to be readable: {inventory.error_line}", waited)
    found = {gpu.uuid: gpu for gpu in inventory.gpus}
    there = [found[uuid] for uuid in gpus if uuid in found]
    if len(there) < len(gpus):
        missing = ", ".join(uuid for uuid in gpus if uuid not in found)
        return _late(f"waiting for {missing} to be there", waited)
    held: list[int] = []
    for gpu in there:
        if gpu.processes is None and gpu.unlisted is None:
            return _late(f"waiting for the processes on GPU {gpu.number} to be readable", waited)
        # Where nobody is ever listed, what the memory says decides alone.
        held += [process.pid for process in gpu.processes or () if _former(process)]
    if held:
        listed = ", ".join(map(str, sorted(set(held))))
        return _late(f"waiting for the GPU to be released by PID {listed}", waited)
    lingering = [(gpu, excess) for gpu in there if (excess := _excess(gpu, floors)) > 0]
    released = {gpu.uuid: floor for gpu in there if (floor := floor_of(gpu)) is not None}
    if not lingering:
        return Released(released)
    what = " and ".join(f"{size(excess)} to be released on GPU {gpu.number}"
                        for gpu, excess in lingering)  # fmt: skip
    if waited_for_memory is None or waited_for_memory < TIMEOUT:
        return Waiting(f"waiting for {what}", for_memory=True)
    for gpu, _ in lingering:
        free = free_of(gpu)
        if vram is not None and free is not None and free < vram:
            return Refused(
                f"after {TIMEOUT:g} s GPU {gpu.number} has {size(free)} free of the {size(vram)} "
                "that it needs, and the driver lists nobody who has the rest"
            )
    return Released(
        released,
        f"after {TIMEOUT:g} s still {what}, for which the driver lists nobody; starting anyway",
    )


def floor_of(gpu: Gpu) -> Floor | None:
    """What is used on a GPU now; None where the driver does not tell."""
    if gpu.memory is None or gpu.memory.used is None:
        return None
    foreign_workloads = memory_of(one for one in gpu.processes or () if not one.managed)
    return Floor(gpu.memory.used, foreign_workloads)


def free_of(gpu: Gpu) -> int | None:
    memory = gpu.memory
    if memory is None:
        return None
    if memory.free is not None:
        return memory.free
    return None if memory.used is None else memory.total - memory.used


def _late(reason: str, waited: float) -> Waiting | Refused:
    if waited < TIMEOUT:
        return Waiting(reason)
    return Refused(f"after {TIMEOUT:g} s still {reason}")


def _former(process: GpuProcess) -> bool:
    # A PID that is gone from /proc and still listed is the driver, letting go.
    return process.start_time is None or process.managed


def _excess(gpu: Gpu, floors: Mapping[str, Floor]) -> int:
    """Bytes that are used and should not be; 0 where that is not known."""
    now = floor_of(gpu)
    if now is None:
        return 0
    floor = floors.get(gpu.uuid)
    if floor is None:
        return max(now.used - now.strangers - UNKNOWN_FLOOR, 0)
    grown = max(now.strangers - floor.strangers, 0)
    return max(now.used - grown - floor.used - SLACK, 0)
