"""How long an instance that was killed is away: from SIGKILL to the start of its successor.

Measured in turns, in one run: mic-supervisor with a GPU that the driver frees at once, the same
with one that it frees 500 ms later, Docker's own `restart: always`, which waits for no GPU, and a
bare `docker run`, which is the least that a start costs. The GPUs are a mock NVML's.

    python -m benchmarks.restart_latency [TRIES]

A try takes 12 s: Docker restarts a container after 100 ms only if it has run for 10 s before, and
else after twice as long as the last time. The kernel tells a start's time to 10 ms, downwards.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import docker

from benchmarks._common import Target, judge, machine, median, times
from tests.integration.job_world import World
from tests.mock_nvml import MockGpu, MockNvml, MockProcess, mock_uuid
from tests.support.waiting import until

IMAGE = "mic-test/busybox:1"
COMMAND = ["sleep", "100000"]
HOLDS = (0.0, 0.5)  # seconds for which the driver lists what has ended, by GPU
TARGET = 1.3  # of Docker's time
LATE = 0.5  # seconds
_DOCKER_RESET = 11.0  # seconds
_TICKS = os.sysconf("SC_CLK_TCK")


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


def pid_of(engine: docker.APIClient, container: str) -> int:
    return int(engine.inspect_container(container)["State"]["Pid"])


def away(look: Callable[[], int], old: int, end: Callable[[], None]) -> float:
    """Seconds from the kill of `old` to the start of the next one that `look` finds."""
    began = boot_time()
    os.kill(old, signal.SIGKILL)
    end()

    def successor() -> float | None:
        pid = look()
        return started(pid) if pid not in (0, old) else None

    at = until(successor, "the successor", timeout=60, period=0.005)
    assert at is not None
    return at - began


class Supervised:
    """One instance on one GPU, whose driver lets go after `hold` seconds."""

    def __init__(self, job: World, nvml: MockNvml, index: int, hold: float) -> None:
        self._job, self._nvml, self._index, self._hold = job, nvml, index, hold
        self._instance = f"m-{mock_uuid(index)[4:12]}"
        self._container = str(job.one(self._instance)["Id"])

    def kill(self) -> float:
        pid = self._pid()
        self._nvml.change(self._index, processes=[MockProcess(pid)] if self._hold else [])
        time.sleep(0.3)
        timer = threading.Timer(self._hold, self._nvml.change, [self._index], {"processes": []})
        taken = away(self._pid, pid, timer.start if self._hold else lambda: None)
        timer.join() if self._hold else None
        # The next failure is the first one again: a second in a row would be waited with.
        until(lambda: self._row()["as_desired"], f"{self._instance} to be seen", timeout=30)
        self._job.mic.ask("retry", name=self._instance)
        return taken

    def _pid(self) -> int:
        return pid_of(self._job.engine, self._container)

    def _row(self) -> dict[str, object]:
        rows = self._job.mic.ask("status")["result"]["instances"]
        return next(row for row in rows if row["id"] == self._instance)


class Restarted:
    """The engine's own restart policy, with an init and a published port, as ours have."""

    def __init__(self, engine: docker.APIClient, scope: str, port: int) -> None:
        self._engine = engine
        self._id = str(
            engine.create_container(
                IMAGE,
                COMMAND,
                name=f"{scope}-restarted",
                labels={"io.mic.scope": scope},
                ports=[port],
                host_config=engine.create_host_config(
                    restart_policy={"Name": "always"},
                    init=True,
                    port_bindings={port: ("127.0.0.1", port)},
                ),
            )["Id"]
        )
        engine.start(self._id)
        self._ready_at = time.monotonic() + _DOCKER_RESET

    def kill(self) -> float:
        time.sleep(max(0.0, self._ready_at - time.monotonic()))
        taken = away(lambda: pid_of(self._engine, self._id), self._pid(), lambda: None)
        self._ready_at = time.monotonic() + _DOCKER_RESET
        return taken

    def _pid(self) -> int:
        return pid_of(self._engine, self._id)

    def close(self) -> None:
        self._engine.remove_container(self._id, force=True)


def bare_run(engine: docker.APIClient, scope: str, port: int) -> float:
    """From the call of the docker command to the start of the container's first process."""
    name = f"{scope}-bare"
    began = boot_time()
    subprocess.run(
        [
            *("docker", "run", "--detach", "--init", "--publish", f"127.0.0.1:{port}:{port}"),
            *("--name", name, IMAGE, *COMMAND),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    at = started(pid_of(engine, name))
    engine.remove_container(name, force=True)
    assert at is not None
    return at - began


def main(tries: int) -> None:
    with machine(IMAGE) as job:
        nvml = MockNvml(job.mic.home)
        nvml.set(gpus=[MockGpu() for _ in HOLDS])
        job.mic.env |= {"MIC_GPU_SOURCE": "nvml", **nvml.env()}
        model = f'{{backend: container, image: "{IMAGE}", command: [sleep, "100000"]}}'
        job.write(dict.fromkeys(range(len(HOLDS)), "m"), m=model)
        job.mic.run()
        until(lambda: len(job.runs()) == len(HOLDS), "the instances")
        contenders: dict[str, Callable[[], float]] = {}
        for index, hold in enumerate(HOLDS):
            name = f"mic-supervisor, GPU held for {hold * 1000:.0f} ms"
            contenders[name] = Supervised(job, nvml, index, hold).kill
        ports = [job.mic.ports.take() for _ in range(2)]
        restarted = Restarted(job.engine, job.mic.scope, ports[0])
        contenders["docker restart: always"] = restarted.kill
        contenders["docker run"] = lambda: bare_run(job.engine, job.mic.scope, ports[1])
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        try:
            for _ in range(tries):
                for name, kill in contenders.items():
                    taken[name].append(kill())
        finally:
            restarted.close()
    docker_median = median(taken["docker restart: always"])
    title = f"From SIGKILL to the successor's start, {tries} tries each, {os.cpu_count()} cores"
    times(title, taken, docker_median, "of Docker's")
    free, held = (
        median(taken[f"mic-supervisor, GPU held for {hold * 1000:.0f} ms"]) for hold in HOLDS
    )
    judge(
        Target("with a GPU that is free at once, of Docker's time", free / docker_median, TARGET),
        Target(f"beyond the {HOLDS[1]:g} s that a GPU was held", held - HOLDS[1], LATE, " s"),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
