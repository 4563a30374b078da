"""From the keys of the file to GPUs, and from models to ids."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.config.document import GpuEntry, GpuKey, Location
from mic_supervisor.config.names import is_called, safe_name, shown_id, with_shown_ids
from mic_supervisor.desired.bind import Binding, bind, instance_id
from mic_supervisor.model import GpuInventory, UnopenedGpu
from tests.unit.plan.builders import gpu, uuid

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


def index(number: int) -> GpuKey:
    return GpuKey("index", str(number))


def by_uuid(number: int) -> GpuKey:
    return GpuKey("uuid", uuid(number))


def pci(text: str) -> GpuKey:
    return GpuKey("pci", text)


def entry(model: str | None, *keys: GpuKey, line: int = 1) -> GpuEntry:
    return GpuEntry(keys, model, Location("gpus.yaml", line, 3))


def machine(*numbers: int, **values: object) -> GpuInventory:
    """A machine with these GPUs, which the driver numbers from 0 in this order."""
    found = tuple(
        gpu(place, uuid=uuid(number), pci_bus_id=f"00000000:{number:02X}:00.0")
        for place, number in enumerate(numbers)
    )
    return GpuInventory("nvml", found, **values)  # type: ignore[arg-type]


def bound(binding: Binding) -> dict[str | None, list[str]]:
    """Instance id -> the UUIDs of its GPUs."""
    return {item.instance: [one.uuid for one in item.gpus] for item in binding.entries}


def lost(binding: Binding) -> list[str]:
    return [f"{item.subject}: {item.reason}" for item in binding.unsatisfiable]


def test_an_index_a_uuid_and_a_pci_bus_id_find_their_gpu() -> None:
    entries = [
        entry("MAM", index(0)),
        entry("face", by_uuid(1)),
        entry("qwen", pci("00000000:02:00.0"), index(3)),
    ]
    binding = bind(entries, machine(0, 1, 2, 3), {})
    assert bound(binding) == {
        "MAM-aaaaaaaa": [uuid(0)],
        "face-bbbbbbbb": [uuid(1)],
        "qwen-ccccccccx2": [uuid(2), uuid(3)],
    }
    assert binding.unsatisfiable == ()
    assert binding.bindings == (("0", uuid(0)), ("3", uuid(3)), ("00000000:02:00.0", uuid(2)))


def test_none_binds_its_gpu_and_has_no_instance() -> None:
    assert bound(bind([entry(None, index(1))], machine(0, 1), {})) == {None: [uuid(1)]}


@pytest.mark.parametrize("spelled", ["00000000:3B:00.0", "0000:3b:00.0", "3b:00.0"])
def test_a_pci_bus_id_is_found_however_the_driver_pads_it(spelled: str) -> None:
    there = GpuInventory("nvml", (gpu(0, pci_bus_id=spelled),))
    binding = bind([entry("MAM", pci("00000000:3b:00.0"))], there, {})
    assert bound(binding) == {"MAM-aaaaaaaa": [uuid(0)]}


def test_a_uuid_is_found_whatever_its_case() -> None:
    key = GpuKey("uuid", "GPU-" + uuid(0).removeprefix("GPU-").upper())
    assert bound(bind([entry("MAM", key)], machine(0), {})) == {"MAM-aaaaaaaa": [uuid(0)]}


def test_the_id_does_not_depend_on_how_the_file_spells_the_gpu() -> None:
    ids = {
        bind([entry("MAM", key)], machine(0, 1), {}).entries[0].instance
        for key in (index(1), by_uuid(1), pci("00000000:01:00.0"))
    }
    assert ids == {"MAM-bbbbbbbb"}


# --- renumbering ------------------------------------------------------------------------------


def test_a_gpu_that_drops_off_the_bus_moves_no_model() -> None:
    entries = [entry("A", index(0)), entry("B", index(1)), entry("C", index(2))]
    before = bind(entries, machine(0, 1, 2), {})
    after = bind(entries, machine(1, 2), dict(before.bindings))
    assert bound(after) == {"B-bbbbbbbb": [uuid(1)], "C-cccccccc": [uuid(2)]}
    assert after.bindings == before.bindings
    (gone,) = after.unsatisfiable
    assert gone.subject == "A on GPU 0"
    assert gone.reason == f"GPU 0 is bound to {uuid(0)}, which is not there"
    assert gone.gpus == (uuid(0),)
    assert gone.instances == ("A-aaaaaaaa",)
    assert gone.hint == "if the hardware was changed on purpose: mic-supervisor apply --rebind"
    assert after.warnings[0] == (
        f"GPU 1 of the file stays with {uuid(1)}, which the driver now calls 0; "
        "`apply --rebind` binds the file's numbers anew"
    )
    assert bind(entries, machine(0, 1, 2), dict(after.bindings)) == before


def test_binding_anew_takes_the_numbers_as_they_are_now() -> None:
    binding = bind([entry("A", index(0))], machine(1, 2), {})
    assert bound(binding) == {"A-bbbbbbbb": [uuid(1)]}


def test_a_new_index_does_not_take_the_gpu_that_another_index_holds() -> None:
    entries = [entry("A", index(0)), entry("B", index(1))]
    binding = bind(entries, machine(0, 1), {"1": uuid(0)})
    assert bound(binding) == {"B-aaaaaaaa": [uuid(0)]}
    assert lost(binding) == [
        f"A on GPU 0: the GPU that the driver now calls 0 is {uuid(0)}, "
        "which GPU 1 of the file is bound to"
    ]


def test_a_binding_that_the_file_no_longer_has_is_forgotten() -> None:
    binding = bind([entry("A", index(1))], machine(0, 1), {"0": uuid(1), "1": uuid(1)})
    assert binding.bindings == (("1", uuid(1)),)


# --- GPUs that are not there ------------------------------------------------------------------


def test_what_is_said_of_keys_without_a_gpu() -> None:
    entries = [
        entry("A", index(7)),
        entry("B", by_uuid(5)),
        entry("C", pci("00000000:3b:00.0")),
        entry(None, index(8)),
    ]
    inventory = machine(0, 1, unopened=(UnopenedGpu(7, "cannot open it: GPU is lost"),))
    binding = bind(entries, inventory, {})
    assert lost(binding) == [
        "A on GPU 7: cannot open it: GPU is lost",
        f"B on {uuid(5)}: {uuid(5)} is not in this machine",
        "C on 00000000:3b:00.0: no GPU has the PCI bus id 00000000:3b:00.0",
        "none on GPU 8: there is no GPU 8; this machine has GPU 0,1,7",
    ]
    assert [item.gpus for item in binding.unsatisfiable] == [(), (uuid(5),), (), ()]
    assert [item.instances for item in binding.unsatisfiable] == [(), ("B-ffffffff",), (), ()]


def test_no_gpus_are_looked_for() -> None:
    binding = bind([entry("A", index(0))], GpuInventory("none"), {})
    assert lost(binding) == [
        "A on GPU 0: the supervisor does not look for GPUs here (MIC_GPU_SOURCE=none)"
    ]


def test_of_a_pci_bus_id_it_is_remembered_which_gpu_was_there() -> None:
    entries = [entry("A", pci("00000000:01:00.0"))]
    before = bind(entries, machine(0, 1), {})
    (gone,) = bind(entries, machine(0), dict(before.bindings)).unsatisfiable
    assert gone.gpus == (uuid(1),)
    assert gone.instances == ("A-bbbbbbbb",)


def test_another_card_in_the_slot_is_the_one_that_is_meant() -> None:
    entries = [entry("A", pci("00000000:01:00.0"))]
    there = GpuInventory("nvml", (gpu(0, uuid=uuid(4), pci_bus_id="00000000:01:00.0"),))
    binding = bind(entries, there, {"00000000:01:00.0": uuid(1)})
    assert bound(binding) == {"A-eeeeeeee": [uuid(4)]}
    assert binding.bindings == (("00000000:01:00.0", uuid(4)),)


def test_a_group_that_lost_one_gpu_is_in_trouble_and_keeps_the_others() -> None:
    entries = [entry("qwen", index(0), index(1)), entry("MAM", by_uuid(0), line=2)]
    binding = bind(entries, machine(0), {"0": uuid(0), "1": uuid(1)})
    assert bound(binding) == {}
    group, late = binding.unsatisfiable
    assert group.reason == f"GPU 1 is bound to {uuid(1)}, which is not there"
    assert group.gpus == (uuid(0), uuid(1))
    assert group.instances == ("qwen-aaaaaaaax2",)
    assert late.reason == f"{uuid(0)} is already named by GPU 0, GPU 1 (gpus.yaml:1:3)"
    assert late.gpus == ()


# --- one GPU, two keys ------------------------------------------------------------------------


def test_of_two_keys_for_one_gpu_the_first_in_the_file_keeps_it() -> None:
    entries = [entry("A", index(0), line=4), entry("B", by_uuid(0), line=5)]
    binding = bind(entries, machine(0), {})
    assert bound(binding) == {"A-aaaaaaaa": [uuid(0)]}
    (second,) = binding.unsatisfiable
    assert second.reason == f"{uuid(0)} is already named by GPU 0 (gpus.yaml:4:3)"
    assert second.gpus == ()
    assert second.instances == ()


def test_two_keys_for_one_gpu_that_is_not_there() -> None:
    entries = [entry("A", by_uuid(5)), entry("B", index(5), line=2)]
    first, second = bind(entries, machine(0), {"5": uuid(5)}).unsatisfiable
    assert first.gpus == (uuid(5),)
    assert second.gpus == ()
    assert f"{uuid(5)} is already named by" in second.reason


def test_one_gpu_twice_in_a_group() -> None:
    (twice,) = bind([entry("qwen", index(0), by_uuid(0))], machine(0, 1), {}).unsatisfiable
    assert twice.reason == f"{uuid(0)} is named twice"
    assert twice.gpus == (uuid(0),)


# --- ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["MAM", "qwen3-8b.v1_0", "0", "a" * 40])
def test_a_plain_name_stays_as_it_is(model: str) -> None:
    assert safe_name(model) == model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("模型", r"m[0-9a-f]{8}"),
        ("换脸-v2", r"v2-[0-9a-f]{8}"),
        ("Ünïcode", r"n-code-[0-9a-f]{8}"),
        ("_private", r"private-[0-9a-f]{8}"),
        ("...", r"m[0-9a-f]{8}"),
        ("a" * 41, r"a{30}-[0-9a-f]{8}"),
    ],
)
def test_of_any_other_name_what_is_plain_is_kept_beside_a_digest(model: str, name: str) -> None:
    assert re.fullmatch(name, safe_name(model))
    assert NAME.fullmatch(safe_name(model))


MODELS = st.text(
    st.characters(categories=("L", "M", "N"), include_characters="-_."), min_size=1, max_size=60
)


@given(st.sets(MODELS, min_size=2, max_size=6))
def test_ids_are_unique_and_names_of_containers_and_units(models: set[str]) -> None:
    ids = {instance_id(model, ["aaaaaaaa"]) for model in models}
    assert len(ids) == len(models)
    for one in ids:
        assert NAME.fullmatch(one)
        # mic-<scope>-<id>-<hash8> has to fit where names end at 255, and people read tables.
        assert len(one) <= 49


def test_two_gpus_with_one_first_block_have_ids_of_their_own() -> None:
    twins = [gpu(number, uuid=f"GPU-aaaaaaaa-0000-4000-8000-{number:012x}") for number in range(2)]
    entries = [entry("A", index(0)), entry("A", index(1))]
    both = bind(entries, GpuInventory("nvml", tuple(twins)), {})
    first, second = (item.instance for item in both.entries)
    assert first != second
    assert "aaaaaaaa" not in str(first)
    # The one that is left keeps its id while the other is gone.
    left = bind(entries, GpuInventory("nvml", (twins[1],)), dict(both.bindings))
    assert [item.instance for item in left.entries] == [second]
    assert left.unsatisfiable[0].instances == (first,)


def test_a_uuid_of_another_shape_has_an_id() -> None:
    odd = gpu(0, uuid="GPU-3f8e")
    (one,) = bind([entry("A", index(0))], GpuInventory("nvml", (odd,)), {}).entries
    assert re.fullmatch(r"A-[0-9a-f]{8}", str(one.instance))


# --- GPUs that have MIG on, and their slices ------------------------------------------------------

SLICE = "MIG-5115e000-0000-5000-8000-000000000000"


def parted(*slices: str) -> GpuInventory:
    """GPU 0 has MIG on, and these slices; GPU 1 has not."""
    whole = gpu(0, uuid=uuid(0), pci_bus_id="00000000:00:00.0", mig=True)
    parts = (gpu(0, uuid=one, parent=whole.uuid) for one in slices)
    return GpuInventory("nvml", (whole, *parts, gpu(1, uuid=uuid(1))))


def test_a_slice_is_found_by_its_uuid_and_its_instance_named_after_it() -> None:
    entries = [entry("A", GpuKey("uuid", SLICE)), entry("B", index(1))]
    binding = bind(entries, parted(SLICE), {})
    assert bound(binding) == {"A-5115e000": [SLICE], f"B-{uuid(1)[4:12]}": [uuid(1)]}
    assert binding.bindings == (("1", uuid(1)),)


@pytest.mark.parametrize("key", [index(0), by_uuid(0), pci("00000000:00:00.0")], ids=str)
@pytest.mark.parametrize("model", ["A", None])
def test_a_gpu_that_has_mig_on_is_not_given_as_a_whole(key: GpuKey, model: str | None) -> None:
    (refused,) = bind([entry(model, key)], parted(SLICE), {}).unsatisfiable
    assert refused.reason == "GPU 0 is parted into MIG slices"
    assert refused.hint == f'write a slice as the key: "{SLICE}"'
    assert refused.gpus == (uuid(0),)  # what runs there is left as it is


def test_a_gpu_without_slices_says_how_to_make_some() -> None:
    (refused,) = bind([entry("A", index(0))], parted(), {}).unsatisfiable
    assert refused.hint is not None
    assert refused.hint.endswith("switch MIG off with: nvidia-smi -i 0 -mig 0")


def test_a_slice_that_is_gone_blocks_its_entry_and_keeps_its_id() -> None:
    (refused,) = bind([entry("A", GpuKey("uuid", SLICE))], parted(), {}).unsatisfiable
    assert (refused.reason, refused.gpus) == (f"{SLICE} is not in this machine", (SLICE,))
    assert refused.instances == ("A-5115e000",)
    assert "mic-supervisor gpus" in str(refused.hint)


# --- order ----------------------------------------------------------------------------------------


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_neither_the_order_of_entries_nor_of_gpus_matters(
    order: list[int], numbers: list[int]
) -> None:
    entries = [entry(f"M{number}", index(number)) for number in range(4)]
    kept = {str(number): uuid(number) for number in range(4)}
    plain = bind(entries, machine(*range(4)), kept)
    mixed = bind([entries[place] for place in order], machine(*numbers), kept)
    assert bound(plain) == bound(mixed)
    assert plain.bindings == mixed.bindings


# --- what people are shown of an id, and call an instance -----------------------------------------


def test_people_are_shown_the_whole_name_of_a_model() -> None:
    for model in ("人脸", "Gesicht_für_alle", "m" * 60, "MAM", "a.b-c_d"):
        assert shown_id(instance_id(model, ["51000000"]), model) == f"{model}-51000000"
        assert shown_id(instance_id(model, ["51000000x2"]), model) == f"{model}-51000000x2"
    assert shown_id("triton-shared", "人脸") == "triton-shared"


def test_ids_in_a_text_are_shown_and_names_of_workloads_are_left() -> None:
    instance = instance_id("人脸", ["51000000"])
    told = with_shown_ids(
        f"{instance}: held by {instance}, see mic-supervisor logs {instance}; "
        f"mic-default-{instance}-0123abcd.service, {instance}-x and x.{instance} are others",
        {instance: "人脸", "MAM-51000001": "MAM"},
    )
    assert told == (
        "人脸-51000000: held by 人脸-51000000, see mic-supervisor logs 人脸-51000000; "
        f"mic-default-{instance}-0123abcd.service, {instance}-x and x.{instance} are others"
    )


def test_an_instance_is_called_by_its_id_as_it_is_shown_or_kept_and_by_its_model() -> None:
    instance = instance_id("人脸", ["51000000"])
    for name in (instance, "人脸-51000000", "人脸"):
        assert is_called(name, instance, ["人脸"])
    assert is_called("e\N{COMBINING ACUTE ACCENT}", "x-1", ["é"])
    for name in ("人", "51000000", "MAM", ""):
        assert not is_called(name, instance, ["人脸"])
