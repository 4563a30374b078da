"""mic-supervisor pause"""

from __future__ import annotations

import click

from mic_supervisor.cli import operate
from mic_supervisor.cli.session import order


@click.command(name="pause")
@click.argument("name", metavar="MODEL|GPU")
@click.option("--reason", help="What is told to whoever wonders.")
def command(name: str, reason: str | None) -> int:
    """Leave a model, or whatever is on a GPU, as it is until it is resumed.

    Nothing of it is started, restarted, replaced, stopped or removed meanwhile, whatever happens
    and whatever the file says; probes go on, and failures are not counted. A GPU is named by its
    index, UUID or PCI bus id; 3,4 and 0-3 name several. What is being done for it is finished first
    where something was stopped for it already; this command waits for that.
    """
    params = {"names": [name], "reason": reason}
    document = order("pause", params, command=f"pause {name}")
    for called in document["named"]:
        click.echo(
            f"{called} is paused, until: mic-supervisor resume {called.removeprefix('GPU ')}"
        )
    operate.show(document["instances"], document | {"failures": [], "remaining": {"blocked": []}})
    return 0
