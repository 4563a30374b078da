"""What the measurements share: a world with containers, alternating runs, tables, targets."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import docker
from docker.errors import DockerException, ImageNotFound

from tests.integration.job_world import World, world

WAY_OUT = "make test sets this machine up (as root, on Debian 12)"


@contextmanager
def machine(*images: str, gpus: int = 8) -> Iterator[World]:
    """A scope of its own on the real engine; what is started in it is removed at the end."""
    try:
        engine = docker.from_env(timeout=60).api
        engine.ping()
        for image in images:
            engine.inspect_image(image)
    except (DockerException, ImageNotFound, OSError) as error:
        sys.exit(f"cannot measure: {error}; {WAY_OUT}")
    with (
        tempfile.TemporaryDirectory(prefix="mic-bench-") as home,
        world(Path(home), engine, gpus=gpus) as made,
    ):
        yield made


def installed(environment: Mapping[str, str], cache: Path) -> dict[str, str]:
    """The environment of a program that was installed: its bytecode is there already.

    A checkout may have none, or an interpreter that is told to write none.
    """
    kept = {key: value for key, value in environment.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(cache)}


def alternating(
    tries: int, contenders: Mapping[str, Callable[[], object]]
) -> dict[str, list[float]]:
    """Seconds of each call. They take turns, so that a busy moment of the machine hits all."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()  # once for the caches
    for _ in range(tries):
        for name, call in contenders.items():
            begun = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begun)
    return taken


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print(f"\n{title}")
    for row in (head, *rows):
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *others)).rstrip())


def times(title: str, taken: Mapping[str, Sequence[float]], base: float, ratio: str) -> None:
    """A table of what each took, in seconds; `ratio` heads the median's share of `base`."""
    table(
        title,
        ("", "median", "least", "most", ratio),
        [
            (
                name,
                *(f"{value * 1000:.0f} ms" for value in (median(values), min(values), max(values))),
                f"{median(values) / base:.2f}",
            )
            for name, values in taken.items()
        ],
    )


class Target(NamedTuple):
    """`name` may be `most` at most; both are in `unit`."""

    name: str
    value: float
    most: float
    unit: str = ""


def judge(*targets: Target) -> None:
    """Prints which targets were met. Exits with 1 where one was missed."""
    missed = False
    for name, value, most, unit in targets:
        missed |= value > most
        word = "missed" if value > most else "met"
        print(f"{name} {value:.3g}{unit}, target {most:g}{unit} or less: {word}")
    if missed:
        sys.exit(1)
