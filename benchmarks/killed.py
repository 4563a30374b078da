"""How long something that was killed is away: from SIGKILL until it runs, and until it answers.

A small HTTP server, seen from outside. Ours is killed with a GPU that the driver frees at once, and
with one that it frees 500 ms later; the GPUs are a mock NVML's. The others wait for no GPU.

A round takes 12 s: Docker restarts a container after 100 ms only if it has run for 10 s before, and
else after twice as long as the last time. The kernel tells a start's time to 10 ms, downwards.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

import docker
import psutil

from benchmarks._common import BUSYBOX, PORTS, Options, machine
from benchmarks.contenders import LABEL, Contender, Job, remove, supervised, supervisord
from benchmarks.idle import servers
from benchmarks.sheets import Cell, Outcome, Row, Sheet, Target
from tests.integration.job_world import World
from tests.mock_nvml import MockGpu, MockNvml, MockProcess
from tests.setup.steps import Missing
from tests.support.waiting import http, until

HOLDS = (0.0, 0.5, 0.0)  # seconds for which the driver lists what has ended, by GPU
SHARE = 1.3  # of Docker's time
LATE = 0.5  # seconds
_DOCKER_RESET = 11.0  # seconds
_TICKS = os.sysconf("SC_CLK_TCK")

_WHY = {
    "docker": "The engine restarts its own child: it need not be told, looks at no GPU, and keeps "
    "the container.",
    "supervisord": "It waits for no GPU, and starts a bare process where ours starts a keeper.",
}


class Away(NamedTuple):
    """Seconds from the kill until the next process began, it answered, and its daemon said so."""

    runs: float
    answers: float
    told: float | None = None


def boot_time() -> float:
    """Seconds since the boot, as the kernel counts them for processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started(pid: int) -> float | None:
    """When a process was started, in seconds since the boot; None: it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rsplit(")", 1)[1].split()[19]) / _TICKS


def kill(
    job: Job,
    pid_of: Callable[[], int],
    *,
    end: Callable[[], object] = lambda: None,
    ready: Callable[[], bool] | None = None,
) -> Away:
    """Kills what `pid_of` tells, and then does `end`. `ready` asks whether a daemon says so."""
    old = pid_of()
    born, began = started(old), boot_time()
    os.kill(old, signal.SIGKILL)
    end()
    until(lambda: started(old) != born, f"{old} to be gone", timeout=10, period=0.001)

    def since(true: Callable[[], bool], what: str) -> float:
        until(true, what, timeout=60, period=0.005)
        return boot_time() - began

    # Nobody but the successor can answer, so who it is can be asked afterwards. A connection that
    # is made before it listens may wait a second for the kernel to try again: hence a new one.
    answered = since(lambda: http(job.url, timeout=0.1).status == 200, f"{job.url} to answer")
    told = since(ready, f"{job.name} to be ready") if ready is not None else None
    at = started(pid_of())
    assert at is not None
    return Away(at - began, answered, told)


@contextmanager
def supervised_ones(jobs: list[Job]) -> Iterator[list[Callable[[], Away]]]:
    """One after the other on its GPU, as HOLDS says."""
    with machine(BUSYBOX) as world:
        nvml = MockNvml(world.mic.home)
        nvml.set(gpus=[MockGpu() for _ in jobs])
        world.mic.env |= {"MIC_GPU_SOURCE": "nvml", **nvml.env()}
        one = supervised(world, daemon=True, name="")
        one.write(jobs)
        one.run(one.act)
        yield [partial(_kill_ours, world, nvml, index, job) for index, job in enumerate(jobs)]


def _kill_ours(world: World, nvml: MockNvml, index: int, job: Job) -> Away:
    def row() -> dict[str, object]:
        rows = world.mic.ask("status")["result"]["instances"]
        return next(row for row in rows if row["model"] == job.name)

    name = str(row()["id"])
    restarts = row()["restarts"]

    def pid() -> int:
        if job.image:
            return pid_in(world.engine, str(world.one(name)["Id"]))
        return int(str(row()["pid"]))

    hold = HOLDS[index]
    nvml.change(index, processes=[MockProcess(pid())] if hold else [])
    time.sleep(0.3)
    timer = threading.Timer(hold, nvml.change, [index], {"processes": []})
    taken = kill(
        job,
        pid,
        end=timer.start if hold else lambda: None,
        ready=lambda: (now := row())["phase"] == "ready" and now["restarts"] != restarts,
    )
    if hold:
        timer.join()
    # The next failure is the first one again: a second in a row would be waited with.
    world.mic.ask("retry", name=name)
    return taken


def pid_in(engine: docker.APIClient, container: str) -> int:
    return int(engine.inspect_container(container)["State"]["Pid"])


@contextmanager
def restarted(job: Job) -> Iterator[Callable[[], Away]]:
    """The engine's own restart policy, with an init and a published port, as ours have."""
    with machine(BUSYBOX) as world:
        engine, scope = world.engine, world.mic.scope
        host = engine.create_host_config(
            restart_policy={"Name": "always"},
            init=True,
            port_bindings={job.port: ("127.0.0.1", job.port)},
        )
        try:
            ref = str(
                engine.create_container(
                    job.image,
                    list(job.command),
                    name=f"{scope}-restarted",
                    labels={LABEL: scope},
                    ports=[job.port],
                    host_config=host,
                )["Id"]
            )
            engine.start(ref)
            until(lambda: http(job.url).status == 200, job.url)
            ready_at = time.monotonic() + _DOCKER_RESET

            def one() -> Away:
                nonlocal ready_at
                time.sleep(max(0.0, ready_at - time.monotonic()))
                taken = kill(job, lambda: pid_in(engine, ref))
                ready_at = time.monotonic() + _DOCKER_RESET
                return taken

            yield one
        finally:
            remove(engine, scope)


