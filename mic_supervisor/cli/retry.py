"""mic-supervisor retry"""

from __future__ import annotations

import click

from mic_supervisor.cli import operate, wiring


@click.command(name="retry")
@click.argument("name", metavar="INSTANCE")
def command(name: str) -> int:
    """Try an instance again now: no backoff, and a specification that failed gets another chance.

    What is ready is left alone. INSTANCE may be a model, for all of its instances. Exits with 0
    when they are ready, 3 when some are not, 1 when none is.
    """
    found = wiring.settings()
    client = operate.daemon(found)
    if client is not None:
        document = operate.ask(found, client, "retry", {"name": name})
        failed = document["failed_before"]
    else:
        chosen = operate.instances(found, name, f"retry {name}")
        failed = operate.failed(found, chosen)
        document = operate.alone(found, f"retry {name}", forgive=chosen)
    if not failed:
        click.echo(f"Nothing of {name} had failed: there was nothing to try again.")
    return operate.show(operate.named(document, name), document)
