"""mic-supervisor history"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import json_option, print_json


@click.command(name="history")
@click.argument("instance", required=False)
@json_option
def command(instance: str | None, as_json: bool) -> int:
    """The last 1,000 transitions, oldest first, with their cause and how long they took.

    INSTANCE is an instance's id or a model.
    """
    from dataclasses import asdict

    from mic_supervisor.daemon.history import read
    from mic_supervisor.host.identity import host_name

    found = wiring.settings()
    events = [
        asdict(event)
        for event in read(found.scope_state_dir / "history.jsonl")
        if instance in (None, event.instance, event.model)
    ]
    if as_json:
        print_json({"version": 1, "host": host_name(), "events": events})
        return 0
    for event in events:
        click.echo(_line(event))
    if not events:
        click.echo("Nothing is recorded yet.")
    return 0


def _line(event: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(event["at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    took = "" if event["seconds"] is None else f" ({event['seconds']:.1f} s)"
    kind, phase = event["kind"], event["phase"]
    if kind == "phase":
        was = f"{event['was']} -> " if event["was"] else ""
        text = f"{was}{phase}{took}" + (f": {event['text']}" if event["text"] else "")
    elif kind in ("begin", "done", "failed"):
        word = {"begin": "begins", "done": "done", "failed": "failed"}[kind]
        text = f"{phase} {word}{took}: {event['text']}"
    else:
        text = event["text"]
    return f"{at}  {event['instance']}: {text}"
