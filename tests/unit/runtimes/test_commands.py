"""Commands that are run to their end, as children of this process."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.errors import MicError, PreflightFailed, Withdrawn
from mic_supervisor.runtimes import HostCommand, Progress, commands
from mic_supervisor.runtimes.commands import Output
from tests.support.waiting import until

SCOPE = f"test-{uuid.uuid4()}"


def command(text: str, **values: Any) -> HostCommand:
    given = {"env": (), "user": None, "directory": "/", "timeout": 60.0, **values}
    return HostCommand(instance="a-1", command=("/bin/sh", "-c", text), **given)


def run(what: HostCommand, progress: Progress, given_up: Callable[[], bool]) -> None:
    commands.run(what, progress, given_up, scope=SCOPE)


def never() -> bool:
    return False


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_of_what_it_prints_the_last_line_is_shown() -> None:
    said: list[str] = []
    run(command("printf 'one\\n 10 %%\\r 99 %%\\r'; echo"), said.append, never)
    assert said == ["prepare: “99 %”"]
    said.clear()
    run(command("true"), said.append, never)
    assert said == []
    output = Output(said.append)
    output.add(b"\xff\x1b[31m" + b"x" * 10_000 + b"\n\n")
    output.show()
    output.show()
    assert len(said) == 1
    assert len(said[0]) < 300
    assert said[0].isprintable()


def test_it_has_its_directory_and_environment_and_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "secret")
    text = 'echo "$PWD $TOKEN ${OURS:-none}"'
    said: list[str] = []
    run(command(text, env=(("TOKEN", "x y"),), directory=str(tmp_path)), said.append, never)
    assert said == [f"prepare: “{tmp_path} x y none”"]


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("echo first; echo no space; exit 3", "exits with 3: “no space”"),
        ("exit 1", "exits with 1"),
        ("kill -KILL $$", "was ended by SIGKILL"),
    ],
)
def test_one_that_fails_says_how_and_what_to_do(text: str, how: str) -> None:
    with pytest.raises(PreflightFailed) as failed:
        run(command(text), lambda _: None, never)
    assert str(failed.value) == f"cannot prepare: /bin/sh {how}"
    assert failed.value.hint == "see to what it needs, then: mic-supervisor retry a-1"


def test_one_that_cannot_be_run() -> None:
    gone = HostCommand("a", ("/nowhere/fetch",), (), None, "/", 60.0)
    with pytest.raises(PreflightFailed, match="/nowhere/fetch does not run: No such file"):
        run(gone, lambda _: None, never)
    with pytest.raises(PreflightFailed, match="there is no user nobody-has-this-name"):
        run(command("true", user="nobody-has-this-name"), lambda _: None, never)


@pytest.mark.parametrize("how", ["given up", "out of time"])
def test_it_is_ended_with_all_that_it_started(tmp_path: Path, how: str) -> None:
    pids = tmp_path / "pids"
    text = f"trap '' TERM; setsid sleep 600 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; wait"
    over = threading.Event()
    error: type[MicError]
    if how == "given up":
        what, error = command(text), Withdrawn
        given_up = pids.exists
    else:
        what, error = command(text, timeout=3.0), PreflightFailed
        given_up = over.is_set
    with pytest.raises(error):
        run(what, lambda _: None, given_up)
    deadline = time.monotonic() + 20
    while any(map(runs, pids.read_text().split())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    run(command(f"setsid sleep 600 & echo $! > {tmp_path}/pid"), lambda _: None, never)
    assert not runs((tmp_path / "pid").read_text().strip())


def test_what_a_supervisor_that_was_killed_has_left_is_ended_first(tmp_path: Path) -> None:
    """Two that fetch the same would write over each other."""
    pids, what = tmp_path / "pids", command(f"echo $$ > {tmp_path}/pids; exec sleep 600")
    supervisor = os.fork()
    if supervisor == 0:
        try:
            run(what, lambda _: None, never)
        finally:
            os._exit(1)
    until(lambda: pids.exists() and pids.read_text().strip(), "the command")
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    (left,) = pids.read_text().split()
    assert runs(left)
    other = replace(what, instance="a-2")  # of another instance, it is none of theirs
    run(replace(other, command=("/bin/true",)), lambda _: None, never)
    assert runs(left)
    run(replace(what, command=("/bin/true",)), lambda _: None, never)
    assert not runs(left)
