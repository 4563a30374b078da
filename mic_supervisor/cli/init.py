"""mic-supervisor init"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import write_file
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.text import printable

if TYPE_CHECKING:
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.model import GpuInventory
    from mic_supervisor.takeover import Proposal


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
    from mic_supervisor.config.env_file import format_env_file
    from mic_supervisor.takeover.draft import checked, env_path, first_file

    found = wiring.settings()
    target = Path(os.path.abspath(output)) if output is not None else found.config  # noqa: PTH100
    if not force:
        _must_be_new(target)
    registry = Registry()
    inventory, proposals, warnings = _running(found) if from_running else _gpus(found)
    _must_have_gpus(inventory)
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    proposals = checked(proposals, target, registry, found.environ)
    text, placed = first_file(inventory, proposals, registry, target, from_running=from_running)
    secrets = {
        env_path(target, one): format_env_file(dict(one.secrets))
        for one in proposals
        if one.secrets and one.refused is None
    }
    if not force:
        for path in secrets:
            _must_be_new(path)
    hint = "run as root, or name another file with --output"
    try:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise MicError(f"cannot write {target}: {error.strerror}", hint=hint) from error
    for path, pairs in secrets.items():
        write_file(path, pairs, mode=0o600, replace=force, hint=hint)
    write_file(target, text, mode=0o644, replace=force, hint=hint)
    _print_summary(target, proposals, placed, found, registry)
    return 0


def _gpus(found: Settings) -> tuple[GpuInventory, list[Proposal], list[str]]:
    from mic_supervisor.cli.gpus import read_gpus

    return read_gpus(found)[0], [], []


def _running(found: Settings) -> tuple[GpuInventory, list[Proposal], list[str]]:
    from mic_supervisor.config.settings import NO_DOCKER
    from mic_supervisor.kill import survey
    from mic_supervisor.runtimes.docker.engine import Engine
    from mic_supervisor.takeover.draft import running

    machine = wiring.machine(found, create_key=False)
    try:
        seen = survey(machine.sources)
    finally:
        machine.sources.gpus.close()
    engine = None
    if found.docker_host != NO_DOCKER:
        engine = Engine(found.docker_host, timeout=10.0, work_timeout=10.0)
    return seen.inventory, *running(seen, engine)


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


def _print_summary(
    target: Path,
    proposals: Sequence[Proposal],
    placed: set[str],
    found: Settings,
    registry: Registry,
) -> None:
    from mic_supervisor.takeover.draft import env_path
    from mic_supervisor.views.config import summary

    try:
        valid = summary(wiring.load_config(found, target, registry))
        click.echo(f"Wrote {target}: {valid}.")
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
            click.echo(f"    its environment is in {env_path(target, one)}, readable by you alone")
        if one.left:
            click.echo(f"    without {len(one.left)} of its settings: see the comments above it")
        for step in (*one.stop, "mic-supervisor apply"):
            click.echo(f"    {printable(step)}")
    if sys.stdout.isatty() or not proposals:
        click.echo("Next: edit it, then: mic-supervisor check, plan, apply")
