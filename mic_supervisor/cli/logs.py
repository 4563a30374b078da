"""mic-supervisor logs"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import wiring
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mic_supervisor.model import ObservedState, ObservedWorkload
    from mic_supervisor.runtimes import Runtime


@click.command(name="logs")
@click.argument("instance")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Only the last so many lines.")
@click.option("--previous", is_flag=True, help="The run before, or the replaced workload's.")
def command(instance: str, follow: bool, lines: int | None, previous: bool) -> int:
    """Show the log of an instance: container or process.

    INSTANCE is an instance's id, or a model that has one instance.
    """
    from mic_supervisor.converge.observe import observe

    if follow and previous:
        raise click.UsageError(
            "--follow and --previous exclude each other: what ended adds nothing"
        )
    machine = wiring.machine(wiring.settings(), create_key=False)
    observed = observe(machine.sources, time.time())
    found = _named(instance, observed)
    workload = found[0]
    runtime = machine.sources.runtimes[workload.runtime]
    if previous:
        text = _previous(found, runtime, lines)
    else:
        text = runtime.logs(workload, tail=lines, follow=follow)
    for line in text:
        click.echo(line)
    return 0


def _named(name: str, observed: ObservedState) -> list[ObservedWorkload]:
    """The instance's workloads, the one that runs, or ran last, first."""
    from mic_supervisor.plan.assess import is_alive, workloads

    everything = list(workloads(observed))
    ids = {item.identity.instance for item in everything if item.identity.instance == name}
    ids = ids or {item.identity.instance for item in everything if item.identity.model == name}
    if len(ids) > 1:
        raise MicError(f"{name} has several instances", hint=f"name one: {', '.join(sorted(ids))}")
    if not ids:
        for view in observed.runtimes:
            if view.error is not None:
                raise MicError(f"cannot look for {name}: {view.error}", hint=view.hint)
        known = sorted({item.identity.instance for item in everything})
        raise MicError(
            f"cannot show the log of {name}: there is no such instance",
            hint=f"there is {', '.join(known)}" if known else "nothing of ours runs here",
        )
    found = [item for item in everything if item.identity.instance in ids]
    return sorted(found, key=lambda item: (not is_alive(item), -(item.created_at or 0.0)))


def _previous(found: list[ObservedWorkload], runtime: Runtime, lines: int | None) -> Iterable[str]:
    """Of the workload that was replaced, else of the run before in the same workload."""
    if len(found) > 1:
        return runtime.logs(found[1], tail=lines)
    return runtime.previous_logs(found[0], tail=lines)
