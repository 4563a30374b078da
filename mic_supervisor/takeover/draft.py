"""The text of a first file: every GPU of this machine, and what was found running on them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mic_supervisor.backends.registry import Registry, examples
from mic_supervisor.config.diagnostics import printable
from mic_supervisor.config.draft import Draft, DraftGpu, DraftModel, render
from mic_supervisor.config.load import load
from mic_supervisor.errors import ConfigError
from mic_supervisor.host import host_name
from mic_supervisor.model import Gpu, GpuInventory
from mic_supervisor.takeover import Proposal


def checked(
    proposals: Sequence[Proposal], target: Path, registry: Registry, environ: Mapping[str, str]
) -> list[Proposal]:
    """The proposals; what `check` would refuse is said, and will stand there as a comment."""
    settings: dict[str, Mapping[str, Any]] = {}
    out = []
    for one in proposals:
        clash = next(
            (name for name, values in one.settings.items() if settings.get(name, values) != values),
            None,
        )
        if clash is not None and one.refused is None:
            one = replace(one, refused=f"another installation is proposed as backends.{clash}")
        if one.refused is None:
            one = replace(one, refused=_refusal(one, target, registry, environ))
        if one.refused is None:
            settings.update(one.settings)
        out.append(one)
    return out


def _refusal(
    one: Proposal, target: Path, registry: Registry, environ: Mapping[str, str]
) -> str | None:
    """Why `check` refuses a file with this model alone."""
    key = ",".join(map(str, one.gpus)) or "0"
    model = DraftModel(one.name, _entry(one, target))
    draft = Draft("", [DraftGpu(key, one.name)], [model], one.settings)
    alone = Path(os.devnull) / "gpus.yaml"  # no drop-ins are beside it
    try:
        load(alone, registry, environ=environ, data=render(draft).encode())
    except ConfigError as error:
        first = (error.rendered or error.message).split("\n", 1)[0]
        return first.partition("error: ")[2] or first
    return None


def first_file(
    inventory: GpuInventory,
    proposals: Sequence[Proposal],
    registry: Registry,
    target: Path,
    *,
    from_running: bool,
) -> tuple[str, set[str]]:
    """The text, and the names of the proposals that have GPUs in it."""
    models = [
        DraftModel(
            one.name,
            _entry(one, target),
            [printable(line) for line in _model_notes(one)],
            None if one.refused is None else printable(one.refused),
        )
        for one in proposals
    ]
    settings: dict[str, Mapping[str, Any]] = {}
    for one in proposals:
        if one.refused is None:
            settings.update(one.settings)
    how = "what runs on " if from_running else ""
    title = (
        f"Which model runs on which GPU of {host_name()}: a first draft, made from {how}this "
        "machine.\n\n"
        "  mic-supervisor check    finds every error\n"
        "  mic-supervisor plan     says what would change, and why\n"
        "  mic-supervisor apply    does it, and waits until everything is ready"
    )
    gpus, placed = _gpu_lines(inventory, proposals)
    draft = Draft(title, gpus, models, settings, examples(registry.names()))
    return render(draft), placed


def _model_notes(one: Proposal) -> Iterator[str]:
    where = f" on GPU {', '.join(map(str, one.gpus))}" if one.gpus else ""
    steps = "; ".join([*one.stop, "mic-supervisor apply"])
    yield f"{one.what}{where} now. To take it over: {steps}"
    yield from one.notes
    if one.secrets:
        yield f"Its env_file holds {', '.join(name for name, _ in one.secrets)}."


def _gpu_lines(
    inventory: GpuInventory, proposals: Sequence[Proposal]
) -> tuple[list[DraftGpu], set[str]]:
    by_index = {gpu.index: gpu for gpu in inventory.gpus}
    owner: dict[int, Proposal] = {}
    also: dict[int, list[str]] = {}
    for one in proposals:
        usable = one.refused is None and one.gpus and all(n in by_index for n in one.gpus)
        if usable and not any(n in owner for n in one.gpus):
            owner.update(dict.fromkeys(one.gpus, one))
            continue
        for index in one.gpus:
            also.setdefault(index, []).append(one.name)
    out: list[DraftGpu] = []
    written: set[str] = set()
    lost = {gpu.index: gpu.told for gpu in inventory.unopened}
    for index in sorted({*by_index, *lost}):
        if index in lost and index not in by_index:
            note = f"GPU {index}: {printable(lost[index])}"
            out.append(DraftGpu(str(index), None, [note], commented=True))
            continue
        chosen = owner.get(index)
        if chosen is not None and chosen.name in written:
            continue
        members = (index,) if chosen is None else chosen.gpus
        notes = [line for n in members for line in _gpu_notes(by_index[n])]
        notes += [
            f"{name} is there now, too, and a GPU has one model: choose, or give it another GPU"
            if chosen is not None
            else f"{name} is there now, and cannot be taken over as it is"
            for n in members
            for name in also.get(n, ())
        ]
        key = ",".join(map(str, members))
        out.append(DraftGpu(key, None if chosen is None else chosen.name, notes))
        if chosen is not None:
            written.add(chosen.name)
    return out, written


def _gpu_notes(gpu: Gpu) -> Iterator[str]:
    memory = f", {gpu.memory.total / (1 << 30):.1f} GiB" if gpu.memory else ""
    yield f"GPU {gpu.index}: {printable(gpu.name)}{memory}, {gpu.uuid}"
    holders = [f"PID {item.pid} ({printable(item.name or '?')})" for item in gpu.processes or ()]
    if holders:
        yield f"held now by {', '.join(holders)}"


def _entry(one: Proposal, target: Path) -> dict[str, Any]:
    entry = dict(one.entry)
    if one.secrets:
        entry["env_file"] = str(env_path(target, one))
    return entry


def env_path(target: Path, one: Proposal) -> Path:
    return target.parent / f"{one.name}.env"
