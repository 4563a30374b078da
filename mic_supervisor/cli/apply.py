"""mic-supervisor apply"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import wiring
from mic_supervisor.cli.params import Duration, targets_option

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.converge.events import Event, Events
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.daemon.client import Client
    from mic_supervisor.plan.memory import Memory


@click.command(name="apply")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
@targets_option
@click.option("--rebind", is_flag=True, help="Bind the file's GPU numbers to today's GPUs anew.")
@click.option(
    "--lock-timeout",
    type=Duration(),
    default=30.0,
    metavar="DURATION",
    help="How long to wait for another writer; 30s.",
)
def command(
    file: Path | None, as_json: bool, targets: tuple[str, ...], rebind: bool, lock_timeout: float
) -> int:
    """Converge once, with progress, and wait until everything is ready.

    Where the daemon runs it does the work, and this command follows; FILE must then be the
    daemon's own. Exits with 0 when all is ready, 3 when some instance failed and others did not,
    1 when all failed or nothing could be done.

    With --target only the instances of that model, or on that GPU, are changed, and whatever has
    to leave their GPUs; the rest is told as left out, and counts for nothing. A daemon converges
    the rest all the same: then --target says what is waited for, and confirms no removal.
    """
    from mic_supervisor.daemon.client import Client

    found = wiring.settings()
    registry = Registry()
    # First of all: a file with errors should be told at once, whoever converges.
    config = wiring.load_config(found, file, registry)
    client = Client.connect(found.socket)
    if client is not None:
        indices = {} if as_json else indices_of(found)
        params = {"targets": targets, "rebind": rebind}
        document = _through_daemon(client, config, indices, params, quiet=as_json)
        document["through_daemon"] = True
    else:
        document = _alone(found, config, targets, rebind, quiet=as_json, patience=lock_timeout)
        document["through_daemon"] = False
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _report(document, limited=bool(targets))
    return int(document["exit_code"])


def indices_of(found: Settings) -> dict[str, int]:
    """What the daemon calls its GPUs. It has one answer per connection, and may go meanwhile."""
    from mic_supervisor.daemon.client import Client

    client = Client.connect(found.socket)
    gpus = client.call("status", timeout=10.0)["gpus"] if client is not None else ()
    return {gpu["uuid"]: gpu["index"] for gpu in gpus if gpu["index"] is not None}


def _through_daemon(
    client: Client, config: Config, indices: dict[str, int], asked: dict[str, Any], *, quiet: bool
) -> dict[str, Any]:
    from mic_supervisor.cli.progress import follow

    params = {"path": str(config.path), "hash": config.hash, **asked}
    with follow(indices, quiet=quiet) as shown:
        document: dict[str, Any] = client.call("apply", params, tell=shown)
    return document


def _alone(
    found: Settings,
    config: Config,
    names: tuple[str, ...],
    rebind: bool,
    *,
    quiet: bool,
    patience: float,
) -> dict[str, Any]:
    from mic_supervisor.converge.lock import writer
    from mic_supervisor.converge.state import host_name
    from mic_supervisor.daemon.generations import accept
    from mic_supervisor.views.apply import apply_document

    with writer(found.lock_path, "mic-supervisor apply", patience):
        machine = wiring.machine(found, create_key=True)
        targets = wiring.targets(machine, config, names, "apply")
        accept(machine.state, config, confirmed=targets is None)
        context = replace(machine.context, targets=targets)
        snapshot, errors = converge_once(
            replace(machine, context=context), config, rebind=rebind, quiet=quiet
        )
    document = apply_document(snapshot, errors, host_name(), targets, snapshot.plan.left_out)
    return asdict(document)


def converge_once(
    machine: wiring.Machine,
    config: Config,
    *,
    rebind: bool = False,
    quiet: bool = False,
    forgive: Collection[str] | None = None,
) -> tuple[Snapshot, dict[str, Event]]:
    """Converge until there is nothing left to wait for; the last failure of each instance.

    What failed before is not held against the instances to `forgive`; None is all of them.
    """
    from mic_supervisor import clocks
    from mic_supervisor.cli.progress import follow
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.converge.events import Events

    began = clocks.steady()
    memory = machine.state.memory()
    provider = FileDesired(config, machine.registry, machine.settings.instance_data)
    inventory = machine.sources.gpus.observe()
    if forgive is None and (targets := machine.context.targets) is not None:
        desired = provider.state(inventory, {} if rebind else memory.bindings)
        forgive = {item.id for item in desired.instances if targets.has(item)}
    # Who calls apply asks for a try now: what failed before is not held against it.
    fresh = {
        name: replace(entry, failures=0, retry_at=None, attempt=None, failed=None, reason=None)
        if forgive is None or name in forgive
        else entry
        for name, entry in memory.instances.items()
    }
    memory = replace(memory, instances=fresh, bindings={} if rebind else memory.bindings)
    indices = {gpu.uuid: gpu.index for gpu in inventory.gpus}
    errors: dict[str, Event] = {}

    def note(event: Event) -> None:
        if event.kind == "failed":
            errors[event.instance] = event

    with follow(indices, quiet=quiet) as shown:
        events = Events([note, shown])
        snapshot = asyncio.run(_converge(machine, provider, memory, events, began))
    return snapshot, errors


async def _converge(
    machine: wiring.Machine,
    provider: FileDesired,
    memory: Memory,
    events: Events,
    began: float,
) -> Snapshot:
    from mic_supervisor.clocks import Clock
    from mic_supervisor.converge.loop import Converger
    from mic_supervisor.plan.settled import settled

    converger = Converger(
        sources=machine.sources,
        desired=provider,
        context=machine.context,
        memory=memory,
        save=machine.state.save_memory,
        events=events,
        clock=Clock(),
    )

    def done(snapshot: Snapshot) -> bool:
        only = None
        if (targets := machine.context.targets) is not None:
            only = {row.id for row in targets.rows(snapshot.desired, snapshot.statuses)}
        return settled(
            snapshot.desired,
            snapshot.plan,
            snapshot.statuses,
            snapshot.memory,
            failing=snapshot.failing,
            began=began,
            now=snapshot.now,
            only=only,
        )

    try:
        return await converger.run(until=done)
    finally:
        await converger.close()


def _report(document: dict[str, Any], *, limited: bool) -> None:
    from mic_supervisor.plan.render import left_out_line

    rows = document["instances"]
    show_rows(rows, document)
    for item in document["left_out"]:
        click.echo(left_out_line(item["instance"], item["action"], item["cause"]))
    if limited and document["through_daemon"]:
        click.echo("The daemon converges everything else as well; --target chose what to wait for.")
    for text in document["remaining"]["warnings"]:
        click.echo(f"warning: {text}")
    bad = sum(not row["as_desired"] for row in rows)
    good = len(rows) - bad
    if limited and not rows:
        click.echo("Apply: the file asks for no instance there.")
        return
    click.echo(f"Apply: {good} as desired, {bad} not." if bad else f"Apply: {good} as desired.")


def show_rows(rows: Iterable[dict[str, Any]], document: dict[str, Any]) -> None:
    """How it ended: a line per instance, and under it what went wrong and the way out."""
    from mic_supervisor.cli.progress import outcome

    failures = {item["instance"]: item for item in document["failures"]}
    hints = {item["instance"]: item["hint"] for item in document["remaining"]["blocked"]}
    for row in rows:
        click.echo(outcome(row))
        failure = failures.get(row["id"], {"reason": "", "hint": None})
        if row["as_desired"]:
            continue
        if failure["reason"] and failure["reason"] not in (row["reason"] or ""):
            click.echo(f"    {failure['reason']}")
        hint = failure["hint"] or hints.get(row["id"])
        if hint:
            click.echo(f"    hint: {hint}")
