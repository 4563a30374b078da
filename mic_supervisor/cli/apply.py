"""mic-supervisor apply"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import wiring
from mic_supervisor.config.types import parse_duration

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.converge.events import Event, Events
    from mic_supervisor.converge.loop import Snapshot
    from mic_supervisor.plan.memory import Memory

EXIT_ALL_FAILED = 1
EXIT_SOME_FAILED = 3


class _Seconds(click.ParamType[float]):
    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(name="apply")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
@click.option("--rebind", is_flag=True, help="Bind the file's GPU numbers to today's GPUs anew.")
@click.option(
    "--lock-timeout",
    type=_Seconds(),
    default=30.0,
    metavar="DURATION",
    help="How long to wait for another writer; 30s.",
)
def command(file: Path | None, as_json: bool, rebind: bool, lock_timeout: float) -> int:
    """Converge once, with progress, and wait until everything is ready.

    Exits with 0 when all is ready, 3 when some instance failed and others did not, 1 when all
    failed or nothing could be done.
    """
    from mic_supervisor.converge.lock import writer

    found = wiring.settings()
    machine = wiring.machine(found, create_key=False)
    # Before the lock: a file with errors should be told at once, whoever converges.
    config = wiring.load_config(found, file, machine.registry)
    with writer(found.lock_path, "mic-supervisor apply", lock_timeout):
        machine = wiring.machine(found, create_key=True)
        snapshot, errors = converge_once(machine, config, rebind=rebind, quiet=as_json)
    if as_json:
        click.echo(json.dumps(_document(snapshot, errors), indent=2, ensure_ascii=False))
    else:
        _report(snapshot, errors)
    return exit_code(snapshot)


def converge_once(
    machine: wiring.Machine,
    config: Config,
    *,
    rebind: bool = False,
    quiet: bool = False,
    tell: Callable[[Event], None] | None = None,
) -> tuple[Snapshot, dict[str, Event]]:
    """Converge until there is nothing left to wait for; the last failure of each instance."""
    from mic_supervisor.cli.progress import follow
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.converge.events import Events

    began = time.time()
    memory = machine.state.memory()
    # Who calls apply asks for a try now: what failed before is not held against it.
    fresh = {
        name: replace(entry, failures=0, retry_at=None, attempt=None, failed=None, reason=None)
        for name, entry in memory.instances.items()
    }
    memory = replace(memory, instances=fresh, bindings={} if rebind else memory.bindings)
    inventory = machine.sources.gpus.observe()
    indices = {gpu.uuid: gpu.index for gpu in inventory.gpus}
    errors: dict[str, Event] = {}

    def note(event: Event) -> None:
        if event.kind == "failed":
            errors[event.instance] = event

    events = Events([note])
    if tell is not None:
        events.listeners.append(tell)
    with follow(indices, began) if not quiet and tell is None else _Silence() as shown:
        if not isinstance(shown, _Silence):
            events.listeners.append(shown)
        provider = FileDesired(config, machine.registry)
        snapshot = asyncio.run(_converge(machine, provider, memory, events, began))
    return snapshot, errors


async def _converge(
    machine: wiring.Machine,
    provider: FileDesired,
    memory: Memory,
    events: Events,
    began: float,
) -> Snapshot:
    from mic_supervisor.converge.loop import Converger
    from mic_supervisor.plan.settled import settled

    converger = Converger(
        sources=machine.sources,
        desired=provider,
        context=machine.context,
        memory=memory,
        save=machine.state.save_memory,
        events=events,
        clock=time.time,
    )

    def done(snapshot: Snapshot) -> bool:
        return settled(
            snapshot.desired,
            snapshot.plan,
            snapshot.statuses,
            snapshot.memory,
            failing=snapshot.failing,
            began=began,
            now=snapshot.at,
        )

    try:
        return await converger.run(until=done)
    finally:
        await converger.close()


def exit_code(snapshot: Snapshot) -> int:
    good = [row for row in snapshot.statuses if row.settled_well]
    bad = [row for row in snapshot.statuses if not row.settled_well]
    if not bad:
        return 0
    return EXIT_SOME_FAILED if good else EXIT_ALL_FAILED


def _report(snapshot: Snapshot, errors: dict[str, Event]) -> None:
    from mic_supervisor.cli.progress import outcome

    indices = {gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus}
    for row in snapshot.statuses:
        click.echo(outcome(row, indices))
        event = errors.get(row.id)
        if event is not None and not row.settled_well:
            if event.text not in (row.reason or ""):
                click.echo(f"    {event.text}")
            if event.hint:
                click.echo(f"    hint: {event.hint}")
    for item in snapshot.plan.blocked:
        if item.hint and item.instance not in errors:
            click.echo(f"    hint ({item.instance}): {item.hint}")
    for text in snapshot.plan.warnings:
        click.echo(f"warning: {text}")
    bad = sum(not row.settled_well for row in snapshot.statuses)
    good = len(snapshot.statuses) - bad
    click.echo(f"Apply: {good} as desired, {bad} not." if bad else f"Apply: {good} as desired.")


def _document(snapshot: Snapshot, errors: dict[str, Event]) -> dict[str, object]:
    from mic_supervisor.converge.state import host_name
    from mic_supervisor.plan import render
    from mic_supervisor.plan.status import status_json

    indices = {gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus}
    return {
        "version": 1,
        "host": host_name(),
        "config_hash": snapshot.desired.config_hash,
        "exit_code": exit_code(snapshot),
        "instances": [status_json(row, indices) for row in snapshot.statuses],
        "failures": [
            {"instance": name, "reason": event.text, "hint": event.hint}
            for name, event in sorted(errors.items())
        ],
        "remaining": render.to_json(
            snapshot.plan, host=host_name(), config_hash=snapshot.desired.config_hash
        ),
    }


class _Silence:
    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *_: object) -> None:
        return None
