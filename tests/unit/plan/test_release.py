"""When a GPU that somebody had is free: whole verdicts, and what is remembered for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor.model import (
    Gpu,
    GpuInventory,
    GpuMemory,
    GpuProcess,
    Owner,
    OwnerKind,
    RunState,
    Unlisted,
)
from mic_supervisor.plan.actions import Release
from mic_supervisor.plan.memory import Floor, Memory
from mic_supervisor.plan.release import Refused, Released, Waiting, check_release, floor_of
from mic_supervisor.plan.words import size
from tests.unit.plan.builders import (
    MAM,
    gpu,
    known,
    observed,
    plan_for,
    process,
    reread,
    uuid,
    workload,
)

GIB = 1 << 30
TOTAL = 24 * GIB
GONE = process(4121, start_time=None)


def used(count: int, *processes: GpuProcess, index: int = 0, **values: Any) -> Gpu:
    memory = GpuMemory(TOTAL, count, TOTAL - count)
    return gpu(index, memory=memory, processes=processes, **values)


def has(pid: int, count: int | None, **values: Any) -> GpuProcess:
    return replace(process(pid, **values), used_memory=count)


def verdict(
    *gpus: Gpu,
    floor: Floor | None = None,
    vram: int | None = None,
    waited: float = 1.0,
    for_memory: float | None = 1.0,
    error: str | None = None,
) -> Waiting | Refused | Released:
    floors = {} if floor is None else {uuid(0): floor}
    inventory = GpuInventory("nvml", gpus, error=error)
    wanted = [item.uuid for item in gpus] or [uuid(0)]
    return check_release(wanted, floors, vram, inventory, waited, for_memory)


def reason(found: Waiting | Refused | Released) -> str:
    assert not isinstance(found, Released)
    return found.reason


def test_an_idle_gpu_is_free_and_its_floor_is_known() -> None:
    assert verdict(used(300 << 20)) == Released({uuid(0): Floor(300 << 20)})


@pytest.mark.parametrize("item", [process(4121, of=MAM), GONE, replace(GONE, owner=None)])
def test_processes_of_the_former_owner_are_waited_for_and_then_refused(item: GpuProcess) -> None:
    text = "waiting for the GPU to be released by PID 4121"
    assert verdict(used(0, item), for_memory=None) == Waiting(text)
    late = verdict(used(0, item), waited=30.0, for_memory=None)
    assert late == Refused(f"after 30 s still {text}")


def test_memory_has_its_own_timeout_after_the_processes_are_gone() -> None:
    held = used(4 * GIB)
    floor = Floor(GIB)
    waiting = Waiting("waiting for 2.5 GiB to be released on GPU 0", for_memory=True)
    assert verdict(held, floor=floor, for_memory=None, waited=40.0) == waiting
    assert verdict(held, floor=floor, for_memory=29.9, waited=59.0) == waiting
    found = verdict(held, floor=floor, for_memory=30.0, waited=59.0)
    assert isinstance(found, Released)
    assert found.warning == (
        "after 30 s still 2.5 GiB to be released on GPU 0, for which the driver lists nobody; "
        "starting anyway"
    )


def test_the_floor_has_some_slack_and_without_one_a_gibibyte_is_free() -> None:
    assert isinstance(verdict(used(GIB + (512 << 20)), floor=Floor(GIB)), Released)
    assert isinstance(verdict(used(GIB + (512 << 20) + 1), floor=Floor(GIB)), Waiting)
    assert isinstance(verdict(used(GIB)), Released)
    assert isinstance(verdict(used(GIB + 1)), Waiting)


def test_what_known_foreign_processes_took_since_is_not_waited_for() -> None:
    foreign = has(900, 5 * GIB, owner=Owner(OwnerKind.CONTAINER, "c"))
    assert isinstance(verdict(used(6 * GIB, foreign), floor=Floor(2 * GIB, GIB)), Released)
    assert isinstance(verdict(used(8 * GIB, foreign), floor=Floor(2 * GIB, GIB)), Waiting)
    # Without a floor, all that they have is theirs.
    assert isinstance(verdict(used(6 * GIB, foreign)), Released)
    # One that shrank does not make the others' memory ours.
    assert isinstance(verdict(used(6 * GIB, foreign), floor=Floor(6 * GIB, 6 * GIB)), Released)


def test_at_last_it_depends_on_whether_the_model_fits() -> None:
    held = used(10 * GIB)
    assert isinstance(verdict(held, vram=14 * GIB, for_memory=30.0), Released)
    assert reason(verdict(held, vram=15 * GIB, for_memory=30.0)) == (
        "after 30 s GPU 0 has 14.0 GiB free of the 15.0 GiB that it needs, and the driver lists "
        "nobody who has the rest"
    )


def test_memory_that_cannot_be_read_relies_on_the_processes() -> None:
    for memory in (None, GpuMemory(TOTAL, None, None)):
        assert verdict(gpu(0, memory=memory)) == Released({})
        held = gpu(0, memory=memory, processes=(process(4121, of=MAM),))
        assert isinstance(verdict(held), Waiting)


def test_what_cannot_be_read_is_waited_for_and_never_taken_for_free() -> None:
    unreadable = gpu(0, processes=None)
    assert reason(verdict(unreadable)) == "waiting for the processes on GPU 0 to be readable"
    assert isinstance(verdict(unreadable, waited=30.0), Refused)
    assert reason(verdict(error="NVML is gone")) == (
        "waiting for the GPUs to be readable: NVML is gone"
    )
    assert isinstance(verdict(error="NVML is gone", waited=31.0), Refused)
    assert reason(verdict()) == f"waiting for {uuid(0)} to be there"


@pytest.mark.parametrize("unlisted", ["untold", "implausible"])
def test_where_holders_are_never_told_the_memory_decides(unlisted: Unlisted) -> None:
    def blind(count: int) -> Gpu:
        return replace(used(count), processes=None, unlisted=unlisted)

    assert isinstance(verdict(blind(0)), Released)
    assert reason(verdict(blind(3 * GIB))) == "waiting for 2.0 GiB to be released on GPU 0"
    assert isinstance(verdict(replace(blind(0), memory=None)), Released)


def test_all_gpus_of_a_group_have_to_be_free() -> None:
    found = verdict(used(0), used(3 * GIB, index=1))
    assert reason(found) == "waiting for 2.0 GiB to be released on GPU 1"
    found = verdict(used(3 * GIB), used(3 * GIB, index=1))
    assert reason(found) == (
        "waiting for 2.0 GiB to be released on GPU 0 and 2.0 GiB to be released on GPU 1"
    )


def test_what_is_used_is_known_or_not_and_says_whose_it_is() -> None:
    foreign = has(900, GIB)
    assert floor_of(used(3 * GIB, foreign, process(1, of=MAM))) == Floor(3 * GIB, GIB)
    assert floor_of(gpu(0, memory=None)) is None
    assert [size(n) for n in (0, 1, 1 << 20, GIB - 1, GIB)] == [
        "0 MiB", "1 MiB", "1 MiB", "1024 MiB", "1.0 GiB",
    ]  # fmt: skip


def test_the_plan_passes_on_what_is_remembered() -> None:
    old = workload(MAM, RunState.EXITED)
    memory = replace(known(old), floors={uuid(0): Floor(5, 2), uuid(1): Floor(7)})
    plan = plan_for([replace(MAM, vram=GIB)], observed(old), memory)
    (step,) = [one for one in plan.changes[0].steps if isinstance(one, Release)]
    assert (step.floors, step.vram) == ({uuid(0): Floor(5, 2)}, GIB)


def test_floors_survive_in_the_memory() -> None:
    memory = Memory(floors={uuid(0): Floor(5, 2)})
    assert reread(memory) == memory
