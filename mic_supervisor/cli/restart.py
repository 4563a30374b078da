"""mic-supervisor restart"""

from __future__ import annotations

import click

from mic_supervisor.cli import operate
from mic_supervisor.cli.session import order


@click.command(name="restart")
@click.argument("name", metavar="MODEL|INSTANCE")
def command(name: str) -> int:
    """Restart a model's instances, one GPU at a time, although nothing is wrong with them.

    Clears their backoff and what failed before. Exits with 0 when all are ready again, 3 when some
    are not, 1 when none is.
    """
    document = order("restart", {"name": name}, command=f"restart {name}")
    return operate.show(operate.named(document, name), document)
