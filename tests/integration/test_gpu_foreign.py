"""Strangers on GPUs, and memory that a former owner leaves: a real daemon on the mock NVML."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mock_nvml import MockGpu, MockNvml, MockProcess, mock_uuid
from tests.support.mic import Daemon, Mic
from tests.support.waiting import http, until

GIB = 1 << 30
TIMEOUT = 4.0  # seconds that memory has to be released, instead of the program's own 30


def entry(a: str = "", b: str = "", gpus: str = "{0: a, 1: b, 2: none}", tag: str = "1") -> str:
    command = f"command: [/bin/sleep, '1000', '{tag}e-3']"
    return f"""
        version: 1
        models:
          a: {{backend: process, {command}{a}}}
          b: {{backend: process, {command}{b}}}
        gpus: {gpus}
    """


@pytest.fixture
def nvml(tmp_path: Path, mic: Mic) -> MockNvml:
    mock = MockNvml(tmp_path)
    mock.set([MockGpu(), MockGpu(), MockGpu()])
    mic.env |= {
        "MIC_GPU_SOURCE": "nvml",
        "MIC_DOCKER_HOST": "none",
        "MIC_RESYNC": "300ms",
        **mock.env(),
    }
    return mock


@pytest.fixture
def foreign() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def rows(mic: Mic) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in mic.status()["instances"]}


def messages(daemon: Daemon) -> list[str]:
    return [
        re.sub("^.*?(INFO|WARNING|ERROR) +", r"\1 ", line) for line in daemon.text().split("\n")
    ]


def metrics(mic: Mic) -> str:
    return http(f"{mic.url}/metrics").text


def test_a_foreign_process_blocks_with_who_since_when_and_how_much(
    mic: Mic, nvml: MockNvml, foreign: int
) -> None:
    nvml.change(0, processes=[MockProcess(foreign, 3 * GIB)])
    mic.write(entry())
    done = mic("apply", rc=3)
    held = rf"GPU 0 is held by PID {foreign} \(sleep, 3\.0 GiB\), not ours: .*since \d\d:\d\d:\d\d"
    assert re.search(held, done.stdout), done
    assert "hint: end that process, or move the model to another GPU" in done.stdout
    nvml.change(0, processes=[])
    assert "2 as desired" in mic("apply").stdout


def test_one_that_is_told_to_wait_is_waited_for(mic: Mic, nvml: MockNvml, foreign: int) -> None:
    nvml.change(0, processes=[MockProcess(foreign, 3 * GIB)])
    mic.write(entry(a=", on_foreign: wait"))
    daemon = mic.run()
    until(lambda: rows(mic)["b"]["phase"] == "unprobed", "the other one")
    row = rows(mic)["a"]
    assert (row["phase"], row["health"]) == ("waiting_vram", "progressing")
    assert row["reason"].startswith(f"waiting for the GPU: GPU 0 is held by PID {foreign} (sleep")
    apply = mic.start("apply")
    until(lambda: "waiting_vram" in mic("status").stdout, "the status")
    assert apply.process.poll() is None
    nvml.change(0, processes=[])
    assert apply.process.wait(60) == 0, apply.text()
    assert rows(mic)["a"]["phase"] == "unprobed"
    assert daemon.stop() == 0


def test_one_who_comes_later_is_told_of_once_and_disturbs_nothing(
    mic: Mic, nvml: MockNvml, foreign: int
) -> None:
    mic.write(entry())
    daemon = mic.run()
    until(lambda: [r["phase"] for r in rows(mic).values()] == ["unprobed"] * 2, "both")
    before = {name: row["pid"] for name, row in rows(mic).items()}

    nvml.change(1, processes=[MockProcess(before["b"], GIB), MockProcess(foreign, 3 * GIB)])
    nvml.change(2, processes=[MockProcess(foreign, 2 * GIB)])
    on_1 = f"GPU 1 is for b-a0000001 alone, and PID {foreign} (sleep, 3.0 GiB) is on it as well"
    on_2 = f"GPU 2 should be empty, but PID {foreign} (sleep, 2.0 GiB) holds it"
    until(lambda: f"GPU 2: {on_2}" in daemon.text(), "the log")
    until(lambda: daemon.text().count("is on it as well") == 1, "the other GPU")
    plan = mic("plan").stdout
    assert f"warning: {on_1}" in plan
    assert f"warning: {on_2}" in plan
    uuid = mock_uuid(1)
    until(
        lambda: (
            f'mic_gpu_holders{{owner="orphan",uuid="{uuid}"}} 1.0' in metrics(mic)
            or f'mic_gpu_holders{{owner="foreign",uuid="{uuid}"}} 1.0' in metrics(mic)
        ),
        "the metric",
    )
    states = {gpu["index"]: gpu["state"] for gpu in mic.status()["gpus"]}
    assert states == {0: "managed", 1: "managed", 2: "foreign"}

    nvml.change(1, processes=[MockProcess(before["b"], GIB)])
    nvml.change(2, processes=[])
    until(lambda: daemon.text().count("has left it") == 2, "that it left")
    assert f"WARNING GPU 1: PID {foreign} (sleep, 3.0 GiB) has left it" in messages(daemon)
    assert daemon.text().count("is on it as well") == 1
    assert "is on it as well" in mic("history").stdout
    assert {name: row["pid"] for name, row in rows(mic).items()} == before
    os.kill(foreign, 0)
    assert daemon.stop() == 0


def test_a_start_waits_for_memory_to_be_back_where_it_was(mic: Mic, nvml: MockNvml) -> None:
    nvml.change(0, memory_used=GIB)
    mic.write(entry())
    mic("apply")
    was = rows(mic)["a"]["pid"]
    nvml.change(0, memory_used=9 * GIB)
    mic.write(entry(tag="2"))
    apply = mic.start("apply")
    text = "waiting for 7.5 GiB to be released on GPU 0"
    until(lambda: text in apply.text(), "the wait")
    until(lambda: "b-a0000001: unprobed" in apply.text(), "the other GPU")
    assert rows(mic)["a"]["pid"] != was
    nvml.change(0, memory_used=GIB + (512 << 20))
    assert apply.process.wait(60) == 0, apply.text()
    os.kill(rows(mic)["a"]["pid"], 0)


def test_memory_that_nobody_has_is_started_into_where_the_model_fits(
    mic: Mic, nvml: MockNvml
) -> None:
    """Both cases wait side by side."""
    mic.shortened["mic_supervisor.plan.release.TIMEOUT"] = TIMEOUT
    vram = {"a": ", vram: 20GiB", "b": ", vram: 30GiB"}
    mic.write(entry(**vram))
    daemon = mic.run()
    until(lambda: [r["phase"] for r in rows(mic).values()] == ["unprobed"] * 2, "both")
    for number in (0, 1):
        nvml.change(number, memory_used=15 * GIB)
    for row in rows(mic).values():
        os.kill(row["pid"], signal.SIGKILL)
    until(lambda: "starting anyway" in daemon.text(), "the timeout")
    assert (
        f"WARNING a-a0000000: after {TIMEOUT:g} s still 14.5 GiB to be released on GPU 0, for "
        "which the driver lists nobody; starting anyway"
    ) in messages(daemon)
    until(lambda: rows(mic)["a"]["phase"] == "unprobed", "the start")
    until(lambda: rows(mic)["b"]["phase"] == "blocked", "the refusal")
    assert rows(mic)["b"]["reason"] == (
        f"cannot start b-a0000001: after {TIMEOUT:g} s GPU 1 has 24.7 GiB free of the 30.0 GiB "
        "that it needs, and the driver lists nobody who has the rest"
    )
    released = re.search(r"mic_gpu_memory_release_seconds_sum ([\d.]+)", metrics(mic))
    assert released is not None
    assert TIMEOUT <= float(released[1]) < TIMEOUT + 20
    nvml.change(1, memory_used=0)
    until(lambda: rows(mic)["b"]["phase"] == "unprobed", "the release")
    assert daemon.stop() == 0


def test_a_wait_for_memory_is_one_phase_with_its_reason_and_ever_longer_pauses(
    mic: Mic, nvml: MockNvml
) -> None:
    mic.shortened["mic_supervisor.plan.release.TIMEOUT"] = 6.0
    mic.write(entry(a=", vram: 20GiB", gpus="{0: a}"))
    daemon = mic.run()
    until(lambda: rows(mic)["a"]["phase"] == "unprobed", "the start")
    nvml.change(0, memory_used=30 * GIB)
    os.kill(rows(mic)["a"]["pid"], signal.SIGKILL)
    waiting = "waiting for 29.5 GiB to be released on GPU 0"

    def waits() -> dict[str, Any] | None:
        row: dict[str, Any] = rows(mic)["a"]
        return row if row["reason"] == waiting else None

    assert until(waits, "the first wait")["phase"] == "waiting_vram"  # type: ignore[index]
    assert waiting in http(f"{mic.url}/readyz").text

    refused = "that it needs, and the driver lists nobody who has the rest"
    until(lambda: rows(mic)["a"]["phase"] == "blocked", "the refusal")
    seen: set[tuple[str, bool]] = set()

    def tried(times: int) -> bool:
        row = rows(mic)["a"]
        seen.add((row["phase"], refused in row["reason"]))
        assert refused in http(f"{mic.url}/readyz").text
        return daemon.text().count(": start failed after ") >= times

    until(lambda: tried(4), "three more tries", timeout=150)
    assert seen == {("blocked", True)}
    kept = mic("history", "a", "--json").json()["events"]
    phases = [event["phase"] for event in kept]
    since = len(phases) - phases[::-1].index("waiting_vram")
    assert [event["kind"] for event in kept[since:]] == ["failed", "phase"]

    nvml.change(0, memory_used=0)
    until(lambda: rows(mic)["a"]["phase"] == "unprobed", "the release")
    assert daemon.stop() == 0


def test_a_card_that_is_too_small_is_seen_before_anything_is_stopped(
    mic: Mic, nvml: MockNvml
) -> None:
    mic.write(entry())
    mic("apply")
    before = rows(mic)["a"]["pid"]
    mic.write(entry(a=", vram: 80GiB", tag="2"))
    done = mic("apply", rc=3)
    assert "it needs 80.0 GiB, and GPU 0 (Mock A100) has 40.0 GiB" in done.stdout
    assert "hint: give it a larger GPU, or correct `vram` of a" in done.stdout
    os.kill(before, 0)
    assert rows(mic)["a"]["pid"] == before


@pytest.fixture
def mps(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A control daemon as an operator runs it, and its server: (directory of pipes, PID)."""
    for program, stand_in in (("control", "/bin/sh"), ("server", "/bin/sleep")):
        shutil.copy(stand_in, tmp_path / f"nvidia-cuda-mps-{program}")
    script = f"{tmp_path}/nvidia-cuda-mps-server 600 & echo $! && wait"
    daemon = subprocess.Popen(
        [tmp_path / "nvidia-cuda-mps-control", "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    server = int(daemon.stdout.readline())
    (tmp_path / "pipes").mkdir()
    (tmp_path / "pipes" / "nvidia-cuda-mps-control.pid").write_text(f"{daemon.pid}\n")
    yield tmp_path / "pipes", server
    os.kill(server, signal.SIGKILL)
    daemon.wait(60)
    daemon.stdout.close()


def test_the_mps_server_of_a_model_is_no_obstacle_to_its_next_start(
    mic: Mic, nvml: MockNvml, mps: tuple[Path, int], foreign: int
) -> None:
    pipes, server = mps
    mic.write(entry(a=f", env: {{CUDA_MPS_PIPE_DIRECTORY: {pipes}}}", gpus="{0: a, 1: b}"))
    daemon = mic.run()
    until(lambda: [r["phase"] for r in rows(mic).values()] == ["unprobed"] * 2, "both")
    before = rows(mic)
    for index, model in enumerate("ab"):  # the server is on each GPU that its daemon sees
        client = MockProcess(before[model]["pid"], GIB, "mps")
        nvml.change(index, processes=[MockProcess(server, 30 << 20), client])
    on_1 = f"GPU 1 is for b-a0000001 alone, and PID {server} (nvidia-cuda-mps, 30 MiB) is on it"
    until(lambda: on_1 in daemon.text(), "the server beside a model that does not ask it")
    assert "GPU 0 is for a-a0000000 alone" not in daemon.text()

    nvml.change(0, processes=[MockProcess(server, 30 << 20)])
    os.kill(before["a"]["pid"], signal.SIGKILL)
    until(lambda: rows(mic)["a"]["pid"] not in (None, before["a"]["pid"]), "the next start")

    # A client of somebody else's makes the server theirs as well.
    shared = [MockProcess(server, 30 << 20), MockProcess(foreign, GIB, "mps")]
    nvml.change(0, processes=shared)
    os.kill(rows(mic)["a"]["pid"], signal.SIGKILL)
    until(lambda: rows(mic)["a"]["phase"] == "blocked", "the foreign client")
    assert "GPU 0 is held by PID" in rows(mic)["a"]["reason"]
    assert daemon.stop() == 0
