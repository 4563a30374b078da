"""What a daemon costs while there is nothing to do, and what it costs to be asked by a monitor.

Small HTTP servers on simulated GPUs, each asked by ours every 5 s, as is the default: containers,
and host processes. supervisord asks no server. All daemons are looked at during the same seconds.
"""

from __future__ import annotations

import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import NamedTuple

import psutil

from benchmarks._common import BUSYBOX, PORTS, Options, alternating
from benchmarks.contenders import Contender, Job, Making, entered, ours, supervisord
from benchmarks.sheets import Cell, Outcome, Row, Sheet, Target
from tests.support.waiting import http, until

_WARM_UP = 15.0  # seconds, until what a start leaves to be done is done
CPU, MEMORY, THREADS = 0.4, 60.0, 8.0  # at most, with 8

SERVE = "mkdir -p {0}; echo ok > {0}/health; exec /bin/busybox httpd -f -p {1} -h {0}"

_WHY = {
    "cpu": "It waits for the ends of its children and looks at nothing else: no GPU, no engine, no "
    "probe.",
    "memory": "It has a parser for its file and an XML-RPC server; ours has clients for Docker, "
    "NVML and HTTP, and pydantic.",
    "threads": "It has one loop and makes no call that blocks.",
    "scrape": "It tells a list that it has in memory, without a metric for each GPU.",
}


class Used(NamedTuple):
    processor: Cell
    memory: Cell
    threads: Cell


def watch(processes: Sequence[psutil.Process], seconds: float) -> list[Used]:
    """Of each: percent of a core in these seconds, and MiB and threads at their end."""

    def spent(process: psutil.Process) -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    before, began = [spent(one) for one in processes], time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return [
        Used(
            Cell((100 * (spent(one) - start) / took,), "%"),
            Cell((one.memory_info().rss / 2**20,), "MiB"),
            Cell((float(one.num_threads()),), "threads"),
        )
        for one, start in zip(processes, before, strict=True)
    ]


def servers(size: int, image: str, ports: Iterator[int], home: str) -> list[Job]:
    """They answer /health as soon as they are up."""
    found = []
    for number in range(size):
        port = next(ports)
        command = ("/bin/sh", "-c", SERVE.format(f"{home}/{number}", port))
        found.append(Job(f"w{number}", command, image, port))
    return found


def measure(options: Options) -> Outcome:
    outcome = Outcome()
    sizes = (0, *options.sizes)
    making: dict[str, Making] = {
        "containers": lambda n: ours(n, name="mic-supervisor, containers"),
        "processes": lambda n: ours(n, name="mic-supervisor, host processes"),
        "supervisord": supervisord,
    }
    found: dict[str, dict[str, list[Cell | None]]] = {}

    def note(what: str, name: str, at: int, cell: Cell) -> None:
        found.setdefault(what, {}).setdefault(name, [None] * len(sizes))[at] = cell

    # The empty ones beside the smallest; but many processes of others make a look of ours dearer.
    for group in ([0, 1], *([at] for at in range(2, len(sizes)))):
        with ExitStack() as stack:
            ports = cycle(PORTS)
            entries = {at: stack.enter_context(entered(making, sizes[at], outcome)) for at in group}
            for at, contenders in entries.items():
                for key, one in contenders.items():
                    _serve(one, sizes[at], BUSYBOX if key == "containers" else "", ports)
            if "idle" in options.wanted:
                time.sleep(_WARM_UP)
                places = [(at, one) for at, them in entries.items() for one in them.values()]
                daemons = [psutil.Process(one.pid) for _, one in places if one.pid]
                for (at, one), used in zip(places, watch(daemons, options.seconds), strict=True):
                    note("cpu", one.name, at, used.processor)
                    note("memory", one.name, at, used.memory)
                    note("threads", one.name, at, used.threads)
            if "scrape" in options.wanted:
                for at, contenders in entries.items():
                    for name, cell in alternating(options, scrapes(contenders)).items():
                        values = tuple(value * 1000 for value in cell.values)
                        note("scrape", name, at, Cell(values, "ms"))
    titles = {
        "cpu": f"Processor time of an idle daemon, of one core, {options.seconds:g} s",
        "memory": "Resident memory of the daemon",
        "threads": "Threads of the daemon",
        "scrape": "One answer for a monitor, on a connection of its own",
    }
    columns = tuple(f"{size} instances" for size in sizes)
    for what, rows in found.items():
        shown = tuple(
            Row(name, tuple(row), _WHY[what], not name.startswith("supervisord"))
            for name, row in rows.items()
        )
        section = "scrape" if what == "scrape" else "idle"
        outcome.sheets.append(Sheet(section, titles[what], columns, shown))
    outcome.targets += _targets(found)
    return outcome


def _serve(one: Contender, size: int, image: str, ports: Iterator[int]) -> None:
    """Has it run `size` servers, and waits until all of them answer."""
    if not size:
        return
    jobs = servers(size, image, ports, "/w" if image else str(one.home / "w"))
    one.write(jobs)
    one.run(one.act)
    for job in jobs:
        until(lambda: http(job.url).status == 200, job.url, timeout=60)  # noqa: B023


def scrapes(contenders: dict[str, Contender]) -> dict[str, Callable[[], object]]:
    """By the name of a row: what a monitor asks of each daemon."""
    one = contenders["containers"]
    url = f"http://{one.environment['MIC_LISTEN']}"
    found: dict[str, Callable[[], object]] = {
        f"{one.name}, /metrics": partial(_get, f"{url}/metrics"),
        f"{one.name}, /api/v1/status": partial(_get, f"{url}/api/v1/status"),
    }
    if "supervisord" in contenders:
        peer = contenders["supervisord"]
        found[f"{peer.name}, getAllProcessInfo"] = partial(_ask, peer.scrape)
    return found


def _get(url: str) -> None:
    answer = http(url)
    assert answer.status == 200, answer


def _ask(url: str) -> None:
    with xmlrpc.client.ServerProxy(url) as server:
        server.supervisor.getAllProcessInfo()


def _targets(found: dict[str, dict[str, list[Cell | None]]]) -> list[Target]:
    """Of 8 instances, or as few as were asked for."""
    bounds = (("cpu", "of a core", CPU, " %"), ("memory", "memory", MEMORY, " MiB"))
    return [
        Target("idle", f"{name}: {word}", cell.median, most, unit)
        for what, word, most, unit in (*bounds, ("threads", "threads", THREADS, ""))
        for name, row in found.get(what, {}).items()
        if name.startswith("mic") and (cell := row[1]) is not None
    ]
