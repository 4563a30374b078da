"""mic-supervisor kill"""

from __future__ import annotations

import os
import sys
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.params import Duration
from mic_supervisor.config.diagnostics import printable
from mic_supervisor.errors import MicError
from mic_supervisor.model import OwnerKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mic_supervisor.config.settings import Settings
    from mic_supervisor.kill import Result, Survey, Target

EXIT_STAYS = 70  # sysexits.h EX_SOFTWARE: it did not work, and nobody could have known
EXIT_DENIED = 77  # sysexits.h EX_NOPERM
_ORPHANS = "processes that hold a GPU and that nobody owns"


@click.command(name="kill")
@click.argument("pid", type=click.IntRange(min=1), required=False)
@click.option("--all-orphans", is_flag=True, help=f"All {_ORPHANS}, instead of one PID.")
@click.option("--yes", is_flag=True, help="Do not ask. Needed where there is no terminal.")
@click.option(
    "--force",
    is_flag=True,
    help="Also what holds no GPU, or whose it is cannot be told; never an instance of ours.",
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
    """
    if (pid is None) != all_orphans:
        raise click.UsageError("give either a PID or --all-orphans")
    from mic_supervisor.kill import end, survey

    found = wiring.settings()
    if pid is not None:
        _refuse_outright(pid, found)
    try:
        machine = wiring.machine(found, create_key=False)
    except MicError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        click.echo(f"error: cannot tell what is ours: {error.message}", err=True)
        click.echo("hint: run as root", err=True)
        return EXIT_DENIED
    try:
        look = survey(machine.sources)
        if pid is not None:
            targets = [_one(look, pid, found.scope, force=force)]
        else:
            targets = _orphans(look, found.scope, force=force)
            if not targets:
                click.echo(f"There are no {_ORPHANS}.")
                return 0
        for target in targets:
            click.echo(describe(target, look))
        _confirm(targets, yes=yes)
        results = end(targets, lambda: survey(machine.sources), grace=grace)
    finally:
        machine.sources.gpus.close()
    return report(results, grace)


def _refuse_outright(pid: int, found: Settings) -> None:
    from mic_supervisor.host.lock import lock_holder

    if pid == 1:
        _refuse(pid, "it is the machine's first process, and everything ends with it")
    if pid == os.getpid():
        _refuse(pid, "it is this very command")
    holder = lock_holder(found.lock_path)
    if holder is not None and holder.pid == pid:
        daemon = holder.command == "mic-supervisor run"
        _refuse(
            pid,
            f"it is the supervisor of scope {found.scope} ({holder.command})",
            "stop it with: systemctl stop mic"
            if daemon
            else "let it finish, or press Ctrl-C there",
        )


def _one(look: Survey, pid: int, scope: str, *, force: bool) -> Target:
    target = look.target(pid)
    if target is None:
        listed = [
            str(gpu.index)
            for gpu in look.inventory.gpus
            for p in gpu.processes or ()
            if p.pid == pid
        ]
        if listed:
            raise MicError(
                f"there is no process {pid}, although GPU {', '.join(listed)} lists it",
                hint="the driver has not cleaned up: see dmesg | grep -i -e xid -e nvrm",
            )
        raise MicError(f"there is no process {pid}")
    _refuse_ours(look, target, scope, force=force)
    if not force:
        _refuse_untold(look, target)
        if not target.holds:
            if look.inventory.error is not None:
                _refuse(
                    pid,
                    f"whether it holds a GPU cannot be told: {look.inventory.told}",
                    "end it all the same with: --force",
                )
            _refuse(
                pid, f"{printable(target.name)} holds no GPU", "end it all the same with: --force"
            )
    return target


def _orphans(look: Survey, scope: str, *, force: bool) -> list[Target]:
    if look.inventory.error is not None:
        raise MicError(look.inventory.error, hint=look.inventory.hint)
    targets = []
    for pid in look.pids(OwnerKind.ORPHAN):
        target = look.target(pid)
        if target is None or target.owner.kind is not OwnerKind.ORPHAN or _is_kin(target, scope):
            continue
        if not force:
            _refuse_untold(look, target)
        targets.append(target)
    return targets


def _refuse_ours(look: Survey, target: Target, scope: str, *, force: bool) -> None:
    managed = target.owner.kind is OwnerKind.MANAGED
    ours = target.owner.instance if managed else look.kept_by(target.pid)
    if ours is not None:
        workload = look.workload_of(ours)
        hint = None
        if workload is not None:
            uuids = workload.identity.gpus
            indices = [index for uuid in uuids if (index := look.index_of(uuid)) is not None]
            where = f" --gpu {indices[0]}" if indices else ""
            hint = f"stop it with: mic-supervisor stop {workload.identity.model}{where}"
        _refuse(target.pid, f"it belongs to our instance {ours}", hint)
    if _is_kin(target, scope) and not force:
        _refuse(
            target.pid,
            f"it belongs to instance {target.instance} of scope {target.scope}",
            f"look at it with: MIC_SCOPE={target.scope} mic-supervisor status",
        )


def _is_kin(target: Target, scope: str) -> bool:
    """Whether it is another scope's: nobody's as far as this one knows, and yet not nobody's."""
    return bool(target.instance) and target.scope not in (None, scope)


def _refuse_untold(look: Survey, target: Target) -> None:
    """A runtime that cannot be read may well call it its own."""
    if target.owner.kind is OwnerKind.UNKNOWN:
        _refuse(target.pid, "whose it is cannot be read", "run as root, or say --force")
    contained = target.owner.kind is OwnerKind.CONTAINER
    for runtime, cause in look.causes:
        if (runtime == "docker") == contained:
            _refuse(
                target.pid,
                f"whether it is one of ours cannot be told: {cause}",
                "mend that first, or say --force",
            )


def _refuse(pid: int, why: str, hint: str | None = None) -> NoReturn:
    raise MicError(f"cannot kill {pid}: {why}", hint=hint)


def describe(target: Target, look: Survey) -> str:
    """ "PID 4121 (python) on GPU 1 (18.2 GiB), since 2026-11-22 10:14:02, of nobody"."""
    holds = ", ".join(f"GPU {hold.index} ({_gib(hold.used)})" for hold in target.holds)
    since = datetime.fromtimestamp(target.since).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"PID {target.pid} ({printable(target.name)}) on {holds or 'no GPU'}, since {since}, "
        f"{printable(_owner(target, look))}"
    )