@contextmanager
def below_supervisord(job: Job) -> Iterator[tuple[Contender, Callable[[], Away]]]:
    with supervisord(1) as contender:
        contender.write([job])
        contender.run(contender.act)
        assert contender.pid is not None
        parent = psutil.Process(contender.pid)
        yield contender, lambda: kill(job, lambda: parent.children()[0].pid)


def measure(options: Options) -> Outcome:
    outcome = Outcome()
    names = {
        "ours": "mic-supervisor, its GPU is free at once",
        "held": f"mic-supervisor, its GPU is free after {HOLDS[1] * 1000:.0f} ms",
        "processes": "mic-supervisor, a host process",
        "docker": "Docker, restart: always",
    }
    with ExitStack() as stack, machine(BUSYBOX) as world:
        ports = cycle(PORTS)
        home = str(world.mic.home / "w")
        jobs = [*servers(2, BUSYBOX, ports, "/w"), *servers(1, "", ports, f"{home}/a")]
        jobs = [
            Job(f"k{number}", one.command, one.image, one.port) for number, one in enumerate(jobs)
        ]
        kills = dict(zip(names, stack.enter_context(supervised_ones(jobs)), strict=False))
        (job,) = servers(1, BUSYBOX, ports, "/w")
        kills["docker"] = stack.enter_context(restarted(job))
        (job,) = servers(1, "", ports, f"{home}/b")
        try:
            peer, kills["supervisord"] = stack.enter_context(below_supervisord(job))
            names["supervisord"] = peer.name
        except Missing as error:
            outcome.left_out[f"supervisord: {str(error).splitlines()[0]}"] = None
        taken: dict[str, list[Away]] = {key: [] for key in kills}
        for _ in range(options.tries * 2):
            for key, one in kills.items():
                taken[key].append(one())
    rows = []
    for key, found in taken.items():
        runs = Cell(tuple(one.runs for one in found), "s")
        answers = Cell(tuple(one.answers for one in found), "s")
        told = tuple(one.told for one in found if one.told is not None)
        cells = (runs, answers, Cell(told, "s") if told else None)
        rows.append(Row(names[key], cells, _WHY.get(key, ""), key in ("held", "processes")))
    columns = ("until it runs", "until it answers", "until its daemon says that it is ready")
    outcome.sheets.append(Sheet("killed", "From SIGKILL to the successor", columns, tuple(rows)))
    away = {key: median(one.runs for one in found) for key, found in taken.items()}
    outcome.targets = [
        Target(
            "killed",
            "with a GPU that is free at once, of Docker's time",
            away["ours"] / away["docker"],
            SHARE,
        ),
        Target(
            "killed",
            f"beyond the {HOLDS[1]:g} s that a GPU was held",
            away["held"] - HOLDS[1],
            LATE,
            " s",
        ),
    ]
    return outcome
