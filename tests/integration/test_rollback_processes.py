"""A host process goes back to what it was ready with, as long as its secrets are still known."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from tests.integration.job_world import masked, outcome, progress
from tests.support.commands import SERVE
from tests.support.mic import Mic
from tests.support.waiting import http, until

GOOD = SERVE
BAD = '[/bin/sh, -c, "exit 3"]'
WHY = "the new specification failed (it exited with 3)"
HINT = "    hint: change the file, or: mic-supervisor retry face-51000000\n"


def put(
    mic: Mic, command: str, gpus: str = "{0: face}", *, token: str = "one", more: str = ""
) -> None:
    mic.write(
        f"""
        version: 1
        models:
          face:
            backend: process
            command: {command}
            env: {{TOKEN: secret-{token}}}
            env_file: {mic.home}/face.env
            probe: {{http: /health, period: 200ms}}
            {more}
        gpus: {gpus}
        """
    )


@pytest.fixture
def alone(mic: Mic) -> Mic:
    mic.env["MIC_DOCKER_HOST"] = "none"
    (mic.home / "face.env").write_text("KEY=hunter\n")
    return mic


def row(mic: Mic, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = mic.status()["instances"][index]
    return found


def test_the_last_good_one_takes_over(alone: Mic) -> None:
    put(alone, GOOD)
    alone("apply", rc=0)
    endpoint = row(alone)["endpoints"]["http"]
    put(alone, BAD)
    done = alone("apply", rc=1)
    assert outcome(done.stdout) == (
        f"degraded   face-51000000  GPU 0  http://127.0.0.1:PORT  {WHY}; the last good one runs, "
        "and is ready\n" + HINT + "Apply: 0 as desired, 1 not.\n"
    )
    assert "face-51000000: start: rollback: it exited with 3" in progress(done.stdout)
    found = row(alone)
    assert (found["phase"], found["sync"], found["serving"]) == ("degraded", "out_of_sync", True)
    assert found["endpoints"]["http"] == endpoint
    environment = http(f"{endpoint}/env").json()
    assert (environment["TOKEN"], environment["KEY"]) == ("secret-one", "hunter")
    assert masked(alone("plan", rc=0).stdout) == (
        f"! blocked  face-51000000 on GPU 0: {WHY}; the last good one runs\n"
        + HINT
        + "\nNo changes; 1 blocked.\n"
    )
    kept = (alone.state_dir / alone.scope / "memory.json").read_text()
    assert "secret-one" not in kept and "hunter" not in kept
    put(alone, GOOD)
    pid = row(alone)["pid"]
    assert alone("plan", "--detailed-exitcode", rc=0).stdout == "No changes.\n"
    alone("apply", rc=0)
    assert row(alone)["pid"] == pid


@pytest.mark.parametrize("what", ["env", "env_file", "rollback: false"])
def test_there_is_no_way_back(alone: Mic, what: str) -> None:
    put(alone, GOOD)
    alone("apply", rc=0)
    if what == "env_file":
        (alone.home / "face.env").write_text("KEY=other\n")
    more = "rollout: {rollback: false}" if what.startswith("rollback") else ""
    put(alone, BAD, token="two" if what == "env" else "one", more=more)
    done = alone("apply", rc=1)
    assert outcome(done.stdout) == (
        "backoff    face-51000000  GPU 0  it exited with 3\nApply: 0 as desired, 1 not.\n"
    )


def test_a_roll_out_of_processes_halts(alone: Mic) -> None:
    put(alone, GOOD, '{"0-1": face}')
    alone("apply", rc=0)
    second = row(alone, 1)["pid"]
    put(alone, BAD, '{"0-1": face}')
    told = outcome(alone("apply", rc=1).stdout)
    assert (
        "blocked    face-51000001  GPU 1  http://127.0.0.1:PORT  "
        "the new specification failed on face-51000000; the earlier one runs\n" in told
    )
    assert row(alone, 1)["pid"] == second


def test_what_took_over_outlives_the_daemon_and_is_restarted(alone: Mic) -> None:
    put(alone, GOOD)
    daemon = alone.run()
    alone("apply", rc=0)
    put(alone, BAD)

    def took_over() -> bool:
        found = row(alone)
        return found["phase"] == "degraded" and found["serving"] is True

    until(took_over, "the one that took over")
    pid = row(alone)["pid"]
    daemon.stop()
    alone.run()
    until(took_over, "a daemon that knows it")
    assert row(alone)["pid"] == pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: row(alone)["pid"] not in (pid, None) and took_over(), "the restart")
    assert row(alone)["reason"] == f"{WHY}; the last good one runs, and is ready"
    http(f"{row(alone)['endpoints']['http']}/health?status=500", "PUT", "sick")
    until(lambda: row(alone)["serving"] is False, "the sickness")
    until(took_over, "another restart")
