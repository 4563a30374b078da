"""Commands about instances as they are: restart, retry, pause, resume, logs.

Each but the last is one call of the session, and tells how it ended.
"""

from __future__ import annotations

import os
import time
from functools import partial
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING

import click

from mic_supervisor.cli.common import Whole, name_argument
from mic_supervisor.cli.progress import named, show
from mic_supervisor.cli.session import daemon, order
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mic_supervisor.converge.logs import Log

_MOST_WAITING = 1000  # lines that were read and not printed yet: a pager takes its time


@click.command(name="restart")
@name_argument("MODEL|INSTANCE|GPU", required=False)
@click.option("--all", "everything", is_flag=True, help="Every instance that is not paused.")
def restart(name: str | None, everything: bool) -> int:
    """Restart a model's instances, one GPU at a time, although nothing is wrong with them.

    With --all those of every model; of each model one GPU at a time. A model in a server of several
    is unloaded and loaded again; the others go on serving. Clears their backoff and what failed
    before. Exits with 0 when all are ready again, 3 when some are not, 1 when none is.
    """
    if (name is None) is not everything:
        raise click.UsageError("name a model, an instance or a GPU, or say --all")
    called = name or "--all"
    params = {"all": True} if everything else {"name": name}
    document = order("restart", params, command=f"restart {called}")
    return show(named(document, called), document)


@click.command(name="retry")
@name_argument("INSTANCE|MODEL|GPU")
def retry(name: str) -> int:
    """Try an instance again now: no backoff, and a specification that failed gets another chance.

    What is ready is left alone. A model stands for all of its instances, and may be one in a server
    of several. Exits with 0 when they are ready, 3 when some are not, 1 when none is.
    """
    document = order("retry", {"name": name}, command=f"retry {name}")
    if not document["failed_before"] and not document.get("begun"):  # an earlier daemon has none
        click.echo(f"Nothing of {name} had failed: there was nothing to try again.")
    return show(named(document, name), document)


@click.command(name="pause")
@name_argument("MODEL|GPU|INSTANCE")
@click.option("--reason", help="Shown wherever the pause is.")
def pause(name: str, reason: str | None) -> int:
    """Leave a model, or whatever is on a GPU, alone until it is resumed.

    Nothing of it is started, restarted, replaced, stopped or removed meanwhile, whatever the file
    says. Probes go on, and failures are not counted. A GPU is named by its index, UUID or PCI bus
    id; 3,4 and 0-3 name several. An instance stands for its GPUs. A change that has stopped
    something already is finished first; this command waits for that.
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
@name_argument("MODEL|GPU|INSTANCE", required=False)
@click.option("--all", "everything", is_flag=True, help="Whatever is paused.")
def resume(name: str | None, everything: bool) -> int:
    """Manage a paused model or GPU again, and wait until it is as the file says.

    Without a daemon nothing is started before the next apply. Exits with 0 when its instances are
    ready, 3 when some are not, 1 when none is.
    """
    if (name is None) is not everything:
        raise click.UsageError("name a model or a GPU, or say --all; `status` shows what is paused")
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


@click.command(name="logs")
@name_argument("INSTANCE|MODEL|GPU", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option(
    "-n", "--lines", type=Whole(0), metavar="N", help="Only the last so many lines of each."
)
@click.option("--previous", is_flag=True, help="The run before, or the replaced workload's.")
def logs(name: str | None, follow: bool, lines: int | None, previous: bool) -> int:
    """Show the log of an instance: container or process; without a name, of all of them.

    Of several instances each line has the id of its own before it; they come one after the other,
    and with --follow as they are written. A server of several models has one log, which is shown
    for each of them. Exits with 1 where no log can be read.
    """
    if follow and previous:
        raise click.UsageError(
            "--follow and --previous exclude each other: what ended adds nothing"
        )
    text = None if follow else _as_the_daemon_reads(name, lines, previous)
    for line in _as_read_here(name, lines, follow, previous) if text is None else text:
        click.echo(line)
    return 0


def _as_the_daemon_reads(name: str | None, lines: int | None, previous: bool) -> list[str] | None:
    """For members of the group mic, who may ask it, and may read neither Docker nor the state.
    None: this user reads the log without it.
    """
    if os.geteuid() == 0:
        return None
    try:
        client = daemon()
    except MicError:
        return None  # not a member; may be one of the group docker
    if client is None:
        return None
    answer = client.call("logs", {"name": name, "lines": lines, "previous": previous})
    _say_whose(name, answer["server"])
    if answer["cut"]:
        click.echo("Only its end is shown; root sees all of it.", err=True)
    found: list[str] = answer["lines"]
    return found


def _as_read_here(
    name: str | None, lines: int | None, follow: bool, previous: bool
) -> Iterable[str]:
    from mic_supervisor.cli import wiring
    from mic_supervisor.config.names import safe_name
    from mic_supervisor.converge.logs import Log, logs_of
    from mic_supervisor.converge.observe import observe

    machine = wiring.machine(wiring.settings(), create_key=False)

    def server_of(model: str) -> str | None:
        try:
            config = wiring.load_config(machine.settings, None, machine.registry)
        except MicError:
            return None  # as of a file without the model: there is no such instance
        server = config.servers.get(model)
        return None if server is None else safe_name(server)

    found = logs_of(name, observe(machine.sources, time.time()), server_of)
    _say_whose(name, found[0].server)
    read = partial(
        Log.lines,
        runtimes=machine.sources.runtimes,
        tail=lines,
        follow=follow,
        previous=previous,
    )
    return read(found[0]) if len(found) == 1 else _together(found, read, at_once=follow)


def _together(
    found: list[Log], read: Callable[[Log], Iterable[str]], *, at_once: bool
) -> Iterator[str]:
    """The lines of several, each with whose it is. Raises MicError where none can be read."""
    waiting: Queue[str | None] = Queue(_MOST_WAITING)
    errors: list[MicError] = []

    def lines_of(log: Log) -> Iterator[str]:
        try:
            yield from (f"{log.called} | {line}" for line in read(log))
        except MicError as error:
            errors.append(error)
            click.echo(f"error: {log.called}: {error.message}", err=True)

    def pump(log: Log) -> None:
        try:
            for line in lines_of(log):
                waiting.put(line)
        finally:
            waiting.put(None)  # else a defect of one would have all of them wait for ever

    if at_once:
        for log in found:
            Thread(target=pump, args=(log,), daemon=True).start()  # its calls block
        for _ in found:
            yield from iter(waiting.get, None)
    else:
        for log in found:
            yield from lines_of(log)
    if len(errors) == len(found):
        raise errors[0]


def _say_whose(name: str | None, server: str | None) -> None:
    if server is not None:
        click.echo(f"{name} is in {server}: this is the log of that server.", err=True)
