"""The hook on_transition under a daemon: what it is told of, and that nothing waits for it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.daemon_world import DaemonWorld, daemon_world, identity, process
from tests.support.waiting import until

A0, A1 = identity("a", 0), identity("a", 1)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path, None, gpus=2) as made:
        yield made


def write(world: DaemonWorld, tmp_path: Path, body: str) -> None:
    """A file with the hook, which adds its document to `got` and does `body`."""
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ncat >> {tmp_path}/got; echo >> {tmp_path}/got\n{body}\n")
    hook.chmod(0o755)
    world.models["a"] = process()
    text = world.text({0: "a", 1: "a"})
    world.mic.write(text.replace("models:", f"hooks: {{on_transition: [{hook}]}}\nmodels:", 1))


def given(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "got"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_it_is_told_of_each_change_in_order_and_a_slow_one_delays_nothing(
    world: DaemonWorld, tmp_path: Path
) -> None:
    write(world, tmp_path, f"until test -e {tmp_path}/go; do sleep 0.1; done")
    world.mic.run(http=False)
    world.converged(A0, A1)
    before = world.marks()
    os.kill(before[A0][2], signal.SIGKILL)
    until(lambda: world.marks().get(A0, before[A0]) != before[A0], "a new run")
    known = [(e["instance"], e["phase"]) for e in world.history("phase")]
    assert len(given(tmp_path)) < len(known), "the hook is behind, and nobody waited for it"
    (tmp_path / "go").touch()

    def done() -> bool:
        phases = [(e["instance"], e["phase"]) for e in world.history("phase")]
        return [(one["instance"], one["phase"]) for one in given(tmp_path)] == phases

    until(done, "every change, in the order of the history", timeout=60)
    last = given(tmp_path)[-1]
    assert (last["version"], last["model"], last["dropped"]) == (1, "a", 0)
    assert last["was"] is not None and last["seconds"] is not None


def test_without_a_daemon_apply_runs_it_and_a_failure_costs_nothing(
    world: DaemonWorld, tmp_path: Path
) -> None:
    write(world, tmp_path, "echo no chat here >&2; exit 4")
    world.mic("apply", rc=0)
    assert {one["instance"] for one in given(tmp_path)} == {A0, A1}
    (failure,) = world.history("failed")
    said = f"on_transition, {tmp_path}/hook, exits with 4: “no chat here”"
    assert (failure["instance"], failure["text"]) == ("transitions", said)


def test_a_hook_that_is_no_path_is_refused(world: DaemonWorld) -> None:
    world.mic.write("version: 1\nhooks: {on_transition: [curl]}\ngpus: {0: none}\n")
    done = world.mic("check", rc=1)
    assert "the program 'curl' is not an absolute path" in done.stderr + done.stdout
