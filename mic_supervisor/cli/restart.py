"""mic-supervisor restart"""

from __future__ import annotations

import click

from mic_supervisor.cli import operate, wiring


@click.command(name="restart")
@click.argument("name", metavar="MODEL|INSTANCE")
def command(name: str) -> int:
    """Restart a model's instances, one GPU at a time, although nothing is wrong with them.

    Clears their backoff and what failed before. Exits with 0 when all are ready again, 3 when some
    are not, 1 when none is.
    """
    found = wiring.settings()
    client = operate.daemon(found)
    if client is not None:
        document = operate.ask(found, client, "restart", {"name": name})
    else:
        chosen = operate.instances(found, name, f"restart {name}")
        document = operate.alone(found, f"restart {name}", forgive=chosen, force=chosen)
    return operate.show(operate.named(document, name), document)
