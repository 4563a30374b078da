"""`logs` of several instances at once: each line has the instance that wrote it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.daemon_world import daemon_world, identity
from tests.support.mic import PROGRAM
from tests.support.waiting import until

A0, A1, B2 = identity("a", 0), identity("a", 1), identity("b", 2)
TALKS = (
    '{backend: process, command: [/bin/sh, -c, "echo one; echo two; while sleep 0.2; do echo %s; '
    'done"], stop_timeout: 2s, env: {HOLDS: "${gpu_uuids}"}}'
)


@pytest.mark.parametrize("runs", [True, False], ids=["a daemon", "no daemon"])
def test_several_are_shown_with_their_names(tmp_path: Path, runs: bool) -> None:
    with daemon_world(tmp_path, None, gpus=3) as world:
        world.write({0: "a", 1: "a", 2: "b"}, a=TALKS % "more", b=TALKS % "else")
        assert "cannot show any log: nothing of ours runs" in world.mic("logs", rc=1).stderr
        if runs:
            world.mic.run(http=False)
            world.converged(A0, A1, B2)
        else:
            world.mic("apply", rc=0)
        until(lambda: world.mic("logs", "b").stdout.startswith("one\ntwo\n"), "its lines")
        until(lambda: world.mic("logs", "a").stdout.count("| two\n") == 2, "the lines of both")
        lines = world.mic("logs", "a", rc=0).stdout.splitlines()
        assert {line.partition(" | ")[0] for line in lines} == {A0, A1}
        assert lines[:2] == [f"{A0} | one", f"{A0} | two"]
        each = world.mic("logs", "-n", "1", rc=0).stdout.splitlines()
        assert [line.partition(" | ")[0] for line in each] == [A0, A1, B2]

        command = [PROGRAM, "logs", "-f", "-n", "0"]
        with subprocess.Popen(
            command, env=world.mic.environment(), stdout=subprocess.PIPE, text=True
        ) as following:
            assert following.stdout is not None
            wanted = {f"{A0} | more", f"{A1} | more", f"{B2} | else"}
            for line in following.stdout:  # each is written again and again
                wanted.discard(line.strip())
                if not wanted:
                    break
            following.terminate()
