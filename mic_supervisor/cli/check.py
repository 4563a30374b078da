"""mic-supervisor check"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import wiring
from mic_supervisor.errors import ConfigError

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config


@click.command(name="check")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def command(file: Path | None) -> None:
    """Validate gpus.yaml, or FILE, with its drop-ins.

    Reports every error at once and needs no GPU, no Docker and no root. Paths and images that the
    file names are not looked for: plan does that.
    """
    from mic_supervisor.backends.registry import Registry

    found = wiring.settings()
    try:
        config = wiring.load_config(found, file, Registry())
    except ConfigError:
        if found.unread is not None:
            click.echo(f"note: {found.unread}; what it sets counts as unset", err=True)
        raise
    click.echo(summary(config))


def summary(config: Config) -> str:
    """One line: "gpus.yaml: valid: 4 GPUs, 1 of them kept empty; 2 models; 1 drop-in"."""
    gpus = sum(len(entry.keys) for entry in config.entries)
    empty = sum(entry.model is None for entry in config.entries)
    parts = [_count(gpus, "GPU") + (f", {empty} of them kept empty" if empty else "")]
    parts.append(_count(len(config.models), "model"))
    if len(config.files) > 1:
        parts.append(_count(len(config.files) - 1, "drop-in"))
    return f"{config.path}: valid: {'; '.join(parts)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
