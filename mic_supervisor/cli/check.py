"""mic-supervisor check"""

from __future__ import annotations

from pathlib import Path

import click

from mic_supervisor.cli import wiring
from mic_supervisor.errors import ConfigError


@click.command(name="check")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def command(file: Path | None) -> None:
    """Validate gpus.yaml, or FILE, with its drop-ins.

    Reports every error at once and needs no GPU, no Docker and no root. Paths and images that the
    file names are not looked for: plan does that.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.views.config import summary

    found = wiring.settings()
    try:
        config = wiring.load_config(found, file, Registry())
    except ConfigError:
        if found.unread is not None:
            click.echo(f"note: {found.unread}; what it sets counts as unset", err=True)
        raise
    click.echo(f"{config.path}: {summary(config)}")
