"""mic-supervisor gpus"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli import wiring
from mic_supervisor.config.diagnostics import printable
from mic_supervisor.errors import MicError
from mic_supervisor.model import Gpu, GpuInventory, GpuProcess, Owner, OwnerKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

    from mic_supervisor.config.settings import Settings
    from mic_supervisor.model import RuntimeView


@click.command(name="gpus")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> int:
    """Memory, power, utilization, temperature and holders of each GPU.

    Into a pipe goes one line per GPU, its columns set off by tabs: index, UUID, name, memory used
    of all, power drawn of the limit, utilization, temperature, holders, remarks. What is not known
    is "?".
    """
    from mic_supervisor.host.identity import host_name

    inventory, warnings = look(wiring.settings())
    error = _error(inventory)
    if as_json:
        found = document(inventory, host_name(), error, warnings)
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
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


def look(found: Settings) -> tuple[GpuInventory, list[str]]:
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
    warnings = [f"cannot tell which holders are ours: {cause}" for cause in causes]
    return annotate(inventory, managed_refs(views)), warnings


def document(
    inventory: GpuInventory, host: str, error: str | None, warnings: Iterable[str]
) -> dict[str, Any]:
    """What `--json` prints. Bytes, watts, a ratio and degrees Celsius; null is unknown."""
    return {
        "version": 1,
        "host": host,
        "source": inventory.source,
        "driver": inventory.driver,
        "error": error,
        "warnings": list(warnings),
        "gpus": [_gpu_document(gpu) for gpu in inventory.gpus],
        "unopened": [{"index": gpu.index, "error": gpu.told} for gpu in inventory.unopened],
    }


def _gpu_document(gpu: Gpu) -> dict[str, Any]:
    memory = gpu.memory
    return {
        "uuid": gpu.uuid,
        "index": gpu.index,
        "name": gpu.name,
        "pci_bus_id": gpu.pci_bus_id,
        "memory": memory
        and {
            "total": memory.total,
            "used": memory.used,
            "free": memory.free,
            "reserved": memory.reserved,
        },
        "power_draw": gpu.power_draw,
        "power_limit": gpu.power_limit,
        "utilization": gpu.utilization,
        "temperature": gpu.temperature,
        "trouble": gpu.trouble,
        "recovery_action": gpu.recovery_action,
        "mig": gpu.mig,
        "persistence": gpu.persistence,
        "processes": None
        if gpu.processes is None
        else [
            {
                "pid": process.pid,
                "name": process.name,
                "used_memory": process.used_memory,
                "start_time": process.start_time,
                "kinds": list(process.kinds),
                "owner": process.owner
                and {
                    "kind": process.owner.kind.value,
                    "ref": process.owner.ref,
                    "instance": process.owner.instance,
                },
            }
            for process in gpu.processes
        ],
    }


def lines(inventory: GpuInventory) -> list[str]:
    """One line per GPU, by index, columns set off by tabs."""
    found: dict[int, tuple[str, ...]] = {
        gpu.index: (
            gpu.uuid,
            gpu.name,
            *_measured(gpu),
            _holders(gpu),
            "; ".join(_remarks(gpu)) or "-",
        )
        for gpu in inventory.gpus
    }
    found.update((gpu.index, ("?", gpu.told)) for gpu in inventory.unopened)
    return ["\t".join((str(index), *map(printable, found[index]))) for index in sorted(found)]


def _remarks(gpu: Gpu) -> list[str]:
    """What is to be known of a GPU beside what is measured."""
    return [
        *([f"unhealthy: {gpu.trouble}"] if gpu.trouble is not None else []),
        *(["MIG is on, which is reported and not managed"] if gpu.mig else []),
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
            _table(
                "GPU UUID NAME >MEMORY >POWER >UTIL >TEMP", gpus, gives="NAME", width=console.width
            )
        )
    for unopened in inventory.unopened:
        console.print(f"GPU {unopened.index}: {printable(unopened.told)}", style="red")
    for gpu in inventory.gpus:
        if gpu.processes is None:
            console.print(f"GPU {gpu.index}: its holders cannot be read", style="yellow")
        for remark in _remarks(gpu):
            style = "red" if gpu.trouble is not None else "yellow"
            console.print(f"GPU {gpu.index}: {printable(remark)}", style=style)
    holders = [
        (str(gpu.index), *_holder(process))
        for gpu in inventory.gpus
        for process in gpu.processes or ()
    ]
    if holders:
        console.print()
        console.print(
            _table("GPU >PID PROCESS >MEMORY OWNER", holders, gives="OWNER", width=console.width)
        )


def _table(headers: str, rows: Sequence[tuple[str, ...]], *, gives: str, width: int) -> Table:
    """A table `width` cells wide at most, at the cost of column `gives`; ">" aligns right.

    rich alone would cut every column a little, numbers too.
    """
    from rich.cells import cell_len
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = [tuple(map(printable, row)) for row in rows]
    names = [header.removeprefix(">") for header in headers.split()]
    widths = {
        name: max(map(cell_len, (name, *column)))
        for name, *column in zip(names, *cells, strict=True)
    }
    gap = 2
    room = width - sum(widths.values()) - gap * (len(names) - 1) + widths[gives]
    widths[gives] = max(len(gives), min(widths[gives], room))
    for name, header in zip(names, headers.split(), strict=True):
        table.add_column(
            name,
            no_wrap=True,
            overflow="ellipsis",
            justify="left" if name == header else "right",
            width=widths[name],
        )
    for row in cells:
        table.add_row(*row)
    return table


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


def _error(inventory: GpuInventory) -> str | None:
    if inventory.source == "none":
        return "cannot read GPUs: MIC_GPU_SOURCE is none"
    return inventory.told
