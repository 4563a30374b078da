"""switch, and what else a profile changes: the file edited and the machine following.

What runs is mic_supervisor/demo/server.py as host processes, and containers on the real engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docker
import pytest

from tests.integration.daemon_world import container, daemon_world, process
from tests.support.commands import SERVE
from tests.support.mic import Mic

FILE = f"""\
# this machine
version: 1
models:
  chat: {{backend: process, command: {SERVE}, probe: {{http: /health, period: 200ms}}}}
  batch: {{backend: process, command: {SERVE}, probe: {{http: /health, period: 200ms}}}}
gpus:
  "0-1": chat   # by day
  2: chat
# at night
profiles:
  night:   # see the timers
    gpus:
      "0,1": batch
      3: batch
"""


@pytest.fixture(params=["alone", "daemon"])
def machine(mic: Mic, request: pytest.FixtureRequest) -> Mic:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.config.write_text(FILE)
    mic("apply", rc=0)
    if request.param == "daemon":
        mic.run()
    return mic


def rows(mic: Mic) -> dict[str, dict[str, Any]]:
    """By the numbers of its GPUs: "0,1"."""
    return {
        ",".join(str(gpu["index"]) for gpu in row["gpus"]): row for row in mic.status()["instances"]
    }


def models(mic: Mic) -> dict[str, str]:
    found = rows(mic)
    assert all(row["phase"] == "ready" and row["as_desired"] for row in found.values()), found
    return {gpus: row["model"] for gpus, row in found.items()}


def with_profile(name: str) -> str:
    return FILE.replace("profiles:", f"profile: {name}\nprofiles:")


def test_a_switch_edits_one_line_shows_the_plan_and_carries_it_out(machine: Mic) -> None:
    day = rows(machine)
    shown = machine("plan", "--profile", "night", rc=0).stdout
    assert machine.config.read_text() == FILE
    done = machine("switch", "night", rc=0).stdout
    assert machine.config.read_text() == with_profile("night")
    assert done.startswith(shown)
    assert f"{machine.config}: the profile is night now, was none." in done
    for text in ("- remove   chat-51000000", "+ create   batch-51000000x2", "Profile: night"):
        assert text in shown
    assert models(machine) == {"0,1": "batch", "2": "chat", "3": "batch"}
    assert rows(machine)["2"]["pid"] == day["2"]["pid"]  # no profile names it
    assert machine.status()["config"]["profile"] == "night"
    assert machine("plan", "--json", rc=0).json()["profile"] == "night"
    assert machine("plan", rc=0).stdout == "Profile: night\nNo changes.\n"
    assert "Profile night is on." in machine("status", rc=0).stderr
    assert machine("switch", rc=0).stdout == "  none\n* night\n"

    done = machine("switch", "none", rc=0).stdout
    assert machine.config.read_text() == with_profile("none")
    assert "the profile that has its GPU is not on" in done  # and waits for no other word
    assert models(machine) == {"0": "chat", "1": "chat", "2": "chat"}
    assert rows(machine)["2"]["pid"] == day["2"]["pid"]
    assert machine.status()["config"]["profile"] is None
    again = machine("switch", "none", rc=0).stdout
    assert again.startswith(f"{machine.config}: the profile is none already.\n")


def test_a_switch_that_cannot_be_leaves_the_file(machine: Mic) -> None:
    refused = machine("switch", "nigth", rc=1).stderr
    assert refused == (
        f"error: cannot switch to nigth: {machine.config} has no profile 'nigth'\n"
        "hint: did you mean night?\n"
    )
    assert "has no profile 'nigth'" in machine("plan", "--profile", "nigth", rc=1).stderr
    drop_in = machine.config.with_name("gpus.yaml.d") / "p.yaml"
    drop_in.parent.mkdir()
    drop_in.write_text("profile: none\n")
    refused = machine("switch", "night", rc=1).stderr
    assert refused == (
        f"error: cannot switch to night: {drop_in}:1:1 sets `profile`, and drop-ins win over "
        f"{machine.config}\nhint: edit {drop_in}, then: mic-supervisor apply\n"
    )
    assert machine.config.read_text() == FILE


def test_start_and_stop_edit_the_entry_that_counts(machine: Mic) -> None:
    machine("switch", "night", rc=0)
    said = machine("stop", "--gpu", "3", rc=0).stdout
    assert f"{machine.config}: GPU 3 is none now in profile night, was batch.\n" in said
    assert machine.config.read_text() == with_profile("night").replace("3: batch", "3: none")
    said = machine("stop", "--gpu", "2", rc=0).stdout
    assert f"{machine.config}: GPU 2 is none now, was chat.\n" in said
    machine("start", "chat", "--gpu", "3", rc=0)
    text = with_profile("night").replace("3: batch", "3: chat").replace("2: chat", "2: none")
    assert machine.config.read_text() == text
    assert models(machine) == {"0,1": "batch", "3": "chat"}


def test_a_file_that_waits_for_a_word_is_not_switched(mic: Mic) -> None:
    mic.env |= {"MIC_DOCKER_HOST": "none", "MIC_WATCH": "plan"}
    mic.config.write_text(FILE)
    mic("apply", rc=0)
    mic.run()
    mic.config.write_text(FILE.replace("2: chat", "2: batch"))
    refused = mic("switch", "night", rc=1).stderr
    assert "cannot switch to night: " in refused and "is not applied yet" in refused
    mic.config.write_text(FILE)
    mic("switch", "night", rc=0)
    assert models(mic) == {"0,1": "batch", "2": "chat", "3": "batch"}


def test_containers_follow_a_profile_and_the_daemon_keeps_it(
    tmp_path: Path, engine: docker.APIClient, busybox_image: str
) -> None:
    assert busybox_image == "mic-test/busybox:1"
    with daemon_world(tmp_path, engine) as world:
        day, night = container("stop_timeout: 1s"), process()
        text = (
            f"version: 1\nmodels:\n  day: {day}\n  late: {night}\ngpus: {{0: day, 1: day}}\n"
            "profiles: {night: {gpus: {1: late}}}\n"
        )
        world.mic.config.write_text(text)
        world.mic.run()
        world.converged("day-51000000", "day-51000001")
        before = world.marks()
        assert "late-51000001" in world.mic("switch", "night", rc=0).stdout
        world.converged("day-51000000", "late-51000001")
        world.mic.daemons[-1].stop()
        world.mic.run()
        world.converged("day-51000000", "late-51000001")
        assert world.status()["config"]["profile"] == "night"
        world.mic("switch", "none", rc=0)
        after = world.marks()
        assert sorted(after) == ["day-51000000", "day-51000001"]
        assert after["day-51000000"] == before["day-51000000"]
