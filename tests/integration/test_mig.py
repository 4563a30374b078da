"""Slices of a GPU that has MIG on, on the mock library: each is a GPU with an owner of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.daemon_world import daemon_world
from tests.mock_nvml import GIB, MockGpu, MockMig, MockNvml, MockProcess, mock_uuid
from tests.support.commands import SERVE
from tests.support.mic import Mic
from tests.support.waiting import http, until

FIRST, SECOND = mock_uuid(8, "MIG"), mock_uuid(9, "MIG")
A, B = "a-a0000008", "b-a0000009"
FILE = f"""
    version: 1
    models:
      a:
        backend: process
        command: {SERVE}
        probe: {{http: /health, period: 1s}}
        stop_timeout: 2s
      b:
        backend: process
        command: {SERVE}
        probe: {{http: /health, period: 1s}}
        stop_timeout: 2s
"""
GPUS = f"""
    gpus:
      {FIRST}: a
      {SECOND}: b
"""


class World:
    def __init__(self, mic: Mic, nvml: MockNvml) -> None:
        self.mic, self.nvml = mic, nvml
        self.slices()
        self.daemon = mic.run()

    def slices(
        self, first: int | None = None, second: int | None = None, gone: bool = False
    ) -> None:
        """GPU 0 with its slices, and the PIDs that are on them."""
        parts = [
            MockMig(uuid, 10 * GIB, 0, processes=[MockProcess(pid)] if pid else [])
            for uuid, pid in ((FIRST, first), (SECOND, second))
        ]
        whole = MockGpu(mig_mode=(1, 1), utilization=None, mig_devices=parts[: 1 if gone else 2])
        self.nvml.set([whole, MockGpu()])

    def row(self, instance: str) -> dict[str, Any]:
        return next(row for row in self.mic.status()["instances"] if row["id"] == instance)

    def pid(self, instance: str) -> int:
        pid = self.row(instance)["pid"]
        assert pid is not None
        return int(pid)

    def gpu(self, uuid: str) -> dict[str, Any]:
        return next(gpu for gpu in self.mic.status()["gpus"] if gpu["uuid"] == uuid)

    def ready(self, *instances: str) -> bool:
        return all(self.row(one)["phase"] == "ready" for one in instances or (A, B))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("mig")
    nvml = MockNvml(home)
    with daemon_world(home, None, nvml=nvml) as there:
        there.mic.env["MIC_RESYNC"] = "300ms"
        there.mic.write(FILE + GPUS)
        made = World(there.mic, nvml)
        until(made.ready, "both")
        yield made


@pytest.fixture
def foreign() -> Iterator[int]:
    with subprocess.Popen(["sleep", "300"]) as child:
        yield child.pid
        child.kill()


def test_each_slice_has_an_owner_of_its_own(world: World) -> None:
    world.slices(world.pid(A), world.pid(B))
    url = f"{world.mic.url}/api/v1/gpus"
    until(lambda: len(http(url).json()[1]["processes"]) == 1, "the processes")
    whole, first, second, other = http(url).json()
    assert [one["parent"] for one in (whole, first, second, other)] == [
        None,
        mock_uuid(0),
        mock_uuid(0),
        None,
    ]
    assert (first["instance"], first["processes"][0]["instance"]) == (A, A)
    assert (second["instance"], second["processes"][0]["instance"]) == (B, B)
    assert (whole["processes"], first["utilization"], first["power_draw"]) == ([], None, None)
    for instance, uuid in ((A, FIRST), (B, SECOND)):
        environment = Path(f"/proc/{world.pid(instance)}/environ").read_bytes().split(b"\0")
        assert f"CUDA_VISIBLE_DEVICES={uuid}".encode() in environment
    info = re.search(
        rf'mic_gpu_info{{[^}}]*parent="{mock_uuid(0)}"[^}}]*uuid="{FIRST}"}} 1.0',
        http(f"{world.mic.url}/metrics").text,
    )
    assert info is not None
    lines = world.mic("gpus").stdout.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        ["0", mock_uuid(0)],
        ["0", FIRST],
        ["0", SECOND],
        ["1", mock_uuid(1)],
    ]
    assert world.mic("status", FIRST).stdout.split("\t")[:2] == [FIRST, "a"]
    assert world.mic("plan").stdout == "No changes.\n"


def test_a_process_on_one_slice_does_not_block_the_other(world: World, foreign: int) -> None:
    world.slices(foreign)
    os.kill(world.pid(A), signal.SIGKILL)
    pid = world.pid(B)
    os.kill(pid, signal.SIGKILL)
    until(lambda: world.ready(B) and world.row(B)["pid"] != pid, "the restart beside it")
    until(lambda: world.row(A)["phase"] == "blocked", "the block")
    assert world.row(A)["reason"].startswith(f"GPU {FIRST} is held by PID {foreign} (sleep, ")
    world.slices()
    until(world.ready, "both")


def test_a_slice_that_is_removed_is_lost_and_its_process_left_alone(world: World) -> None:
    pids = world.pid(A), world.pid(B)
    world.slices(gone=True)
    until(lambda: world.gpu(SECOND)["state"] == "lost", "the loss")
    row = world.row(B)
    assert (row["phase"], row["pid"]) == ("blocked", pids[1])
    assert row["reason"] == f"{SECOND} is not in this machine"
    assert "hint: list the slices with: mic-supervisor gpus" in world.mic("plan").stdout
    assert world.ready(A)
    world.slices()
    until(world.ready, "both")
    assert (world.pid(A), world.pid(B)) == pids


def test_a_gpu_that_has_mig_on_is_not_given_as_a_whole(world: World) -> None:
    pids = world.pid(A), world.pid(B)
    world.mic.write(FILE + GPUS + "      0: a\n")
    blocked = (
        "! blocked  a-a0000000 on GPU 0: GPU 0 is parted into MIG slices\n"
        f'    hint: write a slice as the key: "{FIRST}", "{SECOND}"\n'
    )
    until(lambda: world.mic("plan").stdout.startswith(blocked), "the block")
    world.mic.write(FILE + GPUS)
    until(lambda: world.mic("plan").stdout == "No changes.\n", "the end of it")
    assert (world.pid(A), world.pid(B)) == pids


def test_a_first_file_has_the_slices(world: World, tmp_path: Path) -> None:
    target = tmp_path / "first.yaml"
    world.mic("init", "--output", target, rc=0)
    text = target.read_text()
    assert f'  "{FIRST}": none\n' in text
    assert "\n  # 0: none\n" in text
    world.mic("check", target, rc=0)


def test_doctor_counts_the_slices(world: World) -> None:
    assert "mig: is on for GPU 0, with 2 slices" in world.mic("doctor").stdout
