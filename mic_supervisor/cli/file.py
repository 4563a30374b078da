"""What the file says: check, models, schema."""

from __future__ import annotations

from pathlib import Path

import click

from mic_supervisor.cli.common import json_option, print_json, print_rows
from mic_supervisor.errors import ConfigError, MicError


@click.command(name="check")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--env-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Validate the settings in this file, as a new mic.env; FILE only where it is given.",
)
def check(file: Path | None, env_file: Path | None) -> None:
    """Validate gpus.yaml, or FILE, with its drop-ins.

    Reports every error at once and needs no GPU, no Docker and no root. Paths and images that the
    file names are not looked for: plan does that.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.cli import wiring
    from mic_supervisor.config.merge import NOT_A_DROP_IN, not_read
    from mic_supervisor.views.config import summary

    found = wiring.settings(env_file)
    if env_file is not None:
        if found.unread is not None:
            raise MicError(found.unread, hint=f"look at its permissions: ls -l {env_file}")
        click.echo(f"{env_file}: the settings are valid")
        if file is None:
            return
    try:
        config = wiring.load_config(found, file, Registry())
    except ConfigError:
        if found.unread is not None:
            click.echo(f"note: {found.unread}; what it sets counts as unset", err=True)
        raise
    click.echo(f"{config.path}: {summary(config)}")
    for path in not_read(config.path):
        click.echo(f"warning: {path} is not read: {NOT_A_DROP_IN}", err=True)
        if path.suffix.lower() in (".yml", ".yaml") and not path.name.startswith("."):
            click.echo(f"    rename it: mv {path} {path.with_suffix('.yaml')}", err=True)
    for warning in config.warnings:
        click.echo(warning, err=True)


@click.command(name="models")
@json_option
def models(as_json: bool) -> None:
    """List the models that may run, their backends, and the GPUs that the file gives them.

    What really runs is shown by status.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.cli import wiring
    from mic_supervisor.host import host_name
    from mic_supervisor.views.config import models_document

    config = wiring.load_config(wiring.settings(), None, Registry())
    document = models_document(config, host_name())
    if as_json:
        print_json(document)
        return
    rows = [(row["name"], row["backend"], " ".join(row["gpus"])) for row in document["models"]]
    print_rows("MODEL BACKEND GPUS", rows, gives="MODEL")


@click.command(name="schema")
def schema() -> None:
    """Print the JSON Schema of gpus.yaml.

    Editors that know YAML use it for completion. Plug-ins that are installed are part of it.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.schema import json_schema

    print_json(json_schema(Registry()))
