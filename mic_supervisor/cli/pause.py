"""mic-supervisor pause"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import operate, wiring

if TYPE_CHECKING:
    from mic_supervisor.config.settings import Settings


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
    found = wiring.settings()
    client = operate.daemon(found)
    if client is not None:
        params = {"names": [name], "reason": reason}
        document = operate.ask(found, client, "pause", params)
    else:
        document = _alone(found, name, reason)
    for called in document["named"]:
        click.echo(
            f"{called} is paused, until: mic-supervisor resume {called.removeprefix('GPU ')}"
        )
    operate.show(document["instances"], document | {"failures": [], "remaining": {"blocked": []}})
    return 0


def _alone(found: Settings, name: str, reason: str | None) -> dict[str, Any]:
    """Without a daemon there is nobody to tell: it is noted down for whoever converges next."""
    import time

    from mic_supervisor.plan.memory import Pause
    from mic_supervisor.plan.selection import select

    with operate.memory(found, f"mic-supervisor pause {name}") as kept:
        chosen = select([name], kept.names, f"pause {name}")
        pause = Pause(time.time(), reason)
        kept.paused = kept.paused.including(chosen.models, chosen.gpus, pause)
    return {"named": chosen.called(kept.indices), "instances": []}
