"""How long many instances take from nothing until the last of them answers, seen from outside.

8 servers whose start takes 3 s, and 4 real Triton servers whose model initialises for 2 s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

from benchmarks._common import PORTS, SERVER, TRITON, Options
from benchmarks.contenders import (
    Contender,
    Job,
    Making,
    ansible,
    answers,
    compose,
    entered,
    one_by_one,
    ours,
    supervisord,
)
from benchmarks.sheets import Cell, Outcome, Row, Sheet, Target
from mic_supervisor.demo import server
from tests.support.triton import TritonRepository

EIGHT = 6.0  # seconds for 8 servers that take 3 s each
FOUR = 2.0  # times what one Triton takes, for 4 of them
_DELAY = 3

CONTAINERS: dict[str, Making] = {
    "ours": lambda n: ours(n, daemon=False),
    "compose": compose,
    "ansible": ansible,
    "one by one": one_by_one,
}
PROCESSES: dict[str, Making] = {
    "ours": lambda n: ours(n, daemon=False, name="mic-supervisor, host processes"),
    "supervisord": supervisord,
}
_WHY = {
    "compose": "It starts all at once and looks at no GPU.",
    "ansible": "It starts one after the other, waits for none, and looks at no GPU.",
    "one by one": "With one there is nothing to wait for, and a shell looks at no GPU.",
    "supervisord": "It forks all at once, without a keeper for each.",
}


def slow_servers(number: int, image: str, ports: Iterator[int]) -> list[Job]:
    words = ("model-server",) if image else (sys.executable, server.__file__)
    found = []
    for index in range(number):
        port = next(ports)
        env = {"HOST": "0.0.0.0" if image else "127.0.0.1", "START_DELAY": str(_DELAY)}
        command = (*words, "--port", str(port))
        found.append(Job(f"s{index}", command, image, port, env=env))
    return found


def tritons(number: int, contender: Contender, ports: Iterator[int]) -> list[Job]:
    """Each with a model of its own, in the repository of the contender's world."""
    repository = TritonRepository(contender.home.parent / "model_repository")
    found = []
    for index in range(number):
        name, port = f"MAM{index}", next(ports)
        repository.model(name, initialise_seconds=2, config_name="config.pbtxt")
        command = ("tritonserver", "--model-repository=/models", "--model-control-mode=explicit")
        found.append(
            Job(
                name,
                (*command, f"--load-model={name}", f"--http-port={port}"),
                TRITON,
                port,
                path=f"/v2/models/{name}/ready",
                mounts=(f"{repository.path}:/models:ro",),
                shm="256m",
                ours=f"{{backend: triton, port: {port}}}",
            )
        )
    return found


def measure(options: Options) -> Outcome:
    outcome = Outcome()
    ports = cycle(PORTS)

    def servers(image: str) -> Callable[[int, Contender], list[Job]]:
        return lambda number, _contender: slow_servers(number, image, ports)

    if "starts" in options.wanted:
        for image, making in ((SERVER, CONTAINERS), ("", PROCESSES)):
            rows = _rows(options, outcome, making, servers(image), 8)
            kind = "in containers" if image else "as host processes"
            title = f"8 servers {kind} that take {_DELAY} s to start"
            outcome.sheets.append(Sheet("starts", title, ("one", "8"), rows))
            if image and (eight := rows[0].cells[1]) is not None:
                outcome.targets.append(Target("starts", "8 servers", eight.median, EIGHT, " s"))
    if "tritons" in options.wanted:
        rows = _rows(options, outcome, CONTAINERS, lambda n, of: tritons(n, of, ports), 4)
        title = "4 Triton servers, whose model takes 2 s to initialise"
        outcome.sheets.append(Sheet("tritons", title, ("one", "4"), rows))
        one, four = rows[0].cells
        assert one is not None and four is not None
        share = four.median / one.median
        outcome.targets.append(Target("tritons", "4 Tritons, of the time of one", share, FOUR))
    return outcome


def _rows(
    options: Options,
    outcome: Outcome,
    making: dict[str, Making],
    jobs: Callable[[int, Contender], Sequence[Job]],
    many: int,
) -> tuple[Row, ...]:
    """The time for one, and for `many`: everybody in turn, and everything removed in between."""
    taken: dict[str, dict[int, list[float]]] = {}
    with entered(making, many, outcome) as contenders:
        for _ in range(max(1, options.tries // 3)):
            for key, one in contenders.items():
                for number in (1, many):
                    values = taken.setdefault(key, {}).setdefault(number, [])
                    values.append(answers(jobs(number, one), one))
                    one.clear()
        return tuple(
            Row(
                one.name, tuple(Cell(tuple(v), "s") for v in taken[key].values()), _WHY.get(key, "")
            )
            for key, one in contenders.items()
        )
