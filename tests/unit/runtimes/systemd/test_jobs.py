"""Why a start failed, and what starts leave on disk for PID 1."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mic_supervisor import clocks
from mic_supervisor.runtimes.systemd import jobs as systemd_jobs
from mic_supervisor.runtimes.systemd.jobs import SpawnFailed, spawn_reason
from mic_supervisor.runtimes.systemd.unit import Unit


def test_only_what_starts_that_were_cut_short_left_is_deleted(tmp_path: Path) -> None:
    """Also while the clock is set: files have their times on the clock that nobody sets."""
    secrets = tmp_path / "secrets"
    systemd_jobs.write_secret(secrets / "under-way", "A=1")
    assert abs((secrets / "under-way").stat().st_mtime - clocks.steady()) < 60
    for name, age in (("left", 3600.0), ("of-an-earlier-boot", -3600.0)):
        (secrets / name).write_text("A=1")
        os.utime(secrets / name, (clocks.steady() - age, clocks.steady() - age))
    systemd_jobs.write_secret(secrets / "new", "A=1")
    assert {item.name for item in secrets.iterdir()} == {"under-way", "new"}


def test_starts_at_once_leave_each_others_files_alone(tmp_path: Path) -> None:
    def start(lane: int) -> None:
        for number in range(50):
            path = tmp_path / "secrets" / f"{lane}-{number}"
            systemd_jobs.write_secret(path, "A=1")
            path.unlink()  # as PID 1's job has ended; raises where somebody has swept it

    with ThreadPoolExecutor(8) as lanes:
        list(lanes.map(start, range(8)))


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("canceled", "somebody else cancelled it"),
        ("timeout", "it did not come up in time"),
        ("dependency", "something that it depends on failed"),
        ("collected", "systemd dropped the job"),
        ("once", "systemd ended the job with “once”"),
    ],
)
def test_jobs_that_do_not_come_to_their_end(result: str, reason: str) -> None:
    assert spawn_reason(SpawnFailed(None, result)) == reason


@pytest.mark.parametrize(
    ("code", "status", "ran", "reason"),
    [
        (1, 203, False, "the program cannot be executed"),
        (1, 200, False, "its working directory cannot be entered"),
        (1, 226, False, "systemd could not set it up (status 226)"),
        (1, 1, True, None),
        (1, 255, True, None),
        (2, 203, True, None),
    ],
)
def test_a_step_that_failed_is_told_from_an_end(
    code: int, status: int, ran: bool, reason: str | None
) -> None:
    properties = {
        "ExecMainCode": code,
        "ExecMainStatus": status,
        "ExecMainExitTimestamp": 1,
        "Result": "exit-code",
        "ActiveState": "failed",
    }
    failure = SpawnFailed(Unit("x", "/x", properties), "failed")
    assert failure.ran is ran
    if reason is not None:
        assert spawn_reason(failure) == reason


def test_a_unit_that_was_never_set_up_did_not_run() -> None:
    properties = {"Result": "resources", "ActiveState": "failed"}
    failure = SpawnFailed(Unit("x", "/x", properties), "failed")
    assert not failure.ran
    assert spawn_reason(failure) == "systemd could not set it up"
    assert spawn_reason(SpawnFailed(None, "failed")) == "systemd does not say why"
