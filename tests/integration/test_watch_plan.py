"""MIC_WATCH=plan: nothing acts for a file that nobody asked for, on the real engine."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import docker
import pytest

from tests.integration.daemon_world import DaemonWorld, container, daemon_world, identity, process
from tests.support import scopes
from tests.support.waiting import http, until

pytestmark = pytest.mark.engine

C0, P1, P2 = identity("c", 0), identity("p", 1), identity("p", 2)


@pytest.fixture
def world(
    tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient, busybox_image: str
) -> Iterator[DaemonWorld]:
    """A file that nobody has asked for yet, and no daemon."""
    with daemon_world(tmp_path_factory.mktemp("plan"), engine) as made:
        made.mic.env["MIC_WATCH"] = "plan"
        made.write({0: "c", 1: "p"}, c=container(), p=process())
        yield made


@pytest.fixture
def running(world: DaemonWorld) -> DaemonWorld:
    """A daemon for whose file somebody has asked."""
    world.mic.run()
    world.mic("apply", rc=0)
    world.converged(C0, P1)
    return world


def waits(world: DaemonWorld, *due: tuple[str, str]) -> None:
    """Waits until exactly these changes are shown, as (action, instance)."""

    def look() -> bool:
        waiting = world.status()["waiting"]
        return waiting is not None and sorted(due) == sorted(
            (one["action"], one["instance"]) for one in waiting["actions"]
        )

    until(look, f"{due} to be shown")


def restarted(world: DaemonWorld) -> None:
    assert world.mic.daemons[-1].stop() == 0
    world.mic.run(http=False)


def test_a_first_file_starts_nothing_until_somebody_asks(world: DaemonWorld) -> None:
    world.mic.run()
    for restart in (False, True):
        if restart:
            restarted(world)
        waits(world, ("create", C0), ("create", P1))
        assert (world.marks(), world.generation) == ({}, 0)
    plan = world.mic("plan", rc=0).stdout
    assert "Plan: 2 to create." in plan
    assert f"{world.mic.config} is not applied yet (MIC_WATCH=plan)" in plan
    world.mic("reload", "--wait", rc=0)
    world.converged(C0, P1)
    assert world.generation == 1


def test_a_save_shows_what_would_change_and_a_word_does_it(running: DaemonWorld) -> None:
    before, mic = running.marks(), running.mic
    running.models["c"] = container("env: {A: b}")
    running.write({0: "c", 1: "none", 2: "p"})
    waits(running, ("replace", C0), ("remove", P1), ("create", P2))
    why = f"{mic.config} is not applied yet (MIC_WATCH=plan)"
    assert running.status()["config"]["unconfirmed"] == why

    shown = mic("status", rc=0).stderr
    assert f"warning: {why}: " in shown
    assert f"would replace {C0}: its specification changed: env" in shown
    assert f"would remove {P1}: " in shown
    assert "would create" in mic("status", rc=0).stderr
    assert "1 to create, 1 to replace, 1 to remove" in mic("plan", rc=0).stdout
    assert mic("plan", "--detailed-exitcode").rc == 2
    metrics = http(f"{mic.url}/metrics").text
    assert "mic_config_waiting 1.0" in metrics
    assert "mic_config_waiting_changes 3.0" in metrics

    # What asks for a part only is refused, and says why.
    for command in (["apply", "--target", "2"], ["stop", "--gpu", "0"]):
        refused = mic(*command, rc=1).stderr
        assert why in refused and "mic-supervisor apply" in refused
    assert running.marks() == before

    mic("apply", rc=0)
    running.converged(C0, P2)
    after = running.marks()
    assert sorted(after) == [C0, P2] and after[C0] != before[C0]
    status = running.status()
    assert (status["waiting"], status["warnings"], running.generation) == (None, [], 2)


def test_what_was_applied_goes_on_over_a_death_a_restart_and_a_reboot(
    running: DaemonWorld,
) -> None:
    before = running.marks()
    running.write({0: "none", 2: "p"})
    waits(running, ("remove", C0), ("remove", P1), ("create", P2))
    os.kill(before[P1][2], signal.SIGKILL)
    until(lambda: running.marks().get(P1, before[P1]) != before[P1], f"{P1} to be back")
    running.converged(C0, P1)
    marks = running.marks()
    assert marks[C0] == before[C0]

    restarted(running)
    waits(running, ("remove", C0), ("remove", P1), ("create", P2))
    running.converged(C0, P1)
    assert running.marks() == marks

    # A reboot, as far as it matters here: nothing runs any more, and the records are there.
    assert running.mic.daemons[-1].stop() == 0
    scopes.end_processes(running.mic.scope, keepers=False)
    assert running.engine is not None
    for item in scopes.containers(running.engine, running.mic.scope):
        running.engine.kill(item["Id"])
    until(lambda: not running.marks(), "everything to be gone")
    running.mic.run(http=False)
    running.converged(C0, P1)
    waits(running, ("remove", C0), ("remove", P1), ("create", P2))
    assert sorted(running.marks()) == [C0, P1]
    running.mic("apply", rc=0)
    running.converged(P2)


def test_what_a_command_applied_without_a_daemon_is_what_the_daemon_runs(
    running: DaemonWorld,
) -> None:
    assert running.mic.daemons[-1].stop() == 0
    running.write({0: "c", 1: "p", 2: "p"})
    running.mic("apply", rc=0)
    before = running.marks()
    for text in (running.text({0: "c"}), "version: 1\ngpus: ["):
        running.mic.config.write_text(text)
        running.mic.run(http=False)
        running.converged(C0, P1, P2)
        assert running.marks() == before
        assert running.mic.daemons[-1].stop() == 0


def test_start_and_stop_do_what_they_write(running: DaemonWorld) -> None:
    before = running.marks()
    running.mic("start", "p", "--gpu", "2", rc=0)
    running.converged(C0, P1, P2)
    running.mic("stop", "--gpu", "2", rc=0)
    running.converged(C0, P1)
    assert running.marks() == before
    assert running.status()["waiting"] is None


def test_a_file_that_is_put_back_or_says_the_same_waits_for_nobody(running: DaemonWorld) -> None:
    generation, same = running.generation, running.mic.config.read_text()
    running.write({0: "none", 1: "p"})
    waits(running, ("remove", C0))
    running.mic.write(f"# a comment\n{same}")
    until(lambda: running.status()["waiting"] is None, "it to be as before")
    assert running.generation == generation


def test_a_commands_plan_is_the_same_without_a_daemon(world: DaemonWorld) -> None:
    alone = world.mic("plan", rc=0).stdout
    world.mic.run(http=False)
    waits(world, ("create", C0), ("create", P1))
    asked = world.mic("plan", rc=0).stdout
    assert asked == alone
    assert re.search(r"warning: .* is not applied yet \(MIC_WATCH=plan\): ", alone)
    refused = world.mic("start", "p", "--gpu", "2", rc=1).stderr
    assert "is not applied yet" in refused
    assert world.marks() == {}
