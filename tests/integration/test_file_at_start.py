"""The daemon and its file at the start: broken, gone, cut, or another one than before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon_world import DaemonWorld, Mark, daemon_world, identity, process
from tests.support import scopes
from tests.support.waiting import until


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonWorld]:
    """Nothing runs yet, and Docker is off: these are about files."""
    with daemon_world(tmp_path_factory.mktemp("fresh"), None) as made:
        made.models = {"p": process(), "q": process()}
        yield made


def run(world: DaemonWorld, **env: str) -> None:
    world.mic.env |= env
    world.mic.run(http=False)


def state(world: DaemonWorld) -> Path:
    return world.mic.state_dir / world.mic.scope


def killed(world: DaemonWorld, instance: str, mark: Mark) -> None:
    """The daemon works: it restarts what dies."""
    os.kill(mark[2], signal.SIGKILL)
    until(lambda: world.marks().get(instance, mark) != mark, f"{instance} to be back")


def test_pruning_may_be_left_to_the_watcher(fresh: DaemonWorld) -> None:
    fresh.write({0: "p", 1: "p"})
    run(fresh, MIC_PRUNE_ON_WATCH="true")
    fresh.converged(identity("p", 0), identity("p", 1))
    fresh.write({0: "p"})
    fresh.converged(identity("p", 0))
    assert sorted(fresh.marks()) == [identity("p", 0)]


def test_a_broken_file_at_the_start_runs_what_ran_before(fresh: DaemonWorld) -> None:
    fresh.write({0: "p", 1: "q"})
    fresh.drop_ins.mkdir()
    (fresh.drop_ins / "10.yaml").write_text("gpus: {2: p}\n")
    run(fresh)
    names = [identity("p", 0), identity("q", 1), identity("p", 2)]
    fresh.converged(*names)
    before = fresh.marks()
    generation = fresh.generation
    assert fresh.mic.daemons[-1].stop() == 0
    assert fresh.marks() == before

    kept = [path for path in (state(fresh) / "last-good").rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == ["10.yaml", "gpus.yaml"]
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    assert state(fresh).stat().st_mode & 0o777 == 0o700

    fresh.mic.config.write_text("version: 1\ngpus: {0: nobody}\n")
    run(fresh)
    fresh.converged(*names)
    assert fresh.marks() == before
    assert fresh.generation == generation
    assert str(fresh.mic.config) in fresh.rejected()
    killed(fresh, names[0], before[names[0]])

    # And a reboot: nothing runs any more, the records are there, the file is still broken.
    assert fresh.mic.daemons[-1].stop() == 0
    scopes.end_processes(fresh.mic.scope, keepers=False)
    run(fresh)
    fresh.converged(*names)
    assert sorted(fresh.marks()) == sorted(names)

    # A drop-in that was removed meanwhile is not forgotten for that: the last good one runs.
    fresh.write({0: "p", 1: "q", 2: "none"})
    shutil.rmtree(fresh.drop_ins)
    fresh.converged(*names[:2])


def test_without_anything_good_nothing_is_started_or_stopped(fresh: DaemonWorld) -> None:
    fresh.write({0: "p", 1: "q"})
    run(fresh)
    names = [identity("p", 0), identity("q", 1)]
    fresh.converged(*names)
    before = fresh.marks()
    fresh.mic.daemons[-1].stop()
    shutil.rmtree(state(fresh) / "last-good")
    fresh.mic.config.write_text("{")
    run(fresh)
    error = fresh.rejected()
    assert str(fresh.mic.config) in error
    assert fresh.mic("reload", "--wait").rc == 1
    assert fresh.marks() == before
    assert set(fresh.phases().values()) == {"blocked"}
    time.sleep(1)
    assert fresh.marks() == before
    fresh.write({0: "p", 1: "q"})
    fresh.converged(*names)
    assert fresh.marks() == before


def test_the_start_removes_nothing_that_the_file_does_not_name(fresh: DaemonWorld) -> None:
    fresh.write({0: "p", 1: "q"})
    run(fresh)
    fresh.converged(identity("p", 0), identity("q", 1))
    before = fresh.marks()
    fresh.mic.daemons[-1].stop()
    fresh.write({0: "p"})
    run(fresh)
    until(lambda: fresh.phases().get(identity("q", 1)) == "blocked", "it to be held")
    assert fresh.marks() == before
    # What was confirmed once stays so: the removal goes on after a restart.
    fresh.mic("reload", "--wait", rc=0)
    fresh.converged(identity("p", 0))
    fresh.mic.daemons[-1].stop()
    run(fresh)
    fresh.converged(identity("p", 0))


def test_a_record_of_generations_that_is_no_record(fresh: DaemonWorld) -> None:
    fresh.write({0: "p"})
    run(fresh)
    fresh.converged(identity("p", 0))
    before = fresh.marks()
    fresh.mic.daemons[-1].stop()
    (state(fresh) / "generation.json").write_text('{"generation": "seven"')
    run(fresh)
    fresh.converged(identity("p", 0))
    assert fresh.marks() == before
    assert json.loads((state(fresh) / "generation.json").read_text())["generation"] == 1


def test_a_next_try_from_a_clock_that_was_wrong(fresh: DaemonWorld) -> None:
    fresh.write({0: "p"})
    run(fresh)
    fresh.converged(identity("p", 0))
    fresh.mic.daemons[-1].stop()
    path = state(fresh) / "memory.json"
    memory = json.loads(path.read_text())
    (entry,) = memory["instances"].values()
    far = time.time() + 10 * 365 * 86400
    entry |= {"failures": 3, "reason": "it ended", "retry_at": far, "started_at": far}
    entry |= {"started": None, "since": far, "ready_since": far}
    path.write_text(json.dumps(memory))
    scopes.end_processes(fresh.mic.scope, keepers=False)
    run(fresh)
    until(lambda: fresh.phases()[identity("p", 0)] == "backoff", "the backoff")
    (row,) = fresh.status()["instances"]
    assert row["next_retry"] - time.time() <= 331
    assert row["since"] <= time.time() + 1
    fresh.mic("apply", rc=0)
    fresh.converged(identity("p", 0))


# --- files that may be cut ----------------------------------------------------------------------


def test_a_file_that_may_be_cut_swaps_nothing_until_a_word(fresh: DaemonWorld) -> None:
    fresh.write({0: "p10"}, p1=process(), p10=process())
    run(fresh)
    fresh.converged(identity("p10", 0))
    before, config = fresh.marks(), fresh.mic.config
    config.write_text(fresh.text({0: "p10"}).removesuffix("0\n"))
    why = f"{config} does not end with a line end; it may have been cut"
    way_out = "finish it, or confirm with `mic-supervisor apply` or `mic-supervisor reload`"
    for start in (False, True):  # over a restart, too
        if start:
            assert fresh.mic.daemons[-1].stop() == 0
            run(fresh)
        until(lambda: f"{why}: {way_out}" in fresh.status()["warnings"], "a warning")
        fresh.converged(identity("p10", 0))
        assert (fresh.marks(), fresh.generation) == (before, 1)
        assert why in fresh.mic("status", rc=0).stderr
        plan = fresh.mic("plan", rc=0).stdout
        assert f"warning: {why}: {way_out}" in plan
        assert identity("p1", 0) in plan  # what it would do
        for command in (["stop", "--gpu", "0"], ["apply", "--target", "0"]):
            refused = fresh.mic(*command, rc=1).stderr
            assert why in refused and way_out in refused
        assert fresh.marks() == before
    assert "waits to be confirmed (the file changed); generation 1" in "".join(
        daemon.text() for daemon in fresh.mic.daemons
    )
    fresh.mic("reload", "--wait", rc=0)
    fresh.converged(identity("p1", 0))
    assert fresh.status()["warnings"] == []
    fresh.mic("stop", "--gpu", "0", rc=None)  # our own edit ends it
    assert config.read_text().endswith("none\n")


def test_a_word_for_an_earlier_document_removes_nothing_later(fresh: DaemonWorld) -> None:
    fresh.write({0: "p"})
    run(fresh)
    fresh.converged(identity("p", 0))
    fresh.mic("reload", "--wait", rc=0)
    both = [identity("p", 0), identity("q", 1)]
    fresh.write({0: "p", 1: "q"})
    fresh.converged(*both)
    before = fresh.marks()
    fresh.write({0: "p"})  # cut at a line
    until(lambda: fresh.phases().get(both[1]) == "blocked", "it to be held")
    assert fresh.mic.daemons[-1].stop() == 0
    run(fresh)
    until(lambda: fresh.phases().get(both[1]) == "blocked", "it to be held")
    assert fresh.marks() == before


def test_without_the_daemon_a_word_is_kept_for_it(fresh: DaemonWorld) -> None:
    fresh.write({0: "p"})
    run(fresh)
    fresh.mic("reload", "--wait", rc=0)
    assert fresh.mic.daemons[-1].stop() == 0
    both = [identity("p", 0), identity("q", 1)]
    fresh.write({0: "p", 1: "q"})
    fresh.mic("apply", rc=None)
    before = fresh.marks()
    assert sorted(before) == both
    fresh.write({0: "p"})
    run(fresh)
    until(lambda: fresh.phases().get(both[1]) == "blocked", "it to be held")
    assert fresh.marks() == before
