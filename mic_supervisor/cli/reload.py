"""mic-supervisor reload"""

from __future__ import annotations

import click

from mic_supervisor.cli import wiring
from mic_supervisor.errors import MicError


@click.command(name="reload")
@click.option("--wait", is_flag=True, help="Wait until the file was accepted or rejected.")
def command(wait: bool) -> int:
    """Have the daemon read its file again, and confirm what the file no longer names.

    What `systemctl reload mic` calls. With --wait it exits with 1 and prints the errors when the
    file is rejected; then what ran before keeps running. Without, it only says that the daemon was
    asked.
    """
    from mic_supervisor.daemon.client import Client

    found = wiring.settings()
    client = Client.connect(found.socket)
    if client is None:
        raise MicError(
            f"cannot reload: no daemon listens on {found.socket}",
            hint="start it with: systemctl start mic",
        )
    if not wait:
        client.send("reload")
        click.echo("The daemon reads its file now; `mic-supervisor status` tells the outcome.")
        return 0
    result = client.call("reload", timeout=60.0)
    if result["changed"]:
        click.echo(f"Generation {result['generation']} accepted.")
    else:
        click.echo(f"Generation {result['generation']} runs already; nothing changed.")
    return 0
