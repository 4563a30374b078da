"""The daemon: run, reload, history."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import json_option, name_argument, print_json
from mic_supervisor.cli.session import ask, daemon, named_gpus
from mic_supervisor.clocks import local
from mic_supervisor.config.names import is_called, shown_id, with_shown_ids
from mic_supervisor.errors import MicError
from mic_supervisor.host import start_daemon
from mic_supervisor.plan.words import beside

if TYPE_CHECKING:
    from pathlib import Path

    from mic_supervisor.converge.events import Event

_LOCK_TIMEOUT = 60.0  # seconds: an apply that runs now is let finish


@click.command(name="run")
def run() -> int:
    """The daemon: keep this machine as the file says, for as long as it is up.

    What systemd starts. Ends with SIGTERM; instances keep running unless MIC_ON_STOP=stop. Exits
    with 78 where the settings are refused: systemd does not start it again then.
    """
    from mic_supervisor.daemon.notify import Notifier

    try:
        _run()
    except MicError as error:
        hint = "" if error.hint is None else f"; {error.hint}"
        Notifier(os.environ).status(f"cannot run: {error.message}{hint}")
        raise
    return 0


def _run() -> None:
    import asyncio

    from mic_supervisor.daemon.log import set_up
    from mic_supervisor.daemon.supervisor import Supervisor
    from mic_supervisor.host.lock import writer
    from mic_supervisor.http.server import serving

    found = wiring.settings()
    serve = serving(found)
    set_up(found.log_level, found.log_format, journal="JOURNAL_STREAM" in os.environ)
    with writer(found.lock_path, "mic-supervisor run", _LOCK_TIMEOUT) as renew_lock:
        machine = wiring.machine(found, create_key=True)
        supervisor = Supervisor(
            settings=found,
            registry=machine.registry,
            sources=machine.sources,
            state=machine.state,
            context=machine.context,
            renew_lock=renew_lock,
        )
        # Not asyncio.run, which waits without an end for threads that hang.
        asyncio.new_event_loop().run_until_complete(supervisor.run(serve))


@click.command(name="reload")
@click.option("--wait", is_flag=True, help="Wait until the file was accepted or rejected.")
def reload(wait: bool) -> int:
    """Have the daemon read its file again, and confirm what the file no longer names.

    What `systemctl reload mic` calls. With --wait it exits with 1 and prints the errors when the
    file is rejected; then what ran before keeps running. Without, it only says that the daemon was
    asked.
    """
    from mic_supervisor.daemon.client import Client

    found = wiring.settings()
    client = Client.connect(found.socket, found.scope)
    if client is None:
        raise MicError(
            f"cannot reload: no daemon listens on {found.socket}",
            hint=f"start it with: {start_daemon()}",
        )
    if not wait:
        client.send("reload")
        click.echo("The daemon reads its file now; `mic-supervisor status` shows the outcome.")
        return 0
    result = client.call("reload", timeout=60.0)
    if result["changed"]:
        click.echo(f"Generation {result['generation']} accepted.")
    elif result.get("confirmed"):  # a daemon of an earlier version does not say
        click.echo(f"Generation {result['generation']} runs already, and is confirmed now.")
    else:
        click.echo(f"Generation {result['generation']} runs already; nothing changed.")
    return 0


@click.command(name="history")
@name_argument("INSTANCE|MODEL|GPU", required=False)
@json_option
def history(name: str | None, as_json: bool) -> int:
    """The last 1,000 transitions, oldest first, with their cause and how long they took.

    What a person ordered has the user who did. With a name, those of one instance, model or GPU
    only; exits with 1 where there is none of it.
    """
    from dataclasses import asdict

    from mic_supervisor.host import host_name

    everything = _recorded(wiring.settings().scope_state_dir / "history.jsonl")
    events = [asdict(event) for event in everything if name is None or _is_of(event, name)]
    if name is not None and not events:
        uuids = named_gpus(name, ask("status"))
        events = [asdict(event) for event in everything if uuids & {*event.gpus}]
    if name is not None and not events:
        known = sorted({shown_id(one.instance, one.model) for one in everything if one.model})
        raise MicError(
            f"cannot show the history of {name}: nothing is recorded of it",
            hint=f"there is {', '.join(known[:20])}" if known else None,
        )
    if as_json:
        print_json({"version": 1, "host": host_name(), "events": events})
        return 0
    models = {one.instance: one.model for one in everything}
    for event in events:
        click.echo(with_shown_ids(_line(event), models))
    if not events:
        click.echo("Nothing is recorded yet.")
    return 0


def _recorded(path: Path) -> list[Event]:
    """What is kept, with or without a daemon. Who may not read it asks the daemon."""
    from mic_supervisor import codec
    from mic_supervisor.converge.events import Event
    from mic_supervisor.daemon.log import read

    try:
        return [*read(path)]
    except MicError as error:
        client = daemon() if isinstance(error.__cause__, PermissionError) else None
        if client is None:
            raise
        return [codec.decode(Event, event) for event in client.call("history", timeout=10.0)]


def _is_of(event: Event, name: str) -> bool:
    return is_called(name, event.instance, [event.model] if event.model else [])


def _line(event: dict[str, Any]) -> str:
    at = local(event["at"]).strftime("%Y-%m-%d %H:%M:%S")
    took = "" if event["seconds"] is None else f" ({event['seconds']:.1f} s)"
    kind, phase = event["kind"], event["phase"]
    if kind == "phase":
        was = f"{event['was']} -> " if event["was"] else ""
        text = ": ".join(filter(None, (f"{was}{phase}{took}", beside(phase, event["text"]))))
    elif kind in ("begin", "done", "failed"):
        word = {"begin": "begins", "done": "done", "failed": "failed"}[kind]
        text = f"{phase} {word}{took}: {event['text']}"
    else:
        text = event["text"]
    by = f", by {event['by']}" if event["by"] else ""
    return f"{at}  {event['instance']}: {text}{by}"
