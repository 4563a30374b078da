"""What the measurements share: options, a world with containers, calls that take turns."""

from __future__ import annotations

import fcntl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import docker
from docker.errors import DockerException, ImageNotFound

from benchmarks.sheets import Cell
from tests.integration.job_world import World, world

WAY_OUT = "make test sets this machine up (as root, on Debian 12)"
BUSYBOX, SERVER, TRITON = "mic-test/busybox:1", "mic-test/server:1", "mic-test/triton:1"

# 64 instances need more than a test's block of ports: above the supervisor's own range, and below
# the tests'. One run of the measurements at a time uses them: jobs, and what supervisors give away.
PORTS = range(21000, 21500)
_BLOCK = 100
_BLOCKS = cycle(range(21500, 22000, _BLOCK))


@dataclass(frozen=True)
class Options:
    """`wanted` are the sections; `sizes` numbers of instances, `beside` of unrelated containers.

    `seconds` is how long an idle daemon is looked at, `patience` after how many seconds no further
    try of the same is begun.
    """

    wanted: frozenset[str]
    sizes: tuple[int, ...] = (8, 64)
    tries: int = 4
    beside: int = 500
    seconds: float = 30.0
    patience: float = 10.0


@contextmanager
def machine(*images: str, gpus: int = 8) -> Iterator[World]:
    """A scope of its own on the real engine; what is started in it is removed at the end."""
    try:
        engine = docker.from_env(timeout=60).api
        engine.ping()
        for image in images:
            engine.inspect_image(image)  # type: ignore[no-untyped-call]
    except (DockerException, ImageNotFound, OSError) as error:
        sys.exit(f"cannot measure: {error}; {WAY_OUT}")
    with (
        tempfile.TemporaryDirectory(prefix="mic-bench-") as home,
        world(Path(home), engine, gpus=gpus) as made,
    ):
        first = next(_BLOCKS)
        made.mic.env["MIC_PORT_RANGE"] = f"{first}-{first + _BLOCK - 1}"
        yield made


@contextmanager
def alone_here() -> Iterator[None]:
    """One run of the measurements at a time on this machine: they would measure each other."""
    with (Path(tempfile.gettempdir()) / "mic-benchmarks.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("cannot measure: another run measures on this machine; wait for its end")
        yield


def installed(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that was installed: its bytecode lies beside it.

    An interpreter may have been told to write none, or elsewhere, where nobody has put any yet.
    """
    told = {"PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"}
    return {key: value for key, value in environment.items() if key not in told}


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def alternating(
    options: Options, contenders: Mapping[str, Callable[[], object]]
) -> dict[str, Cell]:
    """Seconds of each call. They take turns, so that a busy moment of the machine hits all.

    The first call of each fills caches and does not count, unless the patience is over with it.
    """
    taken = {name: [seconds(call)] for name, call in contenders.items()}
    for _ in range(options.tries):
        for name, call in contenders.items():
            if sum(taken[name]) < options.patience:
                taken[name].append(seconds(call))
    return {name: Cell(tuple(values[1:] or values), "s") for name, values in taken.items()}
