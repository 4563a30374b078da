"""From the keys of the file to GPUs, and from models and GPUs to instance ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mic_supervisor.config.document import GpuEntry, GpuKey
from mic_supervisor.config.names import safe_name
from mic_supervisor.model import FleetEntry, Gpu, GpuInventory, Unsatisfiable

_UUID = re.compile(r"(?:gpu|mig)-([0-9a-f]{8})-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class BoundEntry:
    """An entry whose GPUs are all there. `digits` is what an instance's id has of them."""

    entry: GpuEntry
    gpus: tuple[Gpu, ...]
    instance: str | None  # None for `none` and `fleet`
    digits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Binding:
    """`bindings` maps keys of the file to UUIDs, to be kept when the file is accepted.

    Index keys are looked up in it, see `bind`; of PCI keys it tells which GPU is gone.
    """

    entries: tuple[BoundEntry, ...]
    unsatisfiable: tuple[Unsatisfiable, ...]
    bindings: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    lost_fleet: tuple[FleetEntry, ...] = ()  # of `unsatisfiable`, what is handed over


def bind(entries: Iterable[GpuEntry], inventory: GpuInventory, kept: Mapping[str, str]) -> Binding:
    """Find the GPU of every key.

    1. An index that was bound before stays with its UUID, whatever the driver calls it today: a GPU
       that drops off the bus renumbers the others, and must move no model.
    2. A new index is bound to the GPU that has it now, unless another index of the file holds that
       GPU already.
    3. A key without a GPU blocks its own entry only. So does a GPU that two keys claim: the first
       in the file keeps it, even where something else is wrong with its entry.
    """
    entries = tuple(entries)
    by_index = {gpu.index: gpu for gpu in inventory.gpus if gpu.parent is None}
    by_uuid = {gpu.uuid.lower(): gpu for gpu in inventory.gpus}
    by_pci = {_pci(gpu.pci_bus_id): gpu for gpu in inventory.gpus if gpu.pci_bus_id}
    keys = [key for entry in entries for key in entry.keys if key.kind != "uuid"]
    bindings = {key.value: kept[key.value] for key in keys if key.value in kept}
    held = {
        bindings[key.value]: key.value
        for key in keys
        if key.kind == "index" and key.value in bindings
    }
    warnings: list[str] = []

    unopened = {
        gpu.uuid.lower(): gpu.error_line for gpu in inventory.unopened if gpu.uuid is not None
    }

    def find(key: GpuKey) -> Gpu | str:
        if key.kind == "uuid":
            uuid = key.value.lower()
            return by_uuid.get(uuid) or unopened.get(uuid) or f"{key.value} is not in this machine"
        if key.kind == "pci":
            there = by_pci.get(_pci(key.value))
            if there is None:
                return f"no GPU has the PCI bus id {key.value}"
            bindings[key.value] = there.uuid
            return there
        if key.value in bindings:
            uuid = bindings[key.value]
            found = by_uuid.get(uuid.lower())
            if found is None and uuid.lower() in unopened:
                return unopened[uuid.lower()]
            if found is None:
                return f"GPU {key.value} is bound to {uuid}, which is not there"
            if found.index != int(key.value):
                warnings.append(
                    f"GPU {key.value} of the file stays with {uuid}, which the driver now calls "
                    f"{found.index}; `apply --rebind` binds the file's numbers anew"
                )
            return found
        found = by_index.get(int(key.value))
        if found is None:
            return _no_such_index(key.value, inventory)
        if found.uuid in held:
            return (
                f"the GPU that the driver now calls {key.value} is {found.uuid}, "
                f"which GPU {held[found.uuid]} of the file is bound to"
            )
        bindings[key.value] = found.uuid
        held[found.uuid] = key.value
        return found

    ids = _short_ids({*(gpu.uuid for gpu in inventory.gpus), *kept.values()})
    bound: list[BoundEntry] = []
    lost: list[Unsatisfiable] = []
    lost_fleet: list[FleetEntry] = []
    claimed: dict[str, str] = {}
    for entry in entries:
        found = [find(key) for key in entry.keys]
        gpus = tuple(item for item in found if isinstance(item, Gpu))
        reasons = [item for item in found if isinstance(item, str)]
        reasons += [f"GPU {gpu.index} is parted into MIG slices" for gpu in gpus if gpu.mig]
        subject = ", ".join(str(key) for key in entry.keys)
        expected = [
            item.uuid if isinstance(item, Gpu) else _expected(key, bindings)
            for key, item in zip(entry.keys, found, strict=True)
        ]
        own: list[str] = []
        for uuid in expected:
            if uuid is None:
                continue
            if uuid in own:
                reasons.append(f"{uuid} is named twice")
            elif uuid.lower() in claimed:
                reasons.append(f"{uuid} is already named by {claimed[uuid.lower()]}")
            else:
                claimed[uuid.lower()] = f"{subject} ({entry.location})"
                own.append(uuid)
        known = [uuid for uuid in expected if uuid is not None]
        digits = tuple(ids.get(uuid) or _short(uuid) for uuid in known)
        instance = (
            instance_id(entry.model, digits)
            if entry.model and len(known) == len(entry.keys)
            else None
        )
        if reasons:
            hint = _slices_hint(entry, gpus, inventory) or _hint(reasons)
            if entry.fleet:
                why = "; ".join(reasons)
                lost_fleet.append(FleetEntry(tuple(own), digits, len(entry.keys), why, hint))
            lost.append(
                Unsatisfiable(
                    subject=f"{entry.value} on {subject}",
                    reason="; ".join(reasons),
                    # What another entry claims is that entry's: freezing it would punish the
                    # entry that is in order.
                    gpus=tuple(own),
                    instances=(instance,) if instance and own == known else (),
                    model=entry.model,
                    hint=hint,
                )
            )
        else:
            bound.append(BoundEntry(entry, gpus, instance, digits))
    return Binding(
        tuple(bound),
        tuple(lost),
        tuple(sorted(bindings.items(), key=lambda item: (len(item[0]), item[0]))),
        tuple(warnings),
        tuple(lost_fleet),
    )


