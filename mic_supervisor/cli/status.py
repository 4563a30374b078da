"""mic-supervisor status"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring

if TYPE_CHECKING:
    from mic_supervisor.model import ObservedState
    from mic_supervisor.plan.status import InstanceStatus

EXIT_NOT_READY = 3


@click.command(name="status")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(model: str | None, as_json: bool) -> int:
    """Desired against actual, one row per instance.

    MODEL shows one model only. Exits with 0 when all shown are ready, 3 otherwise, and 1 when the
    machine cannot be read.
    """
    document, rows, observed = look(model)
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        show(rows, observed, document)
    return 0 if all(row.settled_well for row in rows) else EXIT_NOT_READY


def look(model: str | None) -> tuple[dict[str, Any], list[InstanceStatus], ObservedState]:
    """Observe and probe everything once, and hold it against the file."""
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.converge.observe import observe, with_health
    from mic_supervisor.converge.once import health_of_all
    from mic_supervisor.errors import MicError
    from mic_supervisor.plan.assess import assess
    from mic_supervisor.plan.reconcile import reconcile
    from mic_supervisor.plan.status import instance_statuses

    found = wiring.settings()
    machine = wiring.machine(found, create_key=False)
    config = wiring.load_config(found, None, machine.registry)
    memory = machine.state.memory()
    observed = observe(machine.sources, time.time())
    provider = FileDesired(config, machine.registry)
    desired = provider.state(observed.inventory, memory.bindings)
    before = assess(desired, observed, machine.context)
    indices = {gpu.uuid: gpu.index for gpu in observed.inventory.gpus}
    health = health_of_all(before, provider, machine.sources, indices, observed.at)
    observed = with_health(observed, health)
    assessments = assess(desired, observed, machine.context)
    plan = reconcile(desired, observed, memory, observed.at, machine.context, assessments)
    statuses = instance_statuses(desired, observed, assessments, plan, memory, {})
    rows = [row for row in statuses if model in (None, row.model, row.id)]
    if model is not None and not rows:
        known = sorted({*config.models})
        raise MicError(
            f"cannot show {model}: neither the file nor this machine has it",
            hint=f"the file knows {', '.join(known)}" if known else None,
        )
    return _document(config, desired, observed, rows), rows, observed


def _document(
    config: Any, desired: Any, observed: ObservedState, rows: list[InstanceStatus]
) -> dict[str, Any]:
    from mic_supervisor.converge.state import host_name
    from mic_supervisor.plan.status import gpu_rows, status_json

    indices = {gpu.uuid: gpu.index for gpu in observed.inventory.gpus}
    return {
        "version": 1,
        "host": host_name(),
        "config": {
            "path": str(config.path),
            "hash": config.hash,
            "loaded_at": observed.at,
            "last_reload_ok": True,
            "error": None,
        },
        "instances": [status_json(row, indices) for row in rows],
        "gpus": gpu_rows(desired, observed),
    }


def show(rows: list[InstanceStatus], observed: ObservedState, document: dict[str, Any]) -> None:
    """A table on a terminal, lines of tab-separated fields in a pipe."""
    from mic_supervisor.cli.progress import place_of

    indices = {gpu.uuid: gpu.index for gpu in observed.inventory.gpus}
    cells = [
        (
            place_of(row.gpus, indices).removeprefix("GPU "),
            row.model,
            row.phase.value,
            "yes" if row.sync == "in_sync" else "no" if row.sync == "out_of_sync" else "?",
            _ago(row.since, observed.at),
            str(row.restarts),
            row.endpoints.get("http", "-"),
            row.reason or "",
        )
        for row in rows
    ]
    for view in observed.runtimes:
        if view.error is not None:
            click.echo(f"warning: {view.runtime} cannot be read: {view.error}", err=True)
    if observed.inventory.error is not None:
        click.echo(f"warning: the GPUs cannot be read: {observed.inventory.error}", err=True)
    if not sys.stdout.isatty():
        for cell in cells:
            click.echo("\t".join(cell))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPU", "MODEL", "PHASE", "SYNC", "SINCE", "RST", "ENDPOINT"):
        table.add_column(name, overflow="fold", no_wrap=name in ("PHASE", "ENDPOINT"))
    console = Console(highlight=False)
    for cell in cells:
        style = {"ready": "green", "unprobed": "", "starting": "yellow", "loading": "yellow"}
        phase = f"[{style.get(cell[2], 'red')}]{cell[2]}" if style.get(cell[2], "red") else cell[2]
        table.add_row(cell[0], cell[1], phase, *cell[3:7])
    console.print(table)
    for row in rows:
        if row.reason and not row.settled_well:
            console.print(f"{row.id}: {row.reason}", soft_wrap=True, markup=False)
    for gpu in document["gpus"]:
        if gpu["state"] in ("foreign", "unmanaged", "lost", "unknown"):
            name = gpu["uuid"] if gpu["index"] is None else f"GPU {gpu['index']}"
            console.print(f"{name} is {gpu['state']}", markup=False)


def _ago(since: float | None, now: float) -> str:
    """ "42s", "12m", "3h", "5d", the largest unit only; "-" when unknown."""
    if since is None:
        return "-"
    seconds = max(0, int(now - since))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
