"""What people name, and what is said to who acts in spite of a pause."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor.errors import MicError
from mic_supervisor.model import GpuInventory
from mic_supervisor.plan.assess import Selection
from mic_supervisor.plan.memory import Pause, Paused
from mic_supervisor.plan.selection import Names, free_of_pauses, gpus_called, select, to_resume
from tests.unit.plan.builders import (
    MAM,
    NOW,
    gpu,
    gpus,
    on,
    uuid,
)

AT = Pause(600.0)


FACE = on("人脸", 2, 3)
THERE = Names(
    ["7", "MAM", "face"],
    GpuInventory("nvml", gpus(4)),
    {"0": uuid(0), "5": uuid(5)},
    [uuid(0), uuid(5)],
    {one.id: (one.model, one.gpus) for one in (MAM, FACE)},
)


@pytest.mark.parametrize(
    ("names", "models", "indices"),
    [
        (["MAM"], {"MAM"}, set()),
        (["0"], set(), {0}),
        ([uuid(1).upper().replace("GPU", "gpu")], set(), {1}),
        (["MAM", "1-2"], {"MAM"}, {1, 2}),
        (["1,3"], set(), {1, 3}),
        (["7"], {"7"}, set()),
        (["5"], set(), {5}),  # bound to one that is not there now
        ([uuid(5)], set(), {5}),
        (["MAM-aaaaaaaa"], set(), {0}),
        ([FACE.id], set(), {2, 3}),
        (["人脸-ccccccccx2"], set(), {2, 3}),
    ],
)
def test_names_of_models_and_gpus(names: list[str], models: set[str], indices: set[int]) -> None:
    found = select(names, THERE, "pause x")
    assert (found.models, found.gpus) == (models, {uuid(index) for index in indices})


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        *[("1", {1}), ("0,1", {0, 1}), ("0-2", {0, 1, 2}), (uuid(1).upper(), {1}), ("9", set())],
        *[("3b:00.0", {2}), ("0000:3B:00.0", {2}), ("MAM", set()), ("", set()), ("01", set())],
    ],
)
def test_gpus_are_called_as_the_file_writes_them(name: str, indices: set[int]) -> None:
    there = [(uuid(index), index, None) for index in range(2)]
    lost = (uuid(3), None, None)
    found = gpus_called(name, [*there, (uuid(2), 2, "00000000:3B:00.0"), lost])
    assert found == {uuid(index) for index in indices}


def test_a_slice_is_called_by_its_uuid_and_a_number_means_no_slice() -> None:
    part = "MIG-bbbbbbbb-0000-5000-8000-000000000000"
    gpus = (gpu(0, mig=True), gpu(0, uuid=part, parent=uuid(0)))
    there = Names((), GpuInventory("nvml", gpus), {})
    assert select([part], there, "pause").gpus == {part}
    assert Selection(gpus=frozenset([part])).called(there.inventory.indices) == [part]
    assert gpus_called("0", [(one.uuid, one.number, None) for one in gpus]) == {uuid(0)}
    assert gpus_called(part.upper(), [(one.uuid, one.number, None) for one in gpus]) == {part}


@pytest.mark.parametrize(
    ("name", "told", "hint"),
    [
        ("Mam", "there is no model and no GPU 'Mam'", "did you mean MAM?"),
        (
            "whisper",
            "there is no model and no GPU 'whisper'",
            "models are 7, MAM, face; GPUs are 0, 1, 2, 3",
        ),
        (
            "9",
            "there is no GPU 9; this machine has GPU 0,1,2,3",
            "models are 7, MAM, face; GPUs are 0, 1, 2, 3",
        ),
        ("GPU-12", "'GPU-12': this is not a whole UUID", None),
        (
            uuid(4),
            f"{uuid(4)} is not in this machine",
            "models are 7, MAM, face; GPUs are 0, 1, 2, 3",
        ),
        ("", "'': this names no GPU", None),
    ],
)
def test_what_there_is_not_is_told(name: str, told: str, hint: str | None) -> None:
    with pytest.raises(MicError) as caught:
        select([name], THERE, f"pause {name}")
    assert str(caught.value) == f"cannot pause {name}: {told}"
    assert hint is None or caught.value.hint == hint


def test_a_name_that_is_both_is_not_guessed_at() -> None:
    there = replace(THERE, models=["0"])
    with pytest.raises(MicError) as caught:
        select(["0"], there, "pause 0")
    assert str(caught.value) == "cannot pause 0: 0 is a model and a GPU"
    assert str(caught.value.hint).startswith(f"name the GPU by its UUID, {uuid(0)}, or")


def test_what_is_not_paused_cannot_be_resumed() -> None:
    pauses = Paused({"face": AT}, {uuid(2): AT})
    assert to_resume([], THERE, pauses) == Selection(frozenset({"face"}), frozenset({uuid(2)}))
    assert to_resume(["2"], THERE, pauses) == Selection(gpus=frozenset({uuid(2)}))
    with pytest.raises(MicError) as caught:
        to_resume(["MAM"], THERE, pauses)
    assert (str(caught.value), caught.value.hint) == (
        "cannot resume MAM: MAM is not paused",
        "paused are face, GPU 2",
    )
    with pytest.raises(MicError) as caught:
        to_resume(["0-1"], THERE, Paused())
    assert (str(caught.value), caught.value.hint) == (
        "cannot resume 0-1: GPU 0, GPU 1 are not paused",
        "nothing is paused",
    )


def test_who_acts_on_a_paused_one_is_refused_with_the_way_out() -> None:
    one, two = (MAM.id, "MAM", MAM.gpus), ("MAM-b", "MAM", (uuid(1),))
    pauses = Paused(gpus={uuid(0): AT})
    indices = {uuid(0): 0}
    assert free_of_pauses([one, two], pauses, "restart MAM", indices, NOW) == ["MAM-b"]
    with pytest.raises(MicError) as caught:
        free_of_pauses([one], pauses, "restart MAM", indices, NOW)
    assert (str(caught.value), caught.value.hint) == (
        "cannot restart MAM: GPU 0 is paused since 00:10:00",
        "mic-supervisor resume 0",
    )
