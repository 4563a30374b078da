"""Each fault of a GPU, injected while a daemon keeps four instances: what it says and does.

The same four host processes serve through the whole module, each with a probe, so that what a fault
disturbs shows in their PIDs.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.daemon_world import daemon_world
from tests.mock_nvml import MockGpu, MockNvml, mock_uuid
from tests.support.commands import SERVE
from tests.support.mic import Daemon, Mic
from tests.support.waiting import http, until

GPUS = range(4)
FILE = f"""
    version: 1
    models:
      a:
        backend: process
        command: {SERVE}
        probe: {{http: /health, period: 1s}}
        stop_timeout: 2s
    gpus: {{0-3: a}}
"""
RESET = "the driver asks for a reset of the GPU"


class World:
    """The daemon, its GPUs and its instances."""

    def __init__(self, mic: Mic, nvml: MockNvml) -> None:
        self.mic, self.nvml = mic, nvml
        self.daemon: Daemon = mic.run()

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.mic.status()["instances"]
        return sorted(found, key=lambda row: row["id"])

    def row(self, number: int) -> dict[str, Any]:
        return self.rows()[number]

    def pids(self) -> list[int | None]:
        return [row["pid"] for row in self.rows()]

    def gpu(self, number: int) -> dict[str, Any]:
        found: list[dict[str, Any]] = self.mic.status()["gpus"]
        return next(gpu for gpu in found if gpu["uuid"] == mock_uuid(number))

    def ready(self, *numbers: int) -> bool:
        rows = self.rows()
        return all(rows[number]["phase"] == "ready" for number in numbers)

    def metrics(self) -> str:
        return http(f"{self.mic.url}/metrics").text

    def healthy(self, number: int) -> str | None:
        found = re.search(
            rf'mic_gpu_healthy{{uuid="{mock_uuid(number)}"}} ([\d.]+)', self.metrics()
        )
        return found[1] if found else None

    def logged(self) -> list[str]:
        lines = self.daemon.text().splitlines()
        return [re.sub("^.*?(INFO|WARNING|ERROR) +", r"\1 ", line) for line in lines]

    def renumber(self, order: Iterable[int]) -> None:
        """Have the driver opened anew, as after a reboot, with its GPUs in this order."""
        self.nvml.set([MockGpu(uuid=mock_uuid(number)) for number in order])
        self.nvml.break_library(1)
        until(lambda: "mic_nvml_up 0.0" in self.metrics(), "that it is closed")
        self.nvml.break_library(0)

    def until_logged(self, text: str) -> None:
        until(lambda: text in self.logged(), text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("faults")
    nvml = MockNvml(home)
    nvml.set([MockGpu() for _ in GPUS])
    with daemon_world(home, None, nvml=nvml) as there:
        there.mic.env["MIC_RESYNC"] = "300ms"
        there.mic.write(FILE)
        made = World(there.mic, nvml)
        until(lambda: made.ready(*GPUS), "all four")
        yield made


@pytest.fixture(autouse=True)
def others(world: World) -> Iterator[None]:
    """What is disturbed is undone, and nobody else was."""
    world.mic("retry", "a-a0000001")  # what the tests killed is not held against it
    before = world.pids()
    yield
    world.nvml.set([MockGpu() for _ in GPUS])
    until(lambda: world.ready(*GPUS), "all four again")
    changed = [number for number in GPUS if world.pids()[number] != before[number]]
    assert changed in ([], [1])  # every fault is GPU 1's


def end(world: World) -> int:
    """Kill the instance on GPU 1."""
    pid = world.row(1)["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return int(pid)


def test_a_gpu_that_needs_a_reset(world: World) -> None:
    world.nvml.change(1, recovery_action=1)
    world.nvml.add_event(1, 79)
    world.until_logged(f"ERROR GPU 1 ({mock_uuid(1)}): Xid 79, critical; {RESET}")
    world.until_logged(f"WARNING GPU 1: it is unhealthy: Xid 79; {RESET}")
    assert world.ready(*GPUS)  # what answers its probes is left alone
    assert (world.gpu(1)["state"], world.gpu(1)["trouble"]) == ("unhealthy", f"Xid 79; {RESET}")
    assert world.healthy(1) == "0.0"
    assert world.healthy(0) == "1.0"
    assert f'mic_gpu_xid_errors_total{{uuid="{mock_uuid(1)}",xid="79"}} 1.0' in world.metrics()
    assert f"warning: GPU 1 is unhealthy: Xid 79; {RESET}" in world.mic("status").stderr

    pid, restarts = end(world), world.row(1)["restarts"]
    until(lambda: world.row(1)["phase"] == "blocked", "the block")
    time.sleep(1.5)  # several rounds
    row = world.row(1)
    assert (row["pid"], row["restarts"]) == (None, restarts)
    assert row["reason"] == f"GPU 1 is unhealthy: Xid 79; {RESET}"
    assert "hint: stop what uses it, then: nvidia-smi --gpu-reset -i 1; or reboot" in (
        world.mic("plan").stdout
    )
    assert world.ready(0, 2, 3)

    world.nvml.change(1, recovery_action=0)
    world.until_logged("WARNING GPU 1: it is well again")
    until(lambda: world.ready(1), "the start")
    assert world.row(1)["pid"] != pid
    assert world.healthy(1) == "1.0"


def test_an_xid_that_the_driver_takes_back_is_counted_and_decides_nothing(world: World) -> None:
    world.nvml.add_event(1, 74)
    world.until_logged(
        f"ERROR GPU 1 ({mock_uuid(1)}): Xid 74, critical; the driver asks for nothing"
    )
    assert world.gpu(1)["state"] == "managed"
    pid = end(world)
    until(lambda: world.ready(1) and world.row(1)["pid"] != pid, "the restart")


def test_a_gpu_that_falls_off_the_bus(world: World) -> None:
    world.nvml.change(1, lost=True)
    until(lambda: world.gpu(1)["state"] == "lost", "the loss")
    lines = [line for line in world.logged() if "it is lost" in line]
    assert lines[-1].startswith("WARNING GPU 1: it is lost: ")
    row = world.row(1)
    assert row["phase"] == "blocked"
    assert "the GPU fell off the bus" in row["reason"] or "not there" in row["reason"]
    assert row["pid"] is not None  # it is not stopped for that
    os.kill(row["pid"], 0)
    assert world.healthy(1) == "0.0"
    end(world)
    until(lambda: world.row(1)["pid"] is None, "the end to be seen")
    time.sleep(1.5)
    assert world.row(1)["pid"] is None
    world.nvml.change(1, lost=False)
    until(lambda: world.ready(1), "the start")


def test_gpus_that_change_their_numbers(world: World) -> None:
    before = world.pids()
    order = [2, 0, 3, 1]
    world.renumber(order)
    until(lambda: world.gpu(2)["index"] == 0, "the new order")
    assert world.ready(*GPUS)
    assert world.pids() == before
    assert (
        f"warning: GPU 0 of the file stays with {mock_uuid(0)}, which the driver now calls 1; "
        "`apply --rebind` binds the file's numbers anew"
    ) in world.mic("plan").stdout
    world.renumber(GPUS)
    until(lambda: world.gpu(2)["index"] == 2, "the old order")


def test_what_is_reported_and_decides_nothing(world: World) -> None:
    world.nvml.change(1, persistence_mode=0, ecc_errors=(5, 2))
    errors = "GPU 1 has had 2 uncorrected memory errors since the driver was loaded"
    until(lambda: f"warning: {errors}" in world.mic("status").stderr, "the status")
    assert world.mic("gpus").stdout.splitlines()[1].endswith("\tpersistence mode is off")
    total = f'mic_gpu_ecc_errors_total{{kind="uncorrected",uuid="{mock_uuid(1)}"}} 2.0'
    assert total in world.metrics()
    assert world.ready(*GPUS)


def test_values_that_a_gpu_does_not_know_are_left_out(world: World) -> None:
    unknown = dict.fromkeys(
        ("power_draw", "utilization", "temperature", "remapped_rows", "clocks"), None
    )
    world.nvml.change(1, ecc_errors=None, mig_mode=None, persistence_mode=None, **unknown)
    series = f'mic_gpu_power_draw_watts{{uuid="{mock_uuid(1)}"}}'
    until(lambda: series not in world.metrics(), "the missing series")
    assert world.gpu(1)["state"] == "managed"
    assert world.healthy(1) == "1.0"
    assert world.ready(*GPUS)


def test_a_driver_that_is_slow_delays_nothing_else(world: World) -> None:
    world.nvml.set_rules(sleeps={"nvmlDeviceGetPowerUsage": 100})
    pid = end(world)
    until(lambda: world.ready(1) and world.row(1)["pid"] != pid, "the restart")


def test_a_call_that_hangs_stops_no_probe_no_lane_and_no_answer(world: World) -> None:
    """It is let go after the test has seen what goes on meanwhile."""
    world.nvml.set_rules(hangs=["nvmlDeviceGetMemoryInfo_v2"])
    until(lambda: "mic_nvml_up 0.0" in world.metrics(), "that it is noticed")
    began = time.monotonic()
    while time.monotonic() - began < 2:
        asked = time.monotonic()
        assert http(f"{world.mic.url}/healthz").status == 200
        assert http(f"{world.mic.url}/api/v1/status").status == 200
        assert time.monotonic() - asked < 4  # a driver that is given up is so after 15 s
        time.sleep(0.2)
    answer = http(f"{world.mic.url}/api/v1/plan").json()
    late = re.compile(
        "NVML (has not answered for|did not answer within) .*nothing is started or stop"
    )
    assert any(late.search(text) for text in answer["warnings"]), answer["warnings"]
    # Probes go on: one that fails is seen, although nothing is started while GPUs are unknown.
    assert world.ready(*GPUS)
    assert world.gpu(1)["state"] == "unknown"
    pid = world.row(1)["pid"]
    os.kill(pid, signal.SIGSTOP)
    until(lambda: world.row(1)["phase"] != "ready", "the probe")
    os.kill(pid, signal.SIGCONT)
    until(lambda: world.ready(*GPUS), "the probe again")
    assert http(f"{world.mic.url}/metrics").status == 200
    world.nvml.set_rules()
    until(lambda: "mic_nvml_up 1.0" in world.metrics(), "the end of it")


def test_ten_thousand_looks_grow_nothing(tmp_path: Path) -> None:
    """In a process of its own: a look at four GPUs, and everything that is made of it."""
    nvml = MockNvml(tmp_path)
    nvml.set([MockGpu() for _ in GPUS])
    program = """
import os, resource, sys, time
from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.gpu.events import with_xids
from mic_supervisor.converge.observe import combine
def look(source):
    inventory = with_xids(source.observe(), (), 0.0)
    assert inventory.error is None, inventory.error
    combine(inventory, [], (), {}, 0.0)
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
source = NvmlSource()
for _ in range(500):
    look(source)
files, memory = len(os.listdir("/proc/self/fd")), rss()
for _ in range(10_000):
    look(source)
print(len(os.listdir("/proc/self/fd")) - files, rss() - memory)
"""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **nvml.env()},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    files, memory = map(int, done.stdout.split())
    assert files == 0
    assert memory < 1 << 20
