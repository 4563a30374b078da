"""mic-supervisor plan"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import wiring
from mic_supervisor.cli.params import targets_option

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config
    from mic_supervisor.model import DesiredState, ObservedState
    from mic_supervisor.plan.actions import Plan

EXIT_CHANGES = 2


@click.command(name="plan")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@targets_option
@click.option(
    "--detailed-exitcode",
    is_flag=True,
    help="Exit with 0 when there is nothing to do, 2 when there is, 1 on an error.",
)
def command(
    file: Path | None, as_json: bool, targets: tuple[str, ...], detailed_exitcode: bool
) -> int:
    """Show what apply would do, and why.

    Where the daemon runs it is asked, so that backoff and work in flight count. FILE is compared
    instead of the configured file, and nothing else changes by that. --target as for apply.
    """
    answer = _ask_daemon(file, targets)
    if answer is not None:
        if as_json:
            click.echo(json.dumps(answer["document"], indent=2, ensure_ascii=False))
        else:
            click.echo(answer["text"], nl=False)
            if answer["busy"]:
                click.echo(f"In progress: {', '.join(answer['busy'])}.")
            if targets:
                click.echo("The daemon converges what is left out as well, but for removals.")
        return EXIT_CHANGES if detailed_exitcode and not answer["empty"] else 0
    _, desired, observed, plan = make_plan(file, targets)
    if as_json:
        from mic_supervisor.converge.state import host_name
        from mic_supervisor.views.plan import plan_document

        document = plan_document(plan, host=host_name(), config_hash=desired.config_hash)
        click.echo(json.dumps(asdict(document), indent=2, ensure_ascii=False))
    else:
        from mic_supervisor.plan.render import to_text

        click.echo(to_text(plan, observed.inventory.indices), nl=False)
    return EXIT_CHANGES if detailed_exitcode and not plan.empty else 0


def _ask_daemon(file: Path | None, targets: tuple[str, ...]) -> dict[str, Any] | None:
    """The daemon's plan for its own file as it is now; None: look without it.

    A file that the daemon has rejected, or has not read yet, is compared here: the errors, or the
    changes, are what was asked for.
    """
    from mic_supervisor.daemon.client import Client

    found = wiring.settings()
    if file is not None and file.resolve() != found.config.resolve():
        return None
    client = Client.connect(found.socket)
    if client is None:
        return None
    config = wiring.load_config(found, file, Registry())
    answer: dict[str, Any] = client.call("plan", {"targets": targets}, timeout=10.0)
    return answer if answer["document"]["config_hash"] == config.hash else None


def make_plan(
    file: Path | None, targets: tuple[str, ...] = ()
) -> tuple[Config, DesiredState, ObservedState, Plan]:
    """Load, observe, ask the servers what they have loaded, and reconcile. Changes nothing."""
    from mic_supervisor.clocks import Clock
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.converge.observe import observe, with_health, with_holders
    from mic_supervisor.plan.assess import assess
    from mic_supervisor.plan.reconcile import reconcile

    found = wiring.settings()
    machine = wiring.machine(found, create_key=False)
    config = wiring.load_config(found, file, machine.registry)
    memory = machine.state.memory()
    own = file is None or file.resolve() == found.config.resolve()
    context = replace(
        machine.context,
        targets=wiring.targets(machine, config, targets, "plan"),
        unconfirmed=wiring.unconfirmed(machine, config) if own else None,
    )
    clock = Clock()
    observed = observe(machine.sources, clock.wall())
    provider = FileDesired(config, machine.registry, machine.settings.instance_data)
    desired = provider.state(observed.inventory, memory.bindings)
    observed = with_holders(observed, desired, machine.sources)
    assessments = assess(desired, observed, machine.context, memory)
    asked = [item for item in assessments if item.instance.placements]
    if asked:
        from mic_supervisor.converge.once import health_of_all

        indices = {gpu.uuid: gpu.index for gpu in observed.inventory.gpus}
        health = health_of_all(asked, memory, provider, machine.sources, indices, clock.steady())
        observed = with_health(observed, health)
        assessments = assess(desired, observed, machine.context, memory)
    plan = reconcile(desired, observed, memory, clock.steady(), context, assessments)
    return (
        config,
        desired,
        observed,
        plan.in_wall(clock.offset()),
    )
