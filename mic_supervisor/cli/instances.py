"""Commands about instances as they are: restart, retry, pause, resume.

Each is one call of the session, and tells how it ended.
"""

from __future__ import annotations

import click

from mic_supervisor.cli.progress import named, show
from mic_supervisor.cli.session import order
from mic_supervisor.errors import MicError


@click.command(name="restart")
@click.argument("name", metavar="MODEL|INSTANCE")
def restart(name: str) -> int:
    """Restart a model's instances, one GPU at a time, although nothing is wrong with them.

    Clears their backoff and what failed before. Exits with 0 when all are ready again, 3 when some
    are not, 1 when none is.
    """
    document = order("restart", {"name": name}, command=f"restart {name}")
    return show(named(document, name), document)


@click.command(name="retry")
@click.argument("name", metavar="INSTANCE")
def retry(name: str) -> int:
    """Try an instance again now: no backoff, and a specification that failed gets another chance.

    What is ready is left alone. INSTANCE may be a model, for all of its instances. Exits with 0
    when they are ready, 3 when some are not, 1 when none is.
    """
    document = order("retry", {"name": name}, command=f"retry {name}")
    if not document["failed_before"]:
        click.echo(f"Nothing of {name} had failed: there was nothing to try again.")
    return show(named(document, name), document)


@click.command(name="pause")
@click.argument("name", metavar="MODEL|GPU")
@click.option("--reason", help="Shown wherever the pause is.")
def pause(name: str, reason: str | None) -> int:
    """Leave a model, or whatever is on a GPU, alone until it is resumed.

    Nothing of it is started, restarted, replaced, stopped or removed meanwhile, whatever the file
    says. Probes go on, and failures are not counted. A GPU is named by its index, UUID or PCI bus
    id; 3,4 and 0-3 name several. A change that has stopped something already is finished first;
    this command waits for that.
    """
    params = {"names": [name], "reason": reason}
    document = order("pause", params, command=f"pause {name}")
    for called in document["named"]:
        click.echo(
            f"{called} is paused, until: mic-supervisor resume {called.removeprefix('GPU ')}"
        )
    show(document["instances"], document | {"failures": [], "remaining": {"blocked": []}})
    return 0


@click.command(name="resume")
@click.argument("name", metavar="MODEL|GPU", required=False)
@click.option("--all", "everything", is_flag=True, help="Whatever is paused.")
def resume(name: str | None, everything: bool) -> int:
    """Manage a paused model or GPU again, and wait until it is as the file says.

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
    code = show(document["instances"], document)
    return code if document["instances"] else 0
