"""mic-supervisor down"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import confirm
from mic_supervisor.cli.session import order
from mic_supervisor.config.document import Config
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.model import ObservedState, ObservedWorkload


@click.command(name="down")
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(yes: bool) -> int:
    """Remove every managed instance of this scope. The file stays as it is.

    Exits with 0 when nothing of ours is left, 1 otherwise.
    """
    from mic_supervisor.converge.observe import observe
    from mic_supervisor.daemon.client import Client
    from mic_supervisor.plan.assess import workloads

    found = wiring.settings()
    if Client.connect(found.socket) is not None:
        raise MicError(
            "cannot remove what the daemon keeps running: it would start it again",
            hint="stop the daemon first: systemctl stop mic",
        )
    machine = wiring.machine(found, create_key=False)
    observed = observe(machine.sources, time.time())
    for view in observed.runtimes:
        if view.error is not None:
            raise MicError(f"cannot tell what runs: {view.error}", hint=view.hint)
    ours = list(workloads(observed))
    _check_paused(machine, ours, observed)
    if not ours:
        click.echo("Nothing of ours runs here.")
        return 0
    names = sorted({workload.identity.instance for workload in ours})
    click.echo(f"To be removed: {', '.join(names)}")
    confirm("Remove them?", yes=yes)
    document = order("apply", {}, command="down", config=Config.nothing(found.config))
    left = {row["id"] for row in document["instances"]}
    left |= {item["instance"] for item in document["remaining"]["actions"]}
    errors = {item["instance"]: item["reason"] for item in document["failures"]}
    blocked = {item["instance"]: item for item in document["remaining"]["blocked"]}
    for name in sorted(left):
        reason, hint = f"{name} is still there", None
        if name in blocked:
            reason, hint = f"cannot remove {name}: {blocked[name]['reason']}", blocked[name]["hint"]
        click.echo(f"error: {errors.get(name, reason)}", err=True)
        if hint is not None:
            click.echo(f"hint: {hint}", err=True)
    if not left:
        click.echo(f"Removed {len(names)}.")
    return 1 if left else 0


def _check_paused(
    machine: wiring.Machine, ours: list[ObservedWorkload], observed: ObservedState
) -> None:
    from mic_supervisor.plan.pauses import held_by

    paused = machine.state.memory().paused
    indices = observed.inventory.indices
    for item in ours:
        identity = item.identity
        held = held_by(paused, identity.model, identity.gpus, indices, observed.at)
        if held is not None:
            raise MicError(
                f"cannot remove {identity.instance}: {held[0]}",
                hint=f"{held[1]}, or all of them: mic-supervisor resume --all",
            )
