"""A first gpus.yaml: every GPU of this machine, and what was found running on them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from mic_supervisor.backends.registry import Registry, examples
from mic_supervisor.config.load import load
from mic_supervisor.config.schema import FILES
from mic_supervisor.config.yaml import inline, scalar
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.host import host_name
from mic_supervisor.kill import Survey
from mic_supervisor.model import Gpu, GpuInventory
from mic_supervisor.takeover import Proposal, containers, distinct, processes
from mic_supervisor.text import printable

if TYPE_CHECKING:
    from mic_supervisor.runtimes.docker.engine import Engine


def running(survey: Survey, engine: Engine | None) -> tuple[list[Proposal], list[str]]:
    """The proposals, each with a name of its own, and what stands in the way of knowing more.

    `engine` None: there is no Docker here. Raises MicError when the GPUs cannot be read.
    """
    if survey.inventory.error is not None:
        raise MicError(survey.inventory.error, hint=survey.inventory.hint)
    warnings: list[str] = []
    found: list[Proposal] = []
    if engine is not None:
        try:
            found += containers.proposals(survey, engine)
        except MicError as error:
            warnings.append(f"containers are left out: {error.message}")
    found += processes.proposals(survey, warnings)
    return distinct(found), warnings


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
    text = render("", [DraftGpu(key, one.name)], [model], one.settings)
    alone = Path(os.devnull) / "gpus.yaml"  # no drop-ins are beside it
    try:
        load(alone, registry, environ=environ, data=text.encode())
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
    schema = next((path for path in FILES if path.exists()), FILES[-1])
    return render(title, gpus, models, settings, examples(registry.names()), schema), placed


def _model_notes(one: Proposal) -> Iterator[str]:
    where = f" on GPU {', '.join(map(str, one.gpus))}" if one.gpus else ""
    steps = "; ".join([*one.stop, "mic-supervisor apply"])
    yield f"{one.what}{where} now. To take it over: {steps}"
    yield from one.notes
    if one.secrets:
        yield f"Its env_file holds {', '.join(name for name, _ in one.secrets)}."
    if one.left:
        yield (
            "The file has no key for what follows, and the model runs without it. If it needs "
            "that, leave it as it is, and take the model and its GPU out of this file."
        )
    for line in one.left:
        yield f"- {line}"


def _gpu_lines(
    inventory: GpuInventory, proposals: Sequence[Proposal]
) -> tuple[list[DraftGpu], set[str]]:
    by_number = {gpu.number: gpu for gpu in inventory.gpus}
    owner: dict[int | str, Proposal] = {}
    also: dict[int | str, list[str]] = {}
    for one in proposals:
        usable = one.refused is None and one.gpus and all(n in by_number for n in one.gpus)
        if usable and not any(n in owner for n in one.gpus):
            owner.update(dict.fromkeys(one.gpus, one))
            continue
        for number in one.gpus:
            also.setdefault(number, []).append(one.name)
    out: list[DraftGpu] = []
    written: set[str] = set()
    lost: dict[int | str, str] = {
        gpu.index: gpu.error_line for gpu in inventory.unopened if gpu.index not in by_number
    }
    # As the driver counts the GPUs, each followed by its slices.
    there = [(gpu.index, gpu.number) for gpu in inventory.gpus]
    there += [(gpu.index, gpu.index) for gpu in inventory.unopened if gpu.index in lost]
    for _, number in sorted(there, key=itemgetter(0)):
        if number in lost:
            note = f"GPU {number}: {printable(lost[number])}"
            out.append(DraftGpu(str(number), None, [note], commented=True))
            continue
        if by_number[number].mig:
            notes = [
                *_gpu_notes(by_number[number]),
                "It has MIG on: only a slice can be given a model.",
            ]
            out.append(DraftGpu(str(number), None, notes, commented=True))
            continue
        chosen = owner.get(number)
        if chosen is not None and chosen.name in written:
            continue
        members = (number,) if chosen is None else chosen.gpus
        notes = [line for n in members for line in _gpu_notes(by_number[n])]
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
    slice_of = "" if gpu.parent is None else "Slice of "
    yield f"{slice_of}GPU {gpu.index}: {printable(gpu.name)}{memory}, {gpu.uuid}"
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


# --- the text of a file -------------------------------------------------------------------------

_WIDTH = 96


@dataclass(frozen=True, slots=True)
class DraftModel:
    """`notes` become comments. `commented`: the entry itself, too, for that reason."""

    name: str
    entry: Mapping[str, Any]
    notes: Sequence[str] = ()
    commented: str | None = None


@dataclass(frozen=True, slots=True)
class DraftGpu:
    """One line under `gpus:`. `key` is an index, or several set off by commas."""

    key: str
    model: str | None
    notes: Sequence[str] = ()
    commented: bool = False


def render(
    title: str,
    gpus: Sequence[DraftGpu],
    models: Sequence[DraftModel] = (),
    backends: Mapping[str, Mapping[str, Any]] | None = None,
    examples: str = "",
    schema: Path = FILES[-1],
) -> str:
    """The whole file. What is not commented out is read as it was meant, or refused by `check`.

    `examples` is YAML that is written as comments.
    """
    out = [
        f"# yaml-language-server: $schema={schema}",
        "#",
        *(f"# {line}".rstrip() for line in title.splitlines()),
        "",
        "version: 1",
        "",
    ]
    if backends:
        out += ["backends:                       # settings of a backend on this host"]
        for name, settings in backends.items():
            out += [f"  {name}:", *_entries(settings, 4)]
        out.append("")
    if models:
        live = any(model.commented is None for model in models)
        head = "models:                         # what may run: name -> backend and its options"
        out.append(head if live else f"# {head}")
    for model in models:
        out += _comments(model.notes)
        mark = "  " if model.commented is None else "  # "
        if model.commented is not None:
            out += _comments([f"Not usable as it is: {model.commented}"])
        out.append(f"{mark}{scalar(model.name)}:")
        out += [mark + line[2:] for line in _entries(model.entry, 4)]
        out.append("")
    if examples:
        out += ["", "# --- Examples. Take away the first two characters of what you need.", "#"]
        out += [f"# {line}".rstrip() for line in examples.splitlines()]
    out += [
        "",
        "# What should run where, by index, UUID or PCI bus id. `none` keeps a GPU empty: nothing",
        "# is started there, and no foreign process is stopped. A GPU that is not listed is left",
        "# alone.",
        "gpus:",
    ]
    for gpu in gpus:
        out += _comments(gpu.notes)
        key = gpu.key if gpu.key.isdigit() else json.dumps(gpu.key)
        mark = "  # " if gpu.commented else "  "
        out.append(f"{mark}{key}: {'none' if gpu.model is None else scalar(gpu.model)}")
    return "\n".join(out) + "\n"


def _comments(notes: Sequence[str]) -> list[str]:
    return [
        f"  # {line}"
        for note in notes
        for line in wrap(
            note,
            _WIDTH - 4,
            subsequent_indent="  " if note.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _entries(values: Mapping[str, Any], indent: int) -> list[str]:
    out = []
    for key, value in values.items():
        head = f"{' ' * indent}{key}: "
        short = head + inline(value)
        if len(short) <= _WIDTH or not isinstance(value, list | tuple):
            out.append(short)
            continue
        out.append(f"{' ' * indent}{key}:")
        out += [f"{' ' * indent}  - {inline(item)}" for item in value]
    return out