def _owner(target: Target, look: Survey) -> str:
    ref = target.owner.ref or "?"
    if target.owner.kind is OwnerKind.CONTAINER:
        name = look.container_name(ref)
        called = f"{name} ({ref[:12]})" if name else ref[:12]
        return f"of container {called}: its manager may start it again"
    if target.owner.kind is OwnerKind.UNIT:
        again = ": its manager may start it again" if ref.endswith(".service") else ""
        return f"of unit {ref}{again}"
    if target.owner.kind is OwnerKind.UNKNOWN:
        return "of an unknown owner"
    if target.instance:
        return f"left over from instance {target.instance}"
    return "of nobody"


def _confirm(targets: Sequence[Target], *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise MicError("cannot ask whether to go on: this is no terminal", hint="say --yes")
    click.confirm("Kill it?" if len(targets) == 1 else f"Kill these {len(targets)}?", abort=True)


def report(results: Sequence[Result], grace: float) -> int:
    """Says what became of each; the exit status."""
    code = 0
    for result in results:
        pid, name = result.target.pid, printable(result.target.name)
        gpus = ", ".join(str(hold.index) for hold in result.target.holds)
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


def _gib(count: int | None) -> str:
    return "memory unknown" if count is None else f"{count / (1 << 30):.1f} GiB"
