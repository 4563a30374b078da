"""mic-supervisor init"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.config.diagnostics import printable
from mic_supervisor.errors import ConfigError, MicError

if TYPE_CHECKING:
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.draft import Draft, DraftGpu
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.model import Gpu, GpuInventory
    from mic_supervisor.takeover import Proposal

_MODE = 0o644
_SECRET = 0o600


@click.command(name="init")
@click.option(
    "--from-running",
    is_flag=True,
    help="Propose entries for the containers and processes that use GPUs now.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write. By default the daemon's, MIC_CONFIG.",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
def command(from_running: bool, output: Path | None, force: bool) -> int:
    """Write a first gpus.yaml from this machine.

    Every GPU is listed as `none`: nothing is started on it, and nobody who uses it is stopped.
    Examples for each backend stand in the file as comments.

    With --from-running, what uses GPUs now and is not ours becomes a model on its GPU. Nothing is
    stopped: until the old one has ended, its GPU is blocked. Values of environments are secrets and
    go into a file beside, MODEL.env, that only its owner may read.
    """
    from mic_supervisor.backends.registry import Registry

    found = wiring.settings()
    target = Path(os.path.abspath(output)) if output is not None else found.config  # noqa: PTH100
    if not force:
        _must_be_new(target)
    registry = Registry()
    warnings: list[str] = []
    proposals: list[Proposal] = []
    if from_running:
        inventory, proposals, warnings = _running(found)
    else:
        from mic_supervisor.cli.gpus import look

        inventory, _ = look(found)
    _must_have_gpus(inventory)
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    proposals = _checked(proposals, target, registry, found)
    draft, placed = _draft(inventory, proposals, registry, target, from_running=from_running)
    secrets = [
        (_env_path(target, one), one.secrets)
        for one in proposals
        if one.secrets and one.refused is None
    ]
    if not force:
        for path, _ in secrets:
            _must_be_new(path)
    from mic_supervisor.config.draft import render
    from mic_supervisor.config.env_file import format_env_file

    text = render(draft)
    for path, pairs in secrets:
        _write(path, format_env_file(dict(pairs)), _SECRET, force=force)
    _write(target, text, _MODE, force=force)
    _tell(target, proposals, placed, found, registry)
    return 0


def _running(found: Settings) -> tuple[GpuInventory, list[Proposal], list[str]]:
    from mic_supervisor.config.settings import NO_DOCKER
    from mic_supervisor.kill import survey
    from mic_supervisor.runtimes.docker.engine import Engine
    from mic_supervisor.takeover.look import running

    machine = wiring.machine(found, create_key=False)
    try:
        seen = survey(machine.sources)
    finally:
        machine.sources.gpus.close()
    engine = None
    if found.docker_host != NO_DOCKER:
        engine = Engine(found.docker_host, timeout=10.0, patience=10.0)
    proposals, warnings = running(seen, engine)
    return seen.inventory, proposals, warnings


def _must_be_new(path: Path) -> None:
    if os.path.lexists(path):
        raise MicError(f"cannot write {path}: it is there already", hint="replace it with: --force")


def _must_have_gpus(inventory: GpuInventory) -> None:
    if inventory.source == "none":
        raise MicError(
            "cannot list the GPUs: MIC_GPU_SOURCE is none",
            hint="unset it, or set MIC_GPU_SOURCE=simulated:4 to try things out",
        )
    if inventory.error is not None:
        raise MicError(inventory.error, hint=inventory.hint)
    if not inventory.gpus:
        raise MicError(
            "cannot write a first file: this machine has no GPU that can be opened",
            hint="see mic-supervisor doctor; MIC_GPU_SOURCE=simulated:4 is for trying things out",
        )


def _checked(
    proposals: Sequence[Proposal], target: Path, registry: Registry, found: Settings
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
            one = replace(one, refused=_refusal(one, target, registry, found))
        if one.refused is None:
            settings.update(one.settings)
        out.append(one)
    return out


def _refusal(one: Proposal, target: Path, registry: Registry, found: Settings) -> str | None:
    """Why `check` refuses a file with this model alone."""
    from mic_supervisor.config.draft import Draft, DraftGpu, DraftModel, render
    from mic_supervisor.config.load import load

    key = ",".join(map(str, one.gpus)) or "0"
    model = DraftModel(one.name, _entry(one, target))
    draft = Draft("", [DraftGpu(key, one.name)], [model], one.settings)
    alone = Path(os.devnull) / "gpus.yaml"  # no drop-ins are beside it
    try:
        load(alone, registry, environ=found.environ, data=render(draft).encode())
    except ConfigError as error:
        first = (error.rendered or error.message).split("\n", 1)[0]
        return first.partition("error: ")[2] or first
    return None


def _entry(one: Proposal, target: Path) -> dict[str, Any]:
    entry = dict(one.entry)
    if one.secrets:
        entry["env_file"] = str(_env_path(target, one))
    return entry


def _env_path(target: Path, one: Proposal) -> Path:
    return target.parent / f"{one.name}.env"


def _draft(
    inventory: GpuInventory,
    proposals: Sequence[Proposal],
    registry: Registry,
    target: Path,
    *,
    from_running: bool,
) -> tuple[Draft, set[str]]:
    """The draft, and the names of the proposals that have GPUs in it."""
    from mic_supervisor.backends.registry import examples
    from mic_supervisor.config.draft import Draft, DraftModel
    from mic_supervisor.host.identity import host_name

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
    return Draft(title, gpus, models, settings, examples(registry.names())), placed


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
    from mic_supervisor.config.draft import DraftGpu

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


def _write(path: Path, text: str, mode: int, *, force: bool) -> None:
    """All of it or nothing; without `force` never over what came meanwhile."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _scratch(path, mode) as scratch:
            scratch.write_text(text, encoding="utf-8")
            if force:
                scratch.replace(path)
            else:
                os.link(scratch, path)
    except FileExistsError as error:
        raise MicError(
            f"cannot write {path}: it is there already", hint="replace it with: --force"
        ) from error
    except OSError as error:
        raise MicError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}",
            hint="run as root, or name another file with --output",
        ) from error


@contextmanager
def _scratch(path: Path, mode: int) -> Iterator[Path]:
    """A new empty file beside `path` with this mode, gone afterwards."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.fchmod(descriptor, mode)
        os.close(descriptor)
        yield scratch
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def _tell(
    target: Path,
    proposals: Sequence[Proposal],
    placed: set[str],
    found: Settings,
    registry: Registry,
) -> None:
    from mic_supervisor.cli.check import summary

    try:
        click.echo(f"Wrote {summary(wiring.load_config(found, target, registry))}.")
    except ConfigError:  # the draft is valid: it is the drop-ins beside it
        click.echo(f"Wrote {target}, which is not valid together with its drop-ins:")
        raise
    for one in proposals:
        if one.refused is not None:
            click.echo(f"- {printable(one.what)}: only as a comment: {printable(one.refused)}")
            continue
        where = (
            f" on GPU {','.join(map(str, one.gpus))}" if one.name in placed else ", on no GPU yet"
        )
        click.echo(f"- {printable(one.what)}: as model {one.name}{where}")
        if one.secrets:
            click.echo(f"    its environment is in {_env_path(target, one)}, readable by you alone")
        for step in (*one.stop, "mic-supervisor apply"):
            click.echo(f"    {printable(step)}")
    if sys.stdout.isatty() or not proposals:
        click.echo("Next: edit it, then: mic-supervisor check, plan, apply")
