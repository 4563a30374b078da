"""drain and undrain: a whole host out of service, with a daemon or without one.

What runs is mic_supervisor/demo/server.py as host processes, and containers on the real engine.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.integration.daemon_world import container, daemon_world, process
from tests.support import scopes
from tests.support.commands import SERVE
from tests.support.mic import Mic
from tests.support.waiting import http, until

MODELS = f"""\
version: 1
models:
  MAM: {{backend: process, command: {SERVE}, probe: {{http: /health, period: 200ms}}}}
  face: {{backend: process, command: {SERVE}, probe: {{http: /health, period: 200ms}}}}
"""
FILE = MODELS + "gpus: {0: MAM, 1: MAM, 2: face}\n"
DRAINED = "the host is drained since HH:MM:SS"


@pytest.fixture(params=["alone", "daemon"])
def machine(mic: Mic, request: pytest.FixtureRequest) -> Mic:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.config.write_text(FILE)
    mic("apply", rc=0)
    if request.param == "daemon":
        mic.run()
    return mic


def rows(mic: Mic) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in mic.status()["instances"]}


def phases(mic: Mic) -> dict[str, tuple[str, str, int | None]]:
    return {name: (row["phase"], row["health"], row["pid"]) for name, row in rows(mic).items()}


def running(mic: Mic) -> list[int]:
    """Everything of the scope, but for the daemon itself."""
    daemons = {daemon.pid for daemon in mic.daemons}
    return [pid for pid in scopes.processes(mic.scope) if pid not in daemons]


def clocks(text: str) -> str:
    return re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", text)


ALL = ("MAM-51000000", "MAM-51000001", "face-51000002")
STOPPED = dict.fromkeys(ALL, ("drained", "suspended", None))


def test_a_host_is_drained_and_comes_back(machine: Mic) -> None:
    asked = machine("drain", rc=1)
    assert asked.stderr == (
        "error: cannot ask whether to go on: this is no terminal\nhint: say --yes\n"
    )
    assert asked.stdout == f"To be stopped: {', '.join(ALL)}\n"
    assert running(machine) != []
    said = machine("drain", "--yes", "--reason", "a new riser", rc=0).stdout
    assert f"Stopped 3: {', '.join(ALL)}.\n" in said
    assert said.endswith("The host is drained, until: mic-supervisor undrain\n")
    assert phases(machine) == STOPPED
    held = f"{DRAINED} (a new riser)"

    plan = clocks(machine("plan", rc=0).stdout)
    assert f"! drained  MAM-51000000 on GPU 0: {held}\n    hint: mic-supervisor undrain\n" in plan
    assert plan.endswith("No changes; 3 drained.\n")
    status = machine("status", rc=3)
    assert f"warning: {held}; to end that: mic-supervisor undrain" in clocks(status.stderr)
    found = machine.status()["drained"]
    assert (found["reason"], found["until_reboot"]) == ("a new riser", False)
    assert f"{held}" in clocks(machine("doctor", rc=None).stdout)

    machine.config.write_text(MODELS + "gpus: {0: MAM, 1: face, 2: face, 3: MAM}\n")
    applied = machine("apply", rc=1)
    assert f"drained    MAM-51000003  GPU 3  {held}" in clocks(applied.stdout)
    before = machine.config.read_bytes()
    for arguments in (("start", "MAM", "--gpu", "3"), ("restart", "MAM"), ("retry", "face")):
        refused = clocks(machine(*arguments, rc=1).stderr)
        assert f": {held}\n" in refused and refused.endswith("hint: mic-supervisor undrain\n")
    assert machine.config.read_bytes() == before
    assert running(machine) == []

    again = machine("drain", "--yes", rc=0).stdout
    assert again.startswith("To be stopped: nothing of ours runs\n")
    assert machine.status()["drained"] == found  # its time and its reason stay
    said = machine("undrain", rc=0).stdout
    assert said.startswith("The host is in service again.\n") or "start" in said
    machine("apply", rc=0)
    assert {name: row["phase"] for name, row in rows(machine).items()} == {
        "MAM-51000000": "ready",
        "MAM-51000003": "ready",
        "face-51000001": "ready",
        "face-51000002": "ready",
    }
    assert machine.status()["drained"] is None
    assert machine("undrain", rc=1).stderr == (
        "error: cannot undrain the host: it is not drained\n"
    )


def test_it_is_withdrawn_from_proxies_before_anything_stops(machine: Mic) -> None:
    log, hook = machine.home / "hook.log", machine.home / "hook"
    hook.write_text(
        "#!/usr/bin/env python3\nimport json, sys, urllib.request as u\n"
        "said = json.load(sys.stdin)['models']\n"
        f"before = {str(machine.home / 'urls')!r}\n"
        "alive = 0\n"
        "for url in open(before).read().split():\n"
        "    try:\n        alive += u.urlopen(url + '/health', timeout=5).status == 200\n"
        "    except OSError:\n        pass\n"
        f"with open({str(log)!r}, 'a') as out:\n"
        "    print(json.dumps([alive, {m: len(i) for m, i in said.items()}]), file=out)\n"
    )
    hook.chmod(0o755)
    urls = [row["endpoints"]["http"] for row in rows(machine).values()]
    (machine.home / "urls").write_text("\n".join(urls))
    hooks = f"hooks: {{on_endpoints_change: [{hook}], settle: 100ms}}\n"
    machine.config.write_text(FILE.replace("models:", f"{hooks}models:"))
    machine("apply", rc=0)
    # It is there from the moment on in which the hook opens it.
    # A run before that may not know all yet.
    whole = '[3, {"MAM": 2, "face": 1}]\n'
    until(lambda: log.exists() and log.read_text().endswith(whole), "the hook to know all")
    told = len(log.read_text().splitlines())
    machine("drain", "--yes", rc=0)
    lines = [json.loads(line) for line in log.read_text().splitlines()[told:]]
    assert lines == [[3, {"MAM": 0, "face": 0}]]  # once for all, while each still answers
    assert "down;" in machine("export", "nginx", rc=0).stdout


def test_it_outlives_the_daemon_and_is_seen_everywhere(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.config.write_text(FILE)
    daemon = mic.run()
    mic("apply", rc=0)
    mic("drain", "--yes", "--until-reboot", rc=0)
    daemon.stop()
    mic.run()
    until(lambda: mic.status()["instances"] != [], "a look")
    time.sleep(1.0)  # a loop that forgot would have started them long ago
    assert phases(mic) == STOPPED
    assert mic.status()["drained"]["until_reboot"] is True
    ready = http(f"{mic.url}/readyz")
    assert ready.status == 503
    assert clocks(ready.json()["reason"]) == f"{DRAINED}, until it reboots"
    metrics = http(f"{mic.url}/metrics").text
    assert "\nmic_drained 1.0\n" in metrics
    assert re.search(r'mic_model_state\{[^}]*"face"[^}]*state="drained"\} 1\.0', metrics)
    request = urllib.request.Request(f"{mic.url}/", headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=10) as page:
        assert "The host is drained" in page.read().decode()
    texts = [event["text"] for event in mic("history", "--json", rc=0).json()["events"]]
    assert texts.count("drained") == 1
    # The same state, as the next boot of the machine finds it.
    mic.daemons[-1].stop()
    path = mic.state_dir / mic.scope / "memory.json"
    document = json.loads(path.read_text())
    document["drained"]["boot"] = "an earlier one"
    path.write_text(json.dumps(document))
    mic.run()
    until(
        lambda: {row["phase"] for row in rows(mic).values()} == {"ready"},
        "everything to be up again",
        timeout=60.0,
    )
    assert "\nmic_drained 0.0\n" in http(f"{mic.url}/metrics").text


def test_who_drains_learns_that_somebody_undrained_it_meanwhile(mic: Mic) -> None:
    stubborn = f"{{backend: process, command: [/bin/sh, {mic.home}/stubborn], stop_timeout: 10s}}"
    (mic.home / "stubborn").write_text("trap '' TERM\nwhile :; do sleep 0.2; done\n")
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.config.write_text(f"version: 1\nmodels: {{a: {stubborn}}}\ngpus: {{0: a}}\n")
    mic("apply", rc=0)
    mic.run()
    draining = mic.start("drain", "--yes")
    until(lambda: {row["phase"] for row in rows(mic).values()} == {"stopping"}, "the stop")
    mic("undrain", rc=0)
    assert draining.process.wait(60) == 1
    said = draining.text()
    assert "error: cannot drain the host: somebody has undrained it meanwhile\n" in said
    assert "The host is drained" not in said and "it still runs" not in said


def test_what_is_paused_is_not_drained(machine: Mic) -> None:
    until(lambda: {phase for phase, _, _ in phases(machine).values()} == {"ready"}, "all of them")
    machine("pause", "face", rc=0)
    before = phases(machine)
    assert machine("drain", "--yes", rc=1).stderr == (
        "error: cannot drain the host: face is paused, and would go on\n"
        "hint: end the pauses first: mic-supervisor resume --all\n"
    )
    assert phases(machine) == before


def test_what_cannot_be_read_has_not_stopped(machine: Mic) -> None:
    """Whoever drains a host is about to change its driver."""
    machine.env["MIC_DOCKER_HOST"] = f"unix://{machine.home}/no.sock"
    if machine.daemons:
        machine.daemons[-1].stop()
        machine.run()
    why = f"cannot list containers: there is no Docker socket at {machine.home}/no.sock"
    why = f"docker cannot be read: {why}"
    for _ in range(2):  # also when it is drained already
        said = machine("drain", "--yes", rc=1)
        assert f"warning: {why}" in said.stderr
        assert f"error: cannot tell whether everything has stopped: {why}" in said.stderr
        assert "nothing of ours runs" not in said.stdout


def test_a_file_with_errors_keeps_nobody_from_draining(machine: Mic) -> None:
    machine.config.write_text("gpus: [\n")
    machine("drain", "--yes", rc=0)
    assert running(machine) == []
    machine.config.write_text(FILE)
    machine("undrain", rc=0)
    machine("apply", rc=0)
    assert {row["phase"] for row in rows(machine).values()} == {"ready"}


def test_down_removes_what_is_drained(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.config.write_text(FILE)
    mic("apply", rc=0)
    mic("drain", "--yes", rc=0)
    assert "Removed 3." in mic("down", "--yes", rc=0).stdout
    assert phases(mic) == STOPPED  # and it is still drained


def test_containers_are_stopped_and_started_again_as_they_are(
    tmp_path: Path, engine: docker.APIClient, busybox_image: str
) -> None:
    assert busybox_image == "mic-test/busybox:1"
    with daemon_world(tmp_path, engine) as world:
        world.write({0: "a", 1: "a", 2: "p"}, a=container("stop_timeout: 1s"), p=process())
        world.mic.run()
        names = ("a-51000000", "a-51000001", "p-51000002")
        world.converged(*names)
        before = {row["id"]: row["container_id"] for row in world.rows().values()}
        world.mic("drain", "--yes", rc=0)
        assert world.marks() == {}
        states = [one["State"] for one in scopes.containers(engine, world.mic.scope)]
        assert states == ["exited", "exited"]  # they are all there
        assert set(world.phases().values()) == {"drained"}
        world.mic("undrain", rc=0)
        world.converged(*names)
        assert {row["id"]: row["container_id"] for row in world.rows().values()} == before
        assert {row["restarts"] for row in world.rows().values()} <= {0, 1}
