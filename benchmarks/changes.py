"""What a look and a change cost, with containers and with host processes that do nothing.

All commands are processes of their own, as in a shell, and take turns. With `beside`, the same with
many containers on the engine that are nobody's here.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import docker
import psutil

from benchmarks._common import BUSYBOX, Options, alternating, machine
from benchmarks.contenders import (
    CONTAINERS,
    LABEL,
    OURS,
    PROCESSES,
    Contender,
    Job,
    Making,
    entered,
)
from benchmarks.sheets import Cell, Outcome, Row, Sheet, Target

TITLES = {
    "no-change": "Bring the machine to the file, which did not change",
    "dry-run": "Show what would be done, which is nothing",
    "one-change": "Change the environment of one, and bring the machine to the file",
    "status": "Tell what runs",
}
THROUGH = 1.3  # of a no-change `up -d`, what a plan or a status through the daemon may take
ALONE = 0.5  # seconds, for a plan without a daemon
FLOOR = 1.5  # of the time of a fresh interpreter that makes one list call
_TOGETHER = 8  # containers that are started at the same time

SDK = "Docker SDK for Python, one list"
LIST = """\
import sys
from docker import APIClient
api = APIClient(base_url=sys.argv[1])
assert len(api.containers(all=True, filters={"label": sys.argv[2]})) >= 0
"""

_COMPILED = "It is one compiled program; starting an interpreter with its imports takes the rest."
_WHY = {
    "compose": {
        "no-change": f"{_COMPILED} It asks no GPU, no process and no server.",
        "dry-run": f"{_COMPILED} It asks no GPU, no process and no server.",
        "status": _COMPILED,
        "one-change": "It stops and starts the container, and does not wait for a GPU to be free.",
    },
    "supervisord": {
        "no-change": "It compares its file with what it has in memory and looks at no machine.",
        "dry-run": "It compares its file with what it has in memory and looks at no machine.",
        "status": "Its client imports little more than an XML parser.",
        "one-change": "It signals its own child, and keeps no record that outlives itself.",
    },
    "sdk": {"dry-run": "It is the least that a look costs in Python: an import, and one list."},
}


def idle_jobs(count: int, image: str) -> list[Job]:
    """They do nothing, and end at once when they are told to."""
    return [Job(f"s{number}", ("/bin/sleep", "100000"), image) for number in range(count)]


class Turn:
    """One contender with its jobs: what it is asked to do, in the words of TITLES."""

    def __init__(self, contender: Contender, jobs: list[Job]) -> None:
        self.contender, self._jobs = contender, jobs
        self._versions = itertools.count(1)
        contender.write(jobs)
        contender.run(contender.act)

    def calls(self) -> dict[str, Callable[[], object]]:
        of = self.contender
        found: dict[str, Callable[[], object]] = {"no-change": lambda: of.run(of.act)}
        if of.dry:
            found["dry-run"] = lambda: of.run(of.dry)
        if of.status:
            found["status"] = lambda: of.run(of.status)
        return found | {"one-change": self._change}

    def _change(self) -> None:
        self._jobs[0] = self._jobs[0].changed(next(self._versions))
        self.contender.write(self._jobs)
        self.contender.run(self.contender.act)


def measure(options: Options) -> Outcome:
    outcome = Outcome()
    kinds = (("containers", BUSYBOX, CONTAINERS), ("host processes", "", PROCESSES))
    for kind, image, making in kinds:
        found: dict[str, dict[str, list[Cell | None]]] = {name: {} for name in TITLES}
        names: dict[str, str] = {}
        for at, size in enumerate(options.sizes):
            with entered(making, size, outcome) as contenders:
                turns = {
                    key: Turn(contender, idle_jobs(size, image))
                    for key, contender in contenders.items()
                }
                names |= {key: contender.name for key, contender in contenders.items()}
                for what in (name for name in TITLES if name in options.wanted):
                    calls = {k: c[what] for k, t in turns.items() if what in (c := t.calls())}
                    if what == "dry-run" and image:
                        calls["sdk"], names["sdk"] = sdk(contenders[OURS]), SDK
                    for key, cell in alternating(options, calls).items():
                        row = found[what].setdefault(key, [None] * len(options.sizes))
                        row[at] = cell
        columns = tuple(f"{size} {kind}" for size in options.sizes)
        for what in (name for name in TITLES if name in options.wanted):
            rows = tuple(
                Row(names[key], tuple(row), _WHY.get(key, {}).get(what, ""), key == "alone")
                for key, row in found[what].items()
            )
            outcome.sheets.append(Sheet(what, f"{TITLES[what]}: {kind}", columns, rows))
            if image:
                outcome.targets += _targets(what, found)
    return outcome


def sdk(contender: Contender) -> Callable[[], object]:
    engine = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    scope = contender.environment["MIC_SCOPE"]
    return lambda: contender.run([sys.executable, "-c", LIST, engine, f"io.mic.scope={scope}"])


def _targets(what: str, found: Mapping[str, Mapping[str, list[Cell | None]]]) -> list[Target]:
    """Those of the smallest size, which is 8 unless it is told otherwise."""

    def least(name: str, key: str) -> float | None:
        cell = found[name].get(key, [None])[0]
        return None if cell is None else cell.median

    out, ours = [], least(what, OURS)
    if what in ("dry-run", "status") and ours and (up := least("no-change", "compose")):
        share = ours / up
        out.append(Target(what, "through the daemon, of Compose's `up -d`", share, THROUGH))
    if what == "dry-run" and (alone := least(what, "alone")) and (one := least(what, "sdk")):
        out.append(Target(what, "without a daemon", alone, ALONE, " s"))
        share = alone / one
        out.append(Target(what, "without a daemon, of the time of one list", share, FLOOR))
    return out


# --- beside many others -----------------------------------------------------------------------


@contextmanager
def unrelated(engine: docker.APIClient, scope: str, count: int) -> Iterator[None]:
    """`count` running containers that carry no label of ours, removed by id at the end."""
    made: list[str] = []

    def one(number: int) -> None:
        host = engine.create_host_config(network_mode="none")
        name = f"{scope}-unrelated-{number}"
        made.append(
            str(
                engine.create_container(
                    BUSYBOX, ["sleep", "100000"], name=name, host_config=host, labels={LABEL: name}
                )["Id"]
            )
        )
        engine.start(made[-1])

    with ThreadPoolExecutor(_TOGETHER) as pool:
        try:
            list(pool.map(one, range(count)))
            yield
        finally:
            list(pool.map(lambda ref: engine.remove_container(ref, force=True), made))


def beside(options: Options) -> Outcome:
    """8 containers of each contender, before and while unrelated ones run on the same engine."""
    outcome = Outcome()
    size = options.sizes[0]
    columns = ("alone", f"beside {options.beside}")
    wanted = ("no-change", "dry-run")
    found: dict[str, dict[str, list[Cell]]] = {what: {} for what in (*wanted, "memory", "cpu")}
    making: dict[str, Making] = {k: v for k, v in CONTAINERS.items() if k != "alone"}
    with machine(BUSYBOX) as job, entered(making, size, outcome) as contenders:
        turns = {key: Turn(one, idle_jobs(size, BUSYBOX)) for key, one in contenders.items()}

        def look() -> None:
            for what in wanted:
                calls = {key: turn.calls()[what] for key, turn in turns.items()}
                for key, cell in alternating(options, calls).items():
                    found[what].setdefault(key, []).append(cell)
            memory, share = used(contenders[OURS], options.seconds)
            found["memory"].setdefault(OURS, []).append(memory)
            found["cpu"].setdefault(OURS, []).append(share)

        look()
        with unrelated(job.engine, job.mic.scope, options.beside):
            look()
        titles = {what: f"{TITLES[what]}: {size} containers" for what in wanted} | {
            "memory": "The daemon's memory",
            "cpu": "The daemon's processor time while it is idle",
        }
        for what, rows in found.items():
            shown = tuple(
                Row(contenders[key].name, tuple(row), _WHY.get(key, {}).get(what, ""))
                for key, row in rows.items()
            )
            compares = what in wanted
            outcome.sheets.append(Sheet("beside", titles[what], columns, shown, compares))
    return outcome


def used(contender: Contender, seconds: float) -> tuple[Cell, Cell]:
    """MiB that are resident, and percent of a core, of its daemon, over a time of idleness."""
    from benchmarks.idle import watch

    assert contender.pid is not None
    (found,) = watch([psutil.Process(contender.pid)], seconds)
    return found.memory, found.processor
