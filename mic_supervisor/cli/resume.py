"""mic-supervisor resume"""

from __future__ import annotations

import click

from mic_supervisor.cli import operate
from mic_supervisor.cli.session import order
from mic_supervisor.errors import MicError


@click.command(name="resume")
@click.argument("name", metavar="MODEL|GPU", required=False)
@click.option("--all", "everything", is_flag=True, help="Whatever is paused.")
def command(name: str | None, everything: bool) -> int:
    """Look after a paused model or GPU again, and wait until it is as the file says.

    Without a daemon nothing is started before the next apply. Exits with 0 when its instances are
    ready, 3 when some are not, 1 when none is.
    """
    if (name is None) is not everything:
        raise click.UsageError("name a model or a GPU, or say --all; `status` tells what is paused")
    names = [name] if name is not None else []
    document = order("resume", {"names": names}, command="resume")
    resumed = document["resumed"]
    if not resumed:
        raise MicError("cannot resume: nothing is paused")
    click.echo(f"{', '.join(resumed)} {'is' if len(resumed) == 1 else 'are'} resumed.")
    if not document["through_daemon"]:
        click.echo("No daemon runs: the next `mic-supervisor apply` acts on it.")
        return 0
    code = operate.show(document["instances"], document)
    return code if document["instances"] else 0
