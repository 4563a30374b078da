"""The daemon on the mock NVML: Xid errors, and a driver that is replaced under it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.mock_nvml import MockGpu, MockNvml, mock_uuid
from tests.support.mic import Mic
from tests.support.waiting import until

ENTRY = """
    version: 1
    models:
      a: {backend: process, command: [/bin/sleep, "1000"]}
    gpus: {0: a, 1: none}
"""


@pytest.fixture
def nvml(tmp_path: Path, mic: Mic) -> MockNvml:
    mock = MockNvml(tmp_path)
    mock.set([MockGpu(), MockGpu()])
    mic.env |= {"MIC_GPU_SOURCE": "nvml", "MIC_DOCKER_HOST": "none", **mock.env()}
    return mock


def pid_of(mic: Mic) -> int:
    def running() -> int | None:
        rows = mic.status()["instances"]
        return next((row["pid"] for row in rows if row["phase"] == "unprobed"), None)

    return until(running, "the instance") or 0


def test_an_xid_is_logged_with_what_the_driver_advises(mic: Mic, nvml: MockNvml) -> None:
    mic.write(ENTRY)
    daemon = mic.run()
    pid_of(mic)
    nvml.change(1, recovery_action=4)
    nvml.add_event(1, 79)
    nvml.add_event(0, 13)
    until(lambda: "Xid 13" in daemon.text(), "the log")
    lines = [line.split(" ", 2)[2] for line in daemon.text().splitlines() if ": Xid" in line]
    lines = [line for line in lines if "unhealthy" not in line]
    assert [re.sub(" +", " ", line) for line in lines] == [
        f"ERROR GPU 1 ({mock_uuid(1)}): Xid 79, critical; "
        "the driver asks for it to be drained and reset",
        f"WARNING GPU 0 ({mock_uuid(0)}): Xid 13, app; the driver asks for nothing",
    ]
    assert daemon.stop() == 0


def test_a_driver_that_was_replaced_ends_the_daemon_and_nothing_else(
    mic: Mic, nvml: MockNvml
) -> None:
    mic.env["MIC_RESYNC"] = "500ms"
    mic.env["MIC_ON_STOP"] = "stop"  # an end that nobody asked for is no stop
    mic.write(ENTRY)
    daemon = mic.run()
    pid = pid_of(mic)

    nvml.break_library(18)

    assert daemon.process.wait(60) == 1
    assert daemon.text().endswith(
        "stopped; instances keep running\n"
        "error: cannot continue: the NVIDIA driver was replaced while the daemon ran, and a "
        "process cannot load the new library; instances keep running\n"
        "hint: systemd starts the daemon again; elsewhere: mic-supervisor run\n"
    )
    os.kill(pid, 0)

    nvml.break_library(0)  # a new process loads the new library
    again = mic.run()
    assert pid_of(mic) == pid
    assert again.stop(signal.SIGTERM) == 0


def test_a_library_that_never_fitted_does_not_end_the_daemon(mic: Mic, nvml: MockNvml) -> None:
    """A restart would not help, and would be tried for ever."""
    mic.env["MIC_RESYNC"] = "200ms"
    nvml.break_library(18)
    mic.write(ENTRY)
    daemon = mic.run()
    (gpu,) = {row["reason"] for row in mic.status()["instances"]} or {""}
    assert "differ in version" in gpu
    assert daemon.process.poll() is None
    assert daemon.stop() == 0
