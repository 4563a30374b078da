"""Commands that are run to their end, as `prepare` is, each as a unit of its own."""

from __future__ import annotations

import pwd
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.errors import MicError, PreflightFailed, Withdrawn
from mic_supervisor.runtimes import HostCommand
from tests.integration.systemd.world import World, run
from tests.support.commands import sh
from tests.support.waiting import until


def command(text: str, **values: Any) -> HostCommand:
    given = {"env": (), "user": None, "directory": "/", "timeout": 60.0, **values}
    return HostCommand(instance="a", command=("/bin/sh", *sh(text)[1:]), **given)


def never() -> bool:
    return False


def left() -> str:
    return run("systemctl", "list-units", "--all", "--plain", "--no-legend", "run-mic-*")


def sleeping(seconds: int) -> bool:
    wanted = f"sleep\0{seconds}\0".encode()
    return any(wanted == path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline"))


def test_it_has_the_user_the_directory_and_the_environment(world: World) -> None:
    said: list[str] = []
    text = 'echo "$(id -u) $PWD $HOME $TOKEN"'
    given = {"env": (("TOKEN", "a $b 'c'"),), "user": "alice", "directory": "/home/alice"}
    world.runtime.run_command(command(text, **given), said.append, never)
    uid = pwd.getpwnam("alice").pw_uid
    assert said == [f"prepare: “{uid} /home/alice /home/alice a $b 'c'”"]
    assert not [*world.directory.rglob("prepare-*")], "no file with the environment stays"
    assert left() == ""


def test_what_it_prints_is_shown_while_it_runs(world: World) -> None:
    said: list[str] = []
    text = "printf ' 10 %%'; sleep 4; printf '\\r 99 %%'; sleep 4; echo; echo done"
    world.runtime.run_command(command(text), said.append, never)
    assert said == ["prepare: “10 %”", "prepare: “99 %”", "prepare: “done”"]


def test_one_that_fails_says_how(world: World) -> None:
    for text, how in (
        ("echo no space; exit 3", "exits with 3: “no space”"),
        ("kill -KILL $$", "was ended by SIGKILL"),
    ):
        with pytest.raises(PreflightFailed) as failed:
            world.runtime.run_command(command(text), lambda _: None, never)
        assert str(failed.value) == f"cannot prepare: /bin/sh {how}"
    with pytest.raises(PreflightFailed) as failed:
        world.runtime.run_command(command("sleep 4712", timeout=1.0), lambda _: None, never)
    assert str(failed.value) == "cannot prepare: /bin/sh did not end within 1 s"
    assert not sleeping(4712)
    gone = HostCommand("a", ("/nowhere/fetch",), (), None, "/", 60.0)
    with pytest.raises(PreflightFailed, match="the program cannot be executed"):
        world.runtime.run_command(gone, lambda _: None, never)
    assert left() == ""


def test_one_that_is_given_up_ends_with_all_that_it_started(world: World) -> None:
    over = threading.Event()
    failed: list[MicError] = []

    def work() -> None:
        try:
            text = "trap '' TERM; setsid sleep 4713 & sleep 4714"
            world.runtime.run_command(command(text), lambda _: None, over.is_set)
        except MicError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: sleeping(4713) and sleeping(4714), "its start")
    over.set()
    thread.join(30)
    assert [type(error) for error in failed] == [Withdrawn]
    assert not sleeping(4713)
    assert not sleeping(4714)
    assert left() == ""


def test_what_a_killed_supervisor_left_is_ended_first(world: World) -> None:
    other = world.make()

    def begin() -> None:
        with suppress(MicError):
            other.run_command(command("sleep 4715"), lambda _: None, never)

    work = threading.Thread(target=begin)
    work.start()
    until(lambda: sleeping(4715), "its start")
    world.runtime.run_command(command("true"), lambda _: None, never)
    assert not sleeping(4715)
    work.join(30)
    assert left() == ""
