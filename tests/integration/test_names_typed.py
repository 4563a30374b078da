"""A model with a name in another script: what is shown, and what each command takes for a name.

What runs is mic_supervisor/demo/server.py, as host processes on simulated GPUs.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support.commands import SERVE
from tests.support.mic import Daemon, Mic
from tests.support.waiting import until

FILE = f"""\
version: 1
models:
  人脸: {{backend: process, command: {SERVE}, probe: {{http: /health, period: 200ms}}}}
  MAM: {{backend: process, command: {SERVE}, probe: {{http: /health, period: 200ms}}}}
gpus: {{0: 人脸, 1: MAM}}
"""
KEPT = "m5235f749-51000000"  # the id: what runs since an earlier version has it
SHOWN = "人脸-51000000"


@pytest.fixture(params=["alone", "daemon"])
def machine(mic: Mic, request: pytest.FixtureRequest) -> Mic:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.write(FILE)
    if request.param == "daemon":
        mic.run()
    told = mic("apply", rc=0).stdout
    assert f"ready      {SHOWN}  GPU 0  http://127.0.0.1:" in told
    assert KEPT not in told
    return mic


def names(mic: Mic) -> list[str]:
    uuid = mic.status()["gpus"][0]["uuid"]
    return [KEPT, SHOWN, "人脸", "0", uuid]


def test_every_command_takes_an_id_a_model_and_a_gpu(machine: Mic) -> None:
    before = {row["id"]: row["pid"] for row in machine.status()["instances"]}
    assert set(before) == {KEPT, "MAM-51000001"}
    for name in names(machine):
        (row,) = machine("status", name, "--json", rc=0).json()["instances"]
        assert row["id"] == KEPT, name
    log = machine("logs", KEPT, rc=0).stdout
    for name in (SHOWN, "0"):
        assert machine("logs", name, rc=0).stdout == log
        assert SHOWN in machine("retry", name, rc=0).stdout, name
        assert machine("plan", "--target", name, rc=0).stdout.startswith("No changes.\n"), name
    text = machine("pause", SHOWN, rc=0).stdout
    assert f"paused     {SHOWN}  GPU 0" in text
    machine("resume", SHOWN, rc=0)
    assert {row["id"]: row["pid"] for row in machine.status()["instances"]} == before
    assert f"ready      {SHOWN}" in machine("restart", "0", rc=0).stdout
    after = {row["id"]: row["pid"] for row in machine.status()["instances"]}
    assert after[KEPT] != before[KEPT] and after["MAM-51000001"] == before["MAM-51000001"]


@pytest.fixture
def daemon(mic: Mic) -> Daemon:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.write(FILE)
    found = mic.run()
    mic("apply", rc=0)
    return found


def test_people_are_shown_the_name_everywhere(mic: Mic, daemon: Daemon) -> None:
    for command in (["plan"], ["status"], ["export", "nginx"], ["export", "haproxy"]):
        text = mic(*command, rc=0).stdout
        assert KEPT not in text.replace(f"server {KEPT} ", ""), text
        assert f"# {SHOWN}" in text or command[0] != "export"
    for command in ("logs", "restart"):
        refused = mic(command, "nosuchthing", rc=1).stderr
        assert SHOWN in refused and KEPT not in refused
    for name in (SHOWN, "0"):
        text = mic("history", name, rc=0).stdout
        assert f"  {SHOWN}: " in text and "MAM" not in text, name
    assert f"{SHOWN}: " in daemon.text() and f"{KEPT}: " not in daemon.text()
    for words in (("nosuchthing",), ("7", "--json")):
        done = mic("history", *words, rc=1)
        assert done.stderr.startswith(f"error: cannot show the history of {words[0]}: nothing is")
        assert SHOWN in done.stderr


@pytest.mark.usefixtures("daemon")
def test_a_shell_completes_what_runs(mic: Mic) -> None:
    typed = {"_MIC_SUPERVISOR_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    for word, expected in (("人", ["人脸", SHOWN]), ("MAM-", ["MAM-51000001"]), ("3", ["3"])):
        done = subprocess.run(
            mic.program(),
            env={**mic.environment(), **typed, "COMP_WORDS": f"mic-supervisor logs {word}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        assert [line.partition(",")[2] for line in done.stdout.splitlines()] == expected


def test_down_says_who_asked_for_it(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.write(FILE)
    mic("apply", rc=0)
    terminal, other = os.openpty()
    os.write(terminal, b"n\n")
    command = [*mic.program(), "down"]
    refused = subprocess.run(
        command, env=mic.environment(), stdin=other, capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stderr) == (130, "nothing removed\n")
    assert all(row["pid"] for row in mic.status()["instances"])
    text = mic("down", "--yes", rc=0).stdout
    assert f"To be removed: MAM-51000001, {SHOWN}" in text
    assert f"{SHOWN}: remove: somebody said `mic-supervisor down`" in text
    until(lambda: not any(row["pid"] for row in mic.status()["instances"]), "the end of both")
