"""drain and undrain: the whole host out of service, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.apply import report
from mic_supervisor.cli.common import confirm
from mic_supervisor.cli.session import Alone, daemon, order
from mic_supervisor.config.names import shown_id, with_shown_ids
from mic_supervisor.errors import ConfigError

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config


@click.command(name="drain")
@click.option("--until-reboot", is_flag=True, help="The next boot ends it.")
@click.option("--reason", help="Shown wherever it is said that the host is drained.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def drain(until_reboot: bool, reason: str | None, yes: bool) -> int:
    """Take this host out of service: stop everything of ours, and start nothing until undrain.

    Everything is withdrawn from the proxies first, then drained and stopped as the file says.
    Nothing is removed, and the file stays as it is. Neither a restart of the daemon nor apply ends
    it. Exits with 0 when nothing of ours runs any more, 1 otherwise.
    """
    config = _followed()
    client = daemon() or Alone(config=config)
    status = client.call("status", timeout=10.0)
    running = [row for row in status["instances"] if row["pid"] or row["endpoints"]]
    names = sorted(shown_id(row["id"], row["model"]) for row in running)
    nothing = "nothing of ours that can be told" if status["unreadable"] else "nothing of ours runs"
    click.echo(f"To be stopped: {', '.join(names) or nothing}")
    for text in status["unreadable"]:
        click.echo(f"warning: {text}", err=True)
    confirm("Drain this host?", yes=yes, otherwise="nothing stopped")
    params = {"until_reboot": until_reboot, "reason": reason}
    document = order("drain", params, command="drain", config=config)
    stopped, left = document["stopped"], document["left"]
    if stopped:
        called = sorted(shown_id(one, model) for one, model in stopped.items())
        click.echo(f"Stopped {len(called)}: {', '.join(called)}.")
    errors = {item["instance"]: item for item in document["failures"]}
    errors |= {item["instance"]: item for item in document["remaining"]["blocked"]}
    for name, model in sorted(left.items()):
        why = errors.get(name, {"reason": "it still runs", "hint": None})
        text = f"error: cannot stop {shown_id(name, model)}: {why['reason']}"
        click.echo(with_shown_ids(text, left), err=True)
        if why["hint"]:
            click.echo(with_shown_ids(f"hint: {why['hint']}", left), err=True)
    unknown = document.get("unreadable", [])  # an earlier daemon does not say
    for text in unknown:
        click.echo(f"error: cannot tell whether everything has stopped: {text}", err=True)
    until = ", or until it reboots" if until_reboot else ""
    click.echo(f"The host is drained, until: mic-supervisor undrain{until}")
    return 1 if left or unknown else 0


@click.command(name="undrain")
def undrain() -> int:
    """Put this host back into service, and wait until everything is as the file says.

    What failed before is tried again. Without a daemon nothing is started before the next apply.
    Exits as apply does.
    """
    document = order("undrain", {}, command="undrain", config=_followed())
    click.echo("The host is in service again.")
    if not document["through_daemon"]:
        click.echo("No daemon runs: the next `mic-supervisor apply` starts what the file asks for.")
        return 0
    report(document, limited=False)
    return int(document["exit_code"])


def _followed() -> Config:
    """What tells how each is stopped. A file with errors keeps nobody from stopping anything."""
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.document import Config
    from mic_supervisor.converge.state import StateDir
    from mic_supervisor.daemon.generations import last_good

    found, registry = wiring.settings(), Registry()
    try:
        return wiring.load_config(found, None, registry)
    except ConfigError:
        pass
    try:
        kept = last_good(StateDir(found.scope_state_dir), registry, found.environ)
    except ConfigError:
        kept = None
    return kept or Config.nothing(found.config)
