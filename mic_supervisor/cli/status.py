"""mic-supervisor status"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.config.settings import Settings

EXIT_UNREADABLE = 1
EXIT_NOT_READY = 3

_STYLES = {"ready": "green", "unprobed": "default", "starting": "yellow", "loading": "yellow"}


@click.command(name="status")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(model: str | None, as_json: bool) -> int:
    """Desired against actual, one row per instance.

    MODEL shows one model only. Exits with 0 when all shown are ready, 3 otherwise, and 1 when the
    machine cannot be read.
    """
    document = read()
    if model is not None:
        document["instances"] = _only(model, document["instances"])
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        show(document)
    if document["unreadable"]:
        return EXIT_UNREADABLE
    return 0 if all(row["as_desired"] for row in document["instances"]) else EXIT_NOT_READY


def read() -> dict[str, Any]:
    """The daemon's document where one runs, else one made by looking now."""
    from mic_supervisor.daemon.client import Client

    found = wiring.settings()
    client = Client.connect(found.socket)
    if client is not None:
        document: dict[str, Any] = client.call("status", timeout=10.0)
        return document
    return look(found)


def _only(model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = [row for row in rows if model in (row["model"], row["id"])]
    if not chosen:
        known = ", ".join(sorted({row["model"] for row in rows}))
        raise MicError(
            f"cannot show {model}: neither the file nor this machine has an instance of it",
            hint=f"there is {known}" if known else None,
        )
    return chosen


def look(found: Settings) -> dict[str, Any]:
    """Observe and probe everything once, and hold it against the file."""
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.converge.documents import status_document
    from mic_supervisor.converge.observe import observe, with_health, with_holders
    from mic_supervisor.converge.once import health_of_all
    from mic_supervisor.converge.state import host_name
    from mic_supervisor.plan.assess import assess
    from mic_supervisor.plan.reconcile import reconcile
    from mic_supervisor.plan.status import instance_statuses

    machine = wiring.machine(found, create_key=False)
    config = wiring.load_config(found, None, machine.registry)
    memory = machine.state.memory()
    observed = observe(machine.sources, time.time())
    provider = FileDesired(config, machine.registry, machine.settings.instance_data)
    desired = provider.state(observed.inventory, memory.bindings)
    observed = with_holders(observed, desired, machine.sources)
    before = assess(desired, observed, machine.context)
    indices = {gpu.uuid: gpu.index for gpu in observed.inventory.gpus}
    health = health_of_all(before, provider, machine.sources, indices, observed.at)
    observed = with_health(observed, health)
    assessments = assess(desired, observed, machine.context)
    plan = reconcile(desired, observed, memory, observed.at, machine.context, assessments)
    return status_document(
        host=host_name(),
        config={
            "path": str(config.path),
            "hash": config.hash,
            "loaded_at": observed.at,
            "last_reload_ok": True,
            "error": None,
        },
        desired=desired,
        observed=observed,
        statuses=instance_statuses(desired, observed, assessments, plan, memory, {}),
        warnings=plan.warnings,
    )


def show(document: dict[str, Any]) -> None:
    """A table on a terminal, lines of tab-separated fields in a pipe."""
    rows = document["instances"]
    warnings = document["warnings"]
    told = [
        text for text in document["unreadable"] if not any(w.startswith(text) for w in warnings)
    ]
    for text in (*told, *warnings):
        click.echo(f"warning: {text}", err=True)
    if document["config"]["error"]:
        click.echo(f"{document['config']['error']}".rstrip(), err=True)
        click.echo("warning: the file has errors; what it said before runs", err=True)
    cells = [_cells(row, document["at"]) for row in rows]
    if not sys.stdout.isatty():
        for cell, row in zip(cells, rows, strict=True):
            click.echo("\t".join((*cell, row["reason"] or "")))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPU", "MODEL", "PHASE", "SYNC", "SINCE", "RST", "ENDPOINT"):
        table.add_column(name, overflow="fold", no_wrap=name in ("PHASE", "ENDPOINT"))
    for cell in cells:
        table.add_row(*cell[:2], f"[{_STYLES.get(cell[2], 'red')}]{cell[2]}", *cell[3:])
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        if row["reason"] and not row["as_desired"]:
            console.print(f"{row['id']}: {row['reason']}", soft_wrap=True, markup=False)
    for gpu in document["gpus"]:
        if gpu["state"] in ("foreign", "unmanaged", "lost", "unknown"):
            name = gpu["uuid"] if gpu["index"] is None else f"GPU {gpu['index']}"
            console.print(f"{name} is {gpu['state']}", markup=False)


def _cells(row: dict[str, Any], now: float) -> tuple[str, ...]:
    gpus = [str(gpu["uuid"] if gpu["index"] is None else gpu["index"]) for gpu in row["gpus"]]
    return (
        ",".join(gpus) or "-",
        row["model"],
        row["phase"],
        {"in_sync": "yes", "out_of_sync": "no"}.get(row["sync"], "?"),
        _ago(row["since"], now),
        str(row["restarts"]),
        row["endpoints"].get("http", "-"),
    )


def _ago(since: float | None, now: float) -> str:
    """ "42s", "12m", "3h", "5d", the largest unit only; "-" when unknown."""
    if since is None:
        return "-"
    seconds = max(0, int(now - since))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
