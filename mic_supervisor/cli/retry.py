"""mic-supervisor retry"""

from __future__ import annotations

import click

from mic_supervisor.cli import operate
from mic_supervisor.cli.session import order


@click.command(name="retry")
@click.argument("name", metavar="INSTANCE")
def command(name: str) -> int:
    """Try an instance again now: no backoff, and a specification that failed gets another chance.

    What is ready is left alone. INSTANCE may be a model, for all of its instances. Exits with 0
    when they are ready, 3 when some are not, 1 when none is.
    """
    document = order("retry", {"name": name}, command=f"retry {name}")
    if not document["failed_before"]:
        click.echo(f"Nothing of {name} had failed: there was nothing to try again.")
    return operate.show(operate.named(document, name), document)
