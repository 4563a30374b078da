"""mic-supervisor models"""

from __future__ import annotations

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import json_option, print_json, print_rows


@click.command(name="models")
@json_option
def command(as_json: bool) -> None:
    """List the models that may run, their backends, and the GPUs that the file gives them.

    What really runs is shown by status.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.host.identity import host_name
    from mic_supervisor.views.config import models_document

    config = wiring.load_config(wiring.settings(), None, Registry())
    document = models_document(config, host_name())
    if as_json:
        print_json(document)
        return
    rows = [(row["name"], row["backend"], " ".join(row["gpus"])) for row in document["models"]]
    print_rows("MODEL BACKEND GPUS", rows, gives="MODEL")