def instance_id(model: str, gpus: Sequence[str]) -> str:
    """`<model>-<first 8 digits of the GPU's UUID>`, safe in container and unit names.

    The id does not depend on how the file spells the GPU, nor on its index.
    """
    suffix = gpus[0] if len(gpus) == 1 else f"{gpus[0]}x{len(gpus)}"
    return f"{safe_name(model)}-{suffix}"


def _short_ids(uuids: Iterable[str]) -> dict[str, str]:
    """The first block of each UUID; a digest of the whole where that is not enough."""
    firsts = {uuid: _short(uuid) for uuid in uuids}
    counts = list(firsts.values())
    return {
        uuid: first if counts.count(first) == 1 else _digest(uuid) for uuid, first in firsts.items()
    }


def _short(uuid: str) -> str:
    match = _UUID.fullmatch(uuid.lower())
    return match[1] if match else _digest(uuid)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _expected(key: GpuKey, bindings: Mapping[str, str]) -> str | None:
    """The UUID of a GPU that is not there, as far as the key tells it."""
    return key.value if key.kind == "uuid" else bindings.get(key.value)


def _pci(bus_id: str) -> str:
    """The driver pads the domain to 4 or 8 digits, and lspci leaves it out."""
    parts = bus_id.lower().split(":")
    if len(parts) == 2:
        parts = ["0", *parts]
    return ":".join([parts[0].lstrip("0").rjust(1, "0"), *parts[1:]])


def _no_such_index(value: str, inventory: GpuInventory) -> str:
    unopened = {gpu.index: gpu.error_line for gpu in inventory.unopened}
    if int(value) in unopened:
        return unopened[int(value)]
    if inventory.source == "none":
        return "the supervisor does not look for GPUs here (MIC_GPU_SOURCE=none)"
    there = ",".join(map(str, sorted({*inventory.indices.values(), *unopened})))
    return f"there is no GPU {value}; this machine has {f'GPU {there}' if there else 'none'}"


def _slices_hint(entry: GpuEntry, gpus: Iterable[Gpu], inventory: GpuInventory) -> str | None:
    """What to write instead of a GPU that has MIG on, or of a slice that is gone."""
    for gpu in gpus:
        slices = [f'"{one.uuid}"' for one in inventory.gpus if one.parent == gpu.uuid]
        if gpu.mig and slices:
            return f"write a slice as the key: {', '.join(slices)}"
        if gpu.mig:
            return (
                "it has no slices: make them with `nvidia-smi mig`, and write their UUIDs; or "
                f"switch MIG off with: nvidia-smi -i {gpu.index} -mig 0"
            )
    if any(key.value.startswith("MIG-") for key in entry.keys) and not tuple(gpus):
        return "list the slices with: mic-supervisor gpus; one that is made anew has another UUID"
    return None


def _hint(reasons: list[str]) -> str | None:
    if any("bound to" in reason for reason in reasons):
        return "if the hardware was changed on purpose: mic-supervisor apply --rebind"
    return None
