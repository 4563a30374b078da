"""pause, resume and --target: what is left as it is, with a daemon or without one.

What runs is mic_supervisor/demo/server.py, as host processes on simulated GPUs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.request
from typing import Any

import pytest

from tests.support.commands import SERVE
from tests.support.mic import PROGRAM, Mic
from tests.support.waiting import http, until


def put(
    mic: Mic, gpus: str, *, env: str = "{}", probe: str = "{http: /health, period: 200ms}"
) -> None:
    lines = ["version: 1", "models:"]
    for name in ("MAM", "face", "old"):
        given = env if name == "MAM" else "{}"
        lines.append(
            f"  {name}: {{backend: process, command: {SERVE}, probe: {probe}, env: {given}}}"
        )
    mic.write("\n".join([*lines, f"gpus: {gpus}", ""]))


@pytest.fixture(params=["alone", "daemon"])
def machine(mic: Mic, request: pytest.FixtureRequest) -> Mic:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM, 1: MAM, 2: face}")
    mic("apply", rc=0)
    if request.param == "daemon":
        mic.run()
    return mic


def rows(mic: Mic) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in mic.status()["instances"]}


def pids(mic: Mic) -> dict[str, int | None]:
    return {name: row["pid"] for name, row in rows(mic).items()}


def clocks(text: str) -> str:
    return re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", text)


def ended(mic: Mic, name: str) -> None:
    until(lambda: rows(mic)[name]["pid"] is None, f"the end of {name}")


# --- pause --------------------------------------------------------------------------------------


def test_a_paused_model_stays_as_it_is_whatever_happens(machine: Mic) -> None:
    before = pids(machine)
    told = machine("pause", "MAM", "--reason", "a new riser", rc=0).stdout
    assert told.splitlines()[-3].startswith("MAM is paused, until: mic-supervisor resume MAM")
    put(machine, "{0: MAM, 1: face, 2: none}", env="{A: b}")
    os.kill(before["MAM-51000000"] or 0, signal.SIGKILL)
    ended(machine, "MAM-51000000")
    machine("apply", rc=1)
    found = rows(machine)
    assert {name: (row["phase"], row["health"]) for name, row in found.items()} == {
        "MAM-51000000": ("paused", "suspended"),
        "MAM-51000001": ("paused", "suspended"),
        "face-51000001": ("blocked", "missing"),
    }
    assert clocks(machine("plan", rc=0).stdout) == (
        "! paused   MAM-51000000 on GPU 0: paused since HH:MM:SS (a new riser); would create: its "
        "specification changed: env.A, and the earlier one does not run\n"
        "    hint: mic-supervisor resume MAM\n"
        "! paused   MAM-51000001 on GPU 1: paused since HH:MM:SS (a new riser); would remove: the "
        "file has face on its GPU\n"
        "    hint: mic-supervisor resume MAM\n"
        "! blocked  face-51000001 on GPU 1: GPU 1 is still held by MAM-51000001, paused since "
        "HH:MM:SS (a new riser)\n"
        "    hint: mic-supervisor resume MAM\n"
        "\n"
        "No changes; 1 blocked; 2 paused.\n"
    )
    assert machine("plan", "--detailed-exitcode").rc == 2
    assert pids(machine)["MAM-51000001"] == before["MAM-51000001"]

    machine("resume", "MAM", rc=0)
    machine("apply", rc=0)
    assert {name: row["phase"] for name, row in rows(machine).items()} == {
        "MAM-51000000": "ready",
        "face-51000001": "ready",
    }


def test_a_paused_gpu_by_any_name(machine: Mic) -> None:
    uuid = machine("status", "--json").json()["gpus"][2]["uuid"]
    told = machine("pause", uuid, rc=0).stdout
    assert "GPU 2 is paused, until: mic-supervisor resume 2\n" in told
    status = machine("status", "--json").json()
    assert [(item["model"], item["gpu"], item["reason"]) for item in status["paused"]] == [
        (None, {"uuid": uuid, "index": 2}, None)
    ]
    assert machine("status", rc=3).stdout.splitlines()[2].split("\t")[2] == "paused"
    machine("pause", "3", rc=0)
    assert "GPU 3 is paused since " in machine("status").stderr
    assert machine("resume", "--all", rc=0).stdout.startswith("GPU 2, GPU 3 are resumed.\n")
    machine("status", rc=0)


def test_what_acts_on_a_paused_one_is_refused(machine: Mic) -> None:
    machine("pause", "MAM", rc=0)
    machine("pause", "3", rc=0)
    before = machine.config.read_bytes(), pids(machine)
    for arguments, subject, name in (
        (("restart", "MAM"), "MAM", "MAM"),
        (("restart", "MAM-51000001"), "MAM", "MAM"),
        (("retry", "MAM"), "MAM", "MAM"),
        (("start", "face", "--gpu", "3"), "GPU 3", "3"),
        (("start", "MAM", "--gpu", "3"), "MAM", "MAM"),
        (("stop", "--gpu", "0"), "MAM", "MAM"),
    ):
        refused = machine(*arguments, rc=1).stderr
        assert f": {subject} is paused since " in refused
        assert refused.endswith(f"hint: mic-supervisor resume {name}\n")
    assert (machine.config.read_bytes(), pids(machine)) == before


def test_names_that_mean_nothing_are_told_with_what_there_is(machine: Mic) -> None:
    for command in ("pause", "resume"):
        refused = machine(command, "whisper", rc=1).stderr
        assert refused == (
            f"error: cannot {command} whisper: there is no model and no GPU 'whisper'\n"
            "hint: models are MAM, face, old; GPUs are 0, 1, 2, 3\n"
        )
    assert machine("resume", "face", rc=1).stderr == (
        "error: cannot resume face: face is not paused\nhint: nothing is paused\n"
    )
    assert machine("resume", "--all", rc=1).stderr == "error: cannot resume: nothing is paused\n"
    assert machine("resume", rc=64).stdout == ""
    assert machine("pause", "old", rc=0).stdout.startswith("old is paused")  # it runs nowhere


def test_a_pause_outlives_the_daemon_and_is_seen_everywhere(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM, 1: face}")
    daemon = mic.run()
    mic("apply", rc=0)
    mic("pause", "MAM", rc=0)
    pid = pids(mic)["MAM-51000000"]
    daemon.stop()
    os.kill(pid or 0, signal.SIGKILL)
    mic.run()
    ended(mic, "MAM-51000000")
    time.sleep(1.0)  # a loop that forgot would have started it long ago
    row = rows(mic)["MAM-51000000"]
    assert (row["phase"], row["pid"], row["restarts"]) == ("paused", None, 0)
    assert http(f"{mic.url}/readyz").status == 503
    metrics = http(f"{mic.url}/metrics").text
    assert re.search(r'mic_model_state\{[^}]*"MAM"[^}]*state="paused"\} 1\.0', metrics)
    request = urllib.request.Request(f"{mic.url}/", headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=10) as page:
        assert "1 of 2 instances paused" in page.read().decode()
    assert [e["text"] for e in mic("history", "MAM", "--json").json()["events"]].count(
        "paused"
    ) == 1
    assert mic("down", "--yes", rc=1).stderr.startswith("error: cannot remove what the daemon")
    told = mic("resume", "MAM", rc=0).stdout
    assert "start: ended by SIGKILL" in told
    assert rows(mic)["MAM-51000000"]["phase"] == "ready"


def test_down_is_refused_while_something_is_paused(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM}")
    mic("apply", rc=0)
    mic("pause", "0", rc=0)
    refused = mic("down", "--yes", rc=1).stderr
    assert clocks(refused) == (
        "error: cannot remove MAM-51000000: GPU 0 is paused since HH:MM:SS\n"
        "hint: mic-supervisor resume 0, or all of them: mic-supervisor resume --all\n"
    )
    assert pids(mic)["MAM-51000000"] is not None


def test_what_is_under_way_is_finished_before_the_pause_is_told(mic: Mic) -> None:
    """The old one is stopped already: its GPU is not left empty for a pause."""
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM}", env="{IGNORE_SIGTERM: '1'}")
    text = mic.config.read_text().replace("env: {IGNORE", "stop_timeout: 5s, env: {IGNORE")
    mic.config.write_text(text)
    mic.run()
    mic("apply", rc=0)
    mic.config.write_text(text.replace("IGNORE_SIGTERM: '1'", "STEP: '1'"))
    until(lambda: rows(mic)["MAM-51000000"]["phase"] == "stopping", "the stop")
    mic("pause", "MAM", rc=0)
    row = rows(mic)["MAM-51000000"]
    assert row["phase"] == "paused"
    assert row["sync"] == "in_sync"  # the new one runs
    assert row["pid"] is not None


# --- targets ------------------------------------------------------------------------------------


def test_only_the_chosen_are_changed(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM, 1: face, 2: old}")
    mic("apply", rc=0)
    before = pids(mic)
    put(mic, "{0: face, 1: MAM, 3: MAM}")
    expected = (
        "left out: MAM-51000001 (create: nothing runs for it yet)\n"
        "left out: face-51000001 (remove: the file has MAM on its GPU)\n"
        "left out: old-51000002 (remove: the file no longer names it)\n"
        "left out: MAM-51000003 (create: nothing runs for it yet)\n"
    )
    planned = mic("plan", "--target", "0", rc=0).stdout
    assert re.sub(r"removes mic-\S+-(MAM-51000000)-[0-9a-f]{8}\n", r"removes \1\n", planned) == (
        "- remove   MAM-51000000   GPU 0  the file has face on its GPU\n"
        "    removes MAM-51000000\n"
        "+ create   face-51000000  GPU 0  nothing runs for it yet\n"
        "\n" + expected + "\n"
        "Plan: 1 to create, 1 to remove; 4 left out.\n"
    )
    applied = mic("apply", "--target", "0", rc=0).stdout
    assert applied.endswith(expected + "Apply: 1 as desired.\n")
    now = pids(mic)
    assert {name: now[name] for name in ("face-51000001", "old-51000002")} == {
        name: before[name] for name in ("face-51000001", "old-51000002")
    }
    assert now["face-51000000"] is not None
    document = mic("apply", "--target", "3", "--target", "MAM", "--json", rc=0).json()
    assert [row["id"] for row in document["instances"]] == ["MAM-51000001", "MAM-51000003"]
    assert document["left_out"] == [
        {
            "instance": "old-51000002",
            "model": "old",
            "gpus": ["GPU-51000002-0000-4000-8000-000000000002"],
            "action": "remove",
            "cause": "the file no longer names it",
        }
    ]
    assert pids(mic)["old-51000002"] == before["old-51000002"]
    assert mic("apply", "--target", "2", rc=0).stdout.endswith(
        "Apply: the file asks for no instance there.\n"
    )


def test_one_that_is_left_out_does_not_count(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM, 1: face}", env="{EXIT_UNLESS: /nowhere}")
    mic("apply", "--target", "face", rc=0)
    assert mic("apply", "--target", "MAM", rc=1).stdout.endswith("Apply: 0 as desired, 1 not.\n")
    mic("apply", rc=3)


def test_with_a_daemon_a_target_is_what_is_waited_for(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM, 1: MAM, 2: face}")
    mic("apply", rc=0)
    mic.run()
    before = pids(mic)
    put(mic, "{0: MAM, 1: MAM, 3: old}")
    told = mic("apply", "--target", "3", rc=0).stdout
    assert told.endswith(
        "left out: face-51000002 (remove: the file no longer names it)\n"
        "The daemon converges everything else as well; --target chose what to wait for.\n"
        "Apply: 1 as desired.\n"
    )
    assert pids(mic)["face-51000002"] == before["face-51000002"]
    shown = mic("plan", "--target", "MAM", rc=0).stdout
    assert shown == (
        "left out: face-51000002 (remove: the file no longer names it)\n"
        "\n"
        "No changes; 1 left out.\n"
        "The daemon converges what is left out as well, but for removals.\n"
    )


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_target_that_there_is_not_is_told(machine: Mic, command: str) -> None:
    refused = machine(command, "--target", "face", "--target", "9", rc=1)
    assert refused.stdout == ""
    assert refused.stderr == (
        f"error: cannot {command} face 9: there is no GPU 9; this machine has GPU 0,1,2,3\n"
        "hint: models are MAM, face, old; GPUs are 0, 1, 2, 3\n"
    )


def test_who_pauses_waits_for_who_converges(mic: Mic) -> None:
    """Alone it is the lock that keeps a pause from being lost."""
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM, 1: face}", env="{START_DELAY: '1.5'}")
    applying = subprocess.Popen(
        [PROGRAM, "apply"], env=mic.environment(), stdout=subprocess.DEVNULL
    )
    until(lambda: mic.run_dir.joinpath(f"{mic.scope}.lock").exists(), "the lock")
    mic("pause", "face", rc=0)
    assert applying.wait(30) == 0
    assert rows(mic)["face-51000001"]["phase"] == "paused"


def test_resume_waits_for_what_leaves(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "{0: MAM, 1: MAM, 2: face}")
    mic.run()
    mic("apply", rc=0)
    mic("pause", "face", rc=0)
    put(mic, "{0: MAM, 1: MAM, 2: none}")
    mic("apply", rc=3)
    assert "pending" not in mic("resume", "face", rc=0).stdout
    assert sorted(rows(mic)) == ["MAM-51000000", "MAM-51000001"]
