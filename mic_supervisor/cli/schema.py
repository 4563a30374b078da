"""mic-supervisor schema"""

from __future__ import annotations

import click

from mic_supervisor.cli.common import print_json


@click.command(name="schema")
def command() -> None:
    """Print the JSON Schema of gpus.yaml.

    Editors that know YAML use it for completion. Plug-ins that are installed are part of it.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.schema import json_schema

    print_json(json_schema(Registry()))
