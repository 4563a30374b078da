"""mic-supervisor resume"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import operate, wiring
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.config.settings import Settings


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
    found = wiring.settings()
    names = [name] if name is not None else []
    client = operate.daemon(found)
    if client is None:
        resumed = _alone(found, names)
        _tell(resumed)
        click.echo("No daemon runs: the next `mic-supervisor apply` acts on it.")
        return 0
    document = operate.ask(found, client, "resume", {"names": names})
    _tell(document["resumed"])
    code = operate.show(document["instances"], document)
    return code if document["instances"] else 0


def _tell(resumed: list[str]) -> None:
    if not resumed:
        raise MicError("cannot resume: nothing is paused")
    click.echo(f"{', '.join(resumed)} {'is' if len(resumed) == 1 else 'are'} resumed.")


def _alone(found: Settings, names: list[str]) -> list[str]:
    from mic_supervisor.plan.pauses import to_resume

    with operate.memory(found, "mic-supervisor resume") as kept:
        chosen = to_resume(names, kept.names, kept.paused)
        kept.paused = kept.paused.without(chosen.models, chosen.gpus)
    return chosen.called(kept.indices)
