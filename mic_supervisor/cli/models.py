"""mic-supervisor models"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import wiring

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config


@click.command(name="models")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """List the models that may run, their backends, and the GPUs that the file gives them.

    What really runs is shown by status.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.host.identity import host_name

    config = wiring.load_config(wiring.settings(), None, Registry())
    if as_json:
        click.echo(json.dumps(document(config, host_name()), indent=2, ensure_ascii=False))
        return
    for line in lines(config, table=sys.stdout.isatty()):
        click.echo(line)


def document(config: Config, host: str) -> dict[str, object]:
    """`models --json`. A model's `gpus` has one text for each instance, "3,4" for one over two."""
    places = _places(config)
    return {
        "version": 1,
        "host": host,
        "config_hash": config.hash,
        "models": [
            {"name": model.name, "backend": model.backend, "gpus": places[model.name]}
            for model in config.models.values()
        ],
    }


def lines(config: Config, *, table: bool) -> list[str]:
    """Name, backend and GPUs: aligned below a heading, or parted by tabs for another program."""
    places = _places(config)
    rows = [
        (model.name, model.backend, " ".join(places[model.name]))
        for model in config.models.values()
    ]
    if not table:
        return ["\t".join(row) for row in rows]
    from mic_supervisor.config.diagnostics import width

    shown = [("MODEL", "BACKEND", "GPUS"), *((a, b, c or "-") for a, b, c in rows)]
    name, backend = (max(width(row[column]) for row in shown) for column in range(2))
    return [f"{_pad(row[0], name)}  {_pad(row[1], backend)}  {row[2]}" for row in shown]


def _pad(text: str, size: int) -> str:
    from mic_supervisor.config.diagnostics import width

    return text + " " * (size - width(text))


def _places(config: Config) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {name: [] for name in config.models}
    for entry in config.entries:
        if entry.model is not None:
            places[entry.model].append(",".join(key.value for key in entry.keys))
    return places
