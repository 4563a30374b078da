"""mic-supervisor gpus"""

from __future__ import annotations

import sys
from dataclasses import asdict
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import json_option, print_json, table
from mic_supervisor.errors import MicError
from mic_supervisor.model import Gpu, GpuInventory, GpuProcess, Owner, OwnerKind
from mic_supervisor.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mic_supervisor.config.settings import Settings
    from mic_supervisor.model import RuntimeView

_UNLISTED = {
    None: "its holders cannot be read",
    "implausible": "its holders are unknown: what the driver lists cannot be true",
    "untold": "its holders are unknown: this platform does not report them",
}


@click.command(name="gpus")
@json_option
def command(as_json: bool) -> int:
    """Memory, power, utilization, temperature and holders of each GPU.

    Into a pipe goes one line per GPU, its columns set off by tabs: index, UUID, name, memory used
    of all, power drawn of the limit, utilization, temperature, holders, remarks. What is not known
    is "?". A slice of a GPU that has MIG on follows its GPU, with the index of that one; the driver
    knows neither its power nor its utilization.
    """
    from mic_supervisor.host import host_name

    inventory, warnings = read_gpus(wiring.settings())
    error = inventory.unreadable
    if as_json:
        print_json(document(inventory, host_name(), error, warnings))
        return 1 if error else 0
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if error:
        raise MicError(error)
    if not inventory.gpus and not inventory.unopened:
        click.echo("the driver counts no GPUs", err=True)
    elif sys.stdout.isatty():
        print_tables(inventory)
    else:
        for line in lines(inventory):
            click.echo(line)
    return 0


def read_gpus(found: Settings) -> tuple[GpuInventory, list[str]]:
    """The inventory with owners, and why those may not be the whole truth.

    Runtimes are asked only when there is a holder to ask about.
    """
    from mic_supervisor.gpu.owners import annotate, managed_refs
    from mic_supervisor.gpu.source import open_source

    source = open_source(found.gpu_source.kind, found.gpu_source.count)
    try:
        inventory = source.observe()
    finally:
        source.close()
    if not any(gpu.processes for gpu in inventory.gpus):
        return inventory, []
    views: list[RuntimeView] = []
    try:
        machine = wiring.machine(found, create_key=False)
    except MicError as error:
        causes = [error.message]
    else:
        views = [runtime.observe() for runtime in machine.sources.runtimes.values()]
        causes = [view.error for view in views if view.error]
    warnings = [f"cannot find out which holders are ours: {cause}" for cause in causes]
    return annotate(inventory, managed_refs(views)), warnings


def document(
    inventory: GpuInventory, host: str, error: str | None, warnings: Iterable[str]
) -> dict[str, Any]:
    """What `--json` prints. Bytes, watts, a ratio and degrees Celsius; null is unknown."""
    ours = ("simulated", "telemetry", "started_at")
    return {
        "version": 1,
        "host": host,
        "source": inventory.source,
        "driver": inventory.driver,
        "error": error,
        "warnings": list(warnings),
        "gpus": [
            asdict(gpu, dict_factory=lambda items: {k: v for k, v in items if k not in ours})
            for gpu in inventory.gpus
        ],
        "unopened": [{"index": gpu.index, "error": gpu.error_line} for gpu in inventory.unopened],
    }


def lines(inventory: GpuInventory) -> list[str]:
    """One line per GPU, by index, each followed by its slices; columns set off by tabs."""
    found: list[tuple[int, tuple[str, ...]]] = [
        (
            gpu.index,
            (
                gpu.uuid,
                gpu.name,
                *_measured(gpu),
                _holders(gpu),
                "; ".join(_remarks(gpu)) or "-",
            ),
        )
        for gpu in inventory.gpus
    ]
    found += [(gpu.index, ("?", gpu.error_line)) for gpu in inventory.unopened]
    found.sort(key=itemgetter(0))
    return ["\t".join((str(index), *map(printable, columns))) for index, columns in found]


def _remarks(gpu: Gpu) -> list[str]:
    """What is to be known of a GPU beside what is measured."""
    return [
        *([f"unhealthy: {gpu.trouble}"] if gpu.trouble is not None else []),
        *(["MIG is on: a model gets one of its slices"] if gpu.mig else []),
        *([f"slice of GPU {gpu.index}"] if gpu.parent is not None else []),
        *(["persistence mode is off"] if gpu.persistence is False else []),
    ]


def _holders(gpu: Gpu) -> str:
    if gpu.processes is None:
        return "?"
    return "; ".join(" ".join(_holder(process)) for process in gpu.processes) or "-"


def print_tables(inventory: GpuInventory) -> None:
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    gpus = [(str(gpu.index), gpu.uuid[:12], gpu.name, *_measured(gpu)) for gpu in inventory.gpus]
    if gpus:
        console.print(
            table(
                "GPU UUID NAME >MEMORY >POWER >UTIL >TEMP", gpus, gives="NAME", width=console.width
            )
        )
    for unopened in inventory.unopened:
        console.print(f"GPU {unopened.index}: {printable(unopened.error_line)}", style="red")
    for gpu in inventory.gpus:
        if gpu.processes is None:
            console.print(f"GPU {gpu.number}: {_UNLISTED[gpu.unlisted]}", style="yellow")
        for remark in _remarks(gpu):
            style = "red" if gpu.trouble is not None else "yellow"
            console.print(f"GPU {gpu.number}: {printable(remark)}", style=style)
    holders = [
        (str(gpu.index), *_holder(process))
        for gpu in inventory.gpus
        for process in gpu.processes or ()
    ]
    if holders:
        console.print()
        console.print(
            table("GPU >PID PROCESS >MEMORY OWNER", holders, gives="OWNER", width=console.width)
        )


def _measured(gpu: Gpu) -> tuple[str, str, str, str]:
    """Memory, power, utilization and temperature; "?" is unknown."""
    memory = "?"
    if gpu.memory:
        memory = f"{_gib(gpu.memory.used)}/{_gib(gpu.memory.total)} GiB"
    power = "?"
    if (gpu.power_draw, gpu.power_limit) != (None, None):
        power = f"{_whole(gpu.power_draw)}/{_whole(gpu.power_limit)} W"
    utilization = "?" if gpu.utilization is None else f"{gpu.utilization * 100:.0f} %"
    temperature = "?" if gpu.temperature is None else f"{gpu.temperature:.0f} °C"
    return memory, power, utilization, temperature


def _holder(process: GpuProcess) -> tuple[str, str, str, str]:
    """PID, name, memory and owner."""
    used = "?" if process.used_memory is None else f"{_gib(process.used_memory)} GiB"
    return str(process.pid), process.name or "?", used, _owner(process)


def _owner(process: GpuProcess) -> str:
    owner = process.owner or Owner(OwnerKind.UNKNOWN)
    if owner.kind is OwnerKind.MANAGED:
        return owner.instance or "?"
    if owner.kind is OwnerKind.CONTAINER:
        return f"container {(owner.ref or '?')[:12]}"
    if owner.kind is OwnerKind.UNIT:
        return f"unit {owner.ref}"
    if owner.kind is OwnerKind.ORPHAN:
        return "nobody" if process.start_time is not None else "gone"
    return "?"


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / (1 << 30):.1f}"


def _whole(number: float | None) -> str:
    return "?" if number is None else f"{number:.0f}"
