"""apply and down: what the machine is made to be."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli.common import Duration, confirm, json_option, print_json, targets_option
from mic_supervisor.cli.progress import print_left_out, show
from mic_supervisor.cli.session import daemon, order
from mic_supervisor.config.env_file import setting
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.cli import wiring
    from mic_supervisor.model import ObservedState, ObservedWorkload


@click.command(name="apply")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@json_option
@targets_option
@click.option(
    "--pull",
    is_flag=True,
    help="Ask the registries for newer images, pull them, and replace what runs older ones; load "
    "newer files of models.",
)
@click.option("--rebind", is_flag=True, help="Bind the file's GPU numbers to today's GPUs anew.")
@click.option(
    "--lock-timeout",
    type=Duration(),
    default=30.0,
    metavar="DURATION",
    help="How long to wait for another writer; 30s.",
)
def command(
    file: Path | None,
    as_json: bool,
    targets: tuple[str, ...],
    pull: bool,
    rebind: bool,
    lock_timeout: float,
) -> int:
    """Converge once, with progress, and wait until everything is ready.

    Where the daemon runs it does the work, and this command follows; FILE must then be the
    daemon's own. Exits with 0 when all is ready, 3 when some instance failed and others did not,
    1 when all failed or nothing could be done.

    With --target only the instances of that model, or on that GPU, are changed, and whatever has
    to leave their GPUs; the rest is shown as left out, and counts for nothing. A daemon converges
    the rest all the same: then --target says what is waited for, and confirms no removal.

    With --pull, an image that cannot be pulled counts as a failure, and what runs goes on.
    """
    params: dict[str, Any] = {"targets": targets, "pull": pull, "rebind": rebind}
    config = None
    if (client := daemon()) is not None:  # it reads the file, and tells its errors
        client.close()
        if path := file or setting("MIC_CONFIG", "", os.environ):
            params["path"] = str(Path(path).absolute())
    else:
        from mic_supervisor.backends.registry import Registry
        from mic_supervisor.cli import wiring

        # First of all: a file with errors should be told at once, and not after the lock.
        config = wiring.load_config(wiring.settings(), file, Registry())
        params["path"] = str(config.path)
    document = order(
        "apply",
        params,
        command="apply",
        file=file,
        config=config,
        lock_timeout=lock_timeout,
        quiet=as_json,
    )
    if as_json:
        print_json(document)
    else:
        report(document, limited=bool(targets))
    return int(document["exit_code"])


def report(document: dict[str, Any], *, limited: bool) -> None:
    """How an apply ended, for people."""
    rows = document["instances"]
    show(rows, document)
    print_left_out(document)
    if limited and document["through_daemon"]:
        click.echo("The daemon converges everything else as well; --target chose what to wait for.")
    for text in document["remaining"]["warnings"]:
        click.echo(f"warning: {text}")
    not_pulled = {item["instance"] for item in document["failures"] if item.get("not_pulled")}
    bad = sum(not row["as_desired"] or row["id"] in not_pulled for row in rows)
    good = len(rows) - bad
    if limited and not rows:
        click.echo("Apply: the file asks for no instance there.")
        return
    click.echo(f"Apply: {good} as desired, {bad} not." if bad else f"Apply: {good} as desired.")


@click.command(name="down")
@click.option("--yes", is_flag=True, help="Do not ask.")
def down(yes: bool) -> int:
    """Remove every managed instance of this scope. The file stays as it is.

    Exits with 0 when nothing of ours is left, 1 otherwise.
    """
    from mic_supervisor.cli import wiring
    from mic_supervisor.config.document import Config
    from mic_supervisor.config.names import shown_id, with_shown_ids
    from mic_supervisor.daemon.client import Client

    found = wiring.settings()
    if Client.connect(found.socket, found.scope) is not None:
        raise MicError(
            "cannot remove what the daemon keeps running: it would start it again",
            hint="stop the daemon first: systemctl stop mic",
        )
    machine = wiring.machine(found, create_key=False)
    observed, ours = observe_ours(machine)
    _check_paused(machine, ours, observed)
    if not ours:
        click.echo("Nothing of ours runs here.")
        return 0
    models = {workload.identity.instance: workload.identity.model for workload in ours}
    names = sorted(shown_id(instance, model) for instance, model in models.items())
    click.echo(f"To be removed: {', '.join(names)}")
    confirm("Remove them?", yes=yes, otherwise="nothing removed")
    document = order("apply", {}, command="down", config=Config.nothing(found.config, asked=True))
    left = {row["id"] for row in document["instances"]}
    left |= {item["instance"] for item in document["remaining"]["actions"]}
    errors = {item["instance"]: item["reason"] for item in document["failures"]}
    blocked = {item["instance"]: item for item in document["remaining"]["blocked"]}
    for name in sorted(left):
        reason, hint = f"{name} is still there", None
        if name in blocked:
            reason, hint = f"cannot remove {name}: {blocked[name]['reason']}", blocked[name]["hint"]
        click.echo(with_shown_ids(f"error: {errors.get(name, reason)}", models), err=True)
        if hint is not None:
            click.echo(with_shown_ids(f"hint: {hint}", models), err=True)
    if not left:
        click.echo(f"Removed {len(names)}.")
    return 1 if left else 0


def observe_ours(machine: wiring.Machine) -> tuple[ObservedState, list[ObservedWorkload]]:
    """What is here, and which of it is ours. Raises MicError where a runtime cannot be read."""
    from mic_supervisor.converge.observe import observe
    from mic_supervisor.plan.assess import workloads

    observed = observe(machine.sources, time.time())
    for view in observed.runtimes:
        if view.error is not None:
            raise MicError(f"cannot read what runs: {view.error}", hint=view.hint)
    return observed, list(workloads(observed))


def _check_paused(
    machine: wiring.Machine, ours: list[ObservedWorkload], observed: ObservedState
) -> None:
    from mic_supervisor.config.names import shown_id
    from mic_supervisor.plan.selection import pause_on

    paused = machine.state.memory().paused
    indices = observed.inventory.indices
    for item in ours:
        identity = item.identity
        held = pause_on(paused, identity.model, identity.gpus, indices, observed.at)
        if held is not None:
            raise MicError(
                f"cannot remove {shown_id(identity.instance, identity.model)}: {held[0]}",
                hint=f"{held[1]}, or all of them: mic-supervisor resume --all",
            )
