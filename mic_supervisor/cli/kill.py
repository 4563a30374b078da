"""mic-supervisor kill"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import Duration, Whole, confirm
from mic_supervisor.cli.session import daemon
from mic_supervisor.errors import MicError
from mic_supervisor.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mic_supervisor.config.settings import Settings
    from mic_supervisor.kill import Result

EXIT_STAYS = 70  # sysexits.h EX_SOFTWARE: it did not work, and nobody could have known
EXIT_DENIED = 77  # sysexits.h EX_NOPERM
_ANSWERS_IN = 5.0  # seconds for the daemon
_ORPHANS = "processes that hold a GPU and that nobody owns"


@click.command(name="kill")
@click.argument("pid", type=Whole(min=1), required=False)
@click.option("--all-orphans", is_flag=True, help=f"All {_ORPHANS}, instead of one PID.")
@click.option("--yes", is_flag=True, help="Do not ask. Needed where there is no terminal.")
@click.option(
    "--force",
    is_flag=True,
    help="Also a process that holds no GPU or whose owner is not known; never ours.",
)
@click.option(
    "--grace", type=Duration(), default="10s", show_default=True, help="From TERM to KILL."
)
def command(pid: int | None, all_orphans: bool, yes: bool, force: bool, grace: float) -> int:
    """End the process PID, which holds a GPU: TERM, then KILL.

    Returns when it is gone and no GPU lists it any more. What is signalled is the very process that
    was looked at, even if its number goes to another one meanwhile. An instance of ours is refused:
    stop ends it, and the daemon would only start it again.

    \b
    Exits with
      0   it is gone (with --all-orphans: all of them, or there were none)
      1   nothing was signalled: there is no such process, or it is refused
      64  wrong usage
      70  it is still there after KILL, or a GPU still lists it
      77  no permission to signal it
      130 the answer was no
    """
    if (pid is None) != all_orphans:
        raise click.UsageError("give either a PID or --all-orphans")
    from mic_supervisor.kill import chosen, describe, end, orphan_processes, refuse_outright, survey

    found = wiring.settings()
    if pid is not None:
        refuse_outright(pid, found.scope, found.lock_path)
    try:
        machine = wiring.machine(found, create_key=False)
    except MicError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        click.echo(f"error: cannot find out what is ours: {error.message}", err=True)
        click.echo("hint: run as root", err=True)
        return EXIT_DENIED
    try:
        seen = survey(machine.sources)
        if pid is not None:
            targets = [chosen(seen, pid, found.scope, force=force)]
        else:
            targets = orphan_processes(seen, found.scope, force=force)
            if not targets:
                click.echo(f"There are no {_ORPHANS}.")
                return 0
        for target in targets:
            click.echo(describe(target, seen))
        count = len(targets)
        question = "Kill it?" if count == 1 else f"Kill these {count}?"
        confirm(question, yes=yes, otherwise="not killed")
        results = end(targets, lambda: survey(machine.sources), grace=grace)
    finally:
        machine.sources.gpus.close()
    _record(found, results)
    return report(results, grace)


def _record(found: Settings, results: Sequence[Result]) -> None:
    """Into the history, by the daemon where one runs. What cannot be written undoes no kill."""
    import os
    import time

    from mic_supervisor.converge.events import Event
    from mic_supervisor.daemon.log import History
    from mic_supervisor.host import who_asks

    with suppress(MicError):
        for result in results:
            if result.outcome in ("gone", "changed", "denied"):
                continue  # nothing was done to it
            pid, gpus = f"PID {result.target.pid}", [hold.uuid for hold in result.target.holds]
            text = f"kill: {result.target.name} {'stays' if result.outcome == 'stays' else 'ended'}"
            if (client := daemon()) is not None:
                client.call("killed", {"pid": pid, "text": text, "gpus": gpus}, timeout=_ANSWERS_IN)
            elif os.geteuid() == 0 or os.access(found.scope_state_dir, os.W_OK):
                about = (time.time(), pid, text, "", tuple(gpus), "kill")
                event = Event("order", *about, by=who_asks(os.getuid(), os.getpid()))
                History(found.scope_state_dir / "history.jsonl").add(event)


def report(results: Sequence[Result], grace: float) -> int:
    """Says what became of each; the exit status."""
    code = 0
    for result in results:
        pid, name = result.target.pid, printable(result.target.name)
        gpus = ", ".join(str(hold.number) for hold in result.target.holds)
        match result.outcome:
            case "ended" if result.killed:
                click.echo(f"{pid} ({name}) was killed: it did not end within {grace:g} s of TERM")
            case "ended":
                click.echo(f"{pid} ({name}) ended")
            case "gone":
                click.echo(f"{pid} ({name}) had ended before")
            case "changed":
                click.echo(f"error: {pid} was left alone: another one owns it by now", err=True)
                code = code or 1
            case "denied":
                click.echo(
                    f"error: cannot kill {pid}: permission denied\nhint: run as root", err=True
                )
                code = EXIT_DENIED
            case "stays":
                click.echo(
                    f"error: cannot kill {pid}: it is still there after KILL; "
                    "it waits inside the kernel, in most cases for the driver\n"
                    "hint: see dmesg | grep -i -e xid -e nvrm; only a reboot helps for sure",
                    err=True,
                )
                code = EXIT_STAYS
            case "listed" | "unknown":
                how = "still lists it" if result.outcome == "listed" else "cannot be read"
                click.echo(
                    f"error: {pid} ({name}) ended, but GPU {gpus} {how}\n"
                    "hint: see mic-supervisor gpus, and dmesg | grep -i -e xid -e nvrm",
                    err=True,
                )
                code = EXIT_STAYS
    return code
