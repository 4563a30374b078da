"""Checks that run where a workload runs, and its logs, from within the machine."""

from __future__ import annotations

import pwd
import time
from pathlib import Path

import pytest

from mic_supervisor.errors import RuntimeRefused
from tests.integration.systemd.world import World, run
from tests.support.commands import python, sh

# --- checks -----------------------------------------------------------------------------------


def test_a_check_runs_where_the_workload_runs(world: World) -> None:
    launch = world.launch("a", sh("exec sleep 300"), user="alice", working_dir="/home/alice")
    world.runtime.start(launch)
    seen = world.look("a")
    check = world.runtime.run_check
    alice = pwd.getpwnam("alice")
    assert check(seen, sh('id -u; pwd; echo "$HOME"; echo $0 >&2; exit 4'), 10) == (
        4,
        f"{alice.pw_uid}\n/home/alice\n/home/alice\n/bin/sh",
    )
    assert check(seen, ("true",), 10) == (0, "")
    assert check(seen, ("printf", "%s", "$HOME é \\x41"), 10) == (0, "$HOME é \\x41")
    assert check(seen, sh("kill -KILL $$"), 10)[0] == 137
    long = check(seen, python("print('x' * 1000000)"), 10)
    assert (long[0], len(long[1])) == (0, 4096)
    begun = time.monotonic()
    assert check(seen, sh("trap '' TERM; echo begun; sleep 60; echo more"), 3) == (
        124,
        "it did not end within 3 s: begun",
    )
    assert time.monotonic() - begun < 30
    assert run("systemctl", "list-units", "--all", "--plain", "--no-legend", "run-mic-*") == ""


def test_what_a_check_starts_goes_with_it(world: World) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    assert world.runtime.run_check(seen, sh("sleep 4711 & exit 0"), 10) == (0, "")
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert b"sleep\x004711\x00" not in commands


def test_checks_leave_the_journal_alone(world: World) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    mark = time.time()
    for code in (0, 1):
        assert world.runtime.run_check(seen, sh(f"echo out; exit {code}"), 10) == (code, "out")
    run("journalctl", "--sync")
    lines = run("journalctl", "-q", "-o", "cat", f"--since=@{mark:.3f}")
    assert "check" not in lines, lines


def test_a_check_that_cannot_be_run_is_no_verdict(world: World) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    for command, text in (
        ((), "cannot run an empty check"),
        (("no-such",), "cannot run no-such: it is not on the PATH /usr/local/sbin:"),
        (("/no/such",), "cannot run /no/such: the program cannot be executed"),
    ):
        with pytest.raises(RuntimeRefused) as refused:
            world.runtime.run_check(seen, command, 5)
        assert str(refused.value).startswith(text)
    world.runtime.stop(seen, signal="SIGKILL", grace=5)
    world.runtime.remove(seen)
    with pytest.raises(RuntimeRefused) as refused:
        world.runtime.run_check(seen, ("true",), 5)
    assert str(refused.value) == f"cannot run true: there is no unit {seen.ref}"


# --- logs -------------------------------------------------------------------------------------


def test_logs_are_this_run_and_the_one_before(world: World) -> None:
    for number in (1, 2, 3):
        world.runtime.start(world.launch("a", sh(f"echo {number} out; echo {number} err >&2")))
        world.ended("a")
        world.await_line("a", f"{number} err")
    seen = world.look("a")
    assert [*world.runtime.logs(seen)] == ["3 out", "3 err"]
    assert [*world.runtime.logs(seen, tail=1)] == ["3 err"]
    assert [*world.runtime.logs(seen, tail=0)] == []
    assert [*world.runtime.previous_logs(seen)] == ["2 out", "2 err"]
    assert [*world.runtime.previous_logs(seen, tail=1)] == ["2 err"]


def test_the_run_before_may_have_been_another_specification(world: World) -> None:
    world.runtime.start(world.launch("a", sh("echo before"), name=f"mic-{world.scope}-a-old"))
    world.runtime.remove(world.ended("a"))
    world.runtime.start(world.launch("b", sh("echo another")))
    world.runtime.start(world.launch("a", sh("echo now")))
    seen = world.ended("a")
    assert [*world.runtime.previous_logs(seen)] == ["before"]
    with pytest.raises(RuntimeRefused) as refused:
        [*world.runtime.previous_logs(world.ended("b"))]
    assert str(refused.value) == (
        f"cannot read the log of {world.name('b')}: the journal holds no run before this one"
    )


def test_following_ends_with_the_run(world: World) -> None:
    world.runtime.start(world.launch("a", sh("for n in 1 2 3; do echo $n; sleep 0.4; done")))
    begun = time.monotonic()
    assert [*world.runtime.logs(world.look("a"), follow=True)] == ["1", "2", "3"]
    assert time.monotonic() - begun < 40  # a log that ends is told of, not found silent after 60 s


def test_following_can_be_left(world: World) -> None:
    seen = world.start("a", sh("echo one; exec sleep 300"))
    lines = world.runtime.logs(seen, follow=True)
    assert next(lines) == "one"
    lines.close()  # type: ignore[attr-defined]
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [one for one in commands if one.startswith(b"journalctl\0")]


def test_the_log_of_a_unit_that_is_gone(world: World) -> None:
    world.runtime.start(world.launch("a", sh("echo one")))
    seen = world.ended("a")
    world.runtime.remove(seen)
    with pytest.raises(RuntimeRefused) as refused:
        [*world.runtime.logs(seen)]
    assert str(refused.value) == (
        f"cannot read the log of {seen.name}: systemd no longer knows the unit"
    )
    assert refused.value.hint == f"see journalctl --unit {seen.ref}"
    with pytest.raises(RuntimeRefused):
        [*world.runtime.previous_logs(seen)]
