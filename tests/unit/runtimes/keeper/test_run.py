"""Stopping: nothing of a tree survives, and nothing that is not of the tree is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.errors import RuntimeRefused, StopFailed
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import ObservedWorkload, RunState
from mic_supervisor.runtimes.keeper.run import problem
from tests.support.waiting import until
from tests.unit.runtimes.process_world import STUBBORN, World, python, runs, sh

SLEEP = "\nwhile True:\n    time.sleep(1)\n"
IGNORE = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(flush=True)"

# Forks and ends, over and over: it never has the same PID for more than a moment.
HOPPER = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    end = time.monotonic() + 90  # if this test fails, nothing ends it
    while time.monotonic() < end:
        if os.fork():
            os._exit(0)
        time.sleep(0.001)
    os._exit(0)
"""


LONG = 60.0
SOON = LONG / 2  # on a busy machine, too: who waits for a grace of LONG takes longer


def stop(world: World, seen: ObservedWorkload, grace: float = LONG, name: str = "SIGTERM") -> float:
    before = time.monotonic()
    world.runtime.stop(seen, signal=name, grace=grace)
    return time.monotonic() - before


@pytest.fixture
def foreign() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_stopping_is_quick_and_keeps_the_status(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    keeper = world.record("one")["keeper"]["pid"]
    assert stop(world, seen) < SOON
    after = world.look("one")
    assert (after.state, after.exit_code, after.error) == (
        RunState.EXITED,
        143,
        "ended by SIGTERM",
    )
    assert seen.pid is not None and not runs(seen.pid) and not runs(keeper)
    assert stop(world, seen) < SOON  # once more is success
    assert world.look("one") == after


def test_a_process_may_say_goodbye(world: World) -> None:
    command = sh("trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done")
    seen = world.start("one", command)
    world.await_lines("one", 1)
    stop(world, seen)
    assert world.look("one").exit_code == 5
    assert list(world.runtime.logs(seen)) == ["up", "bye"]


def test_the_signal_is_the_one_that_was_asked_for(world: World) -> None:
    text = (
        "import time\nprint(flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemExit(9)"
    )
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a shell does to background jobs
    try:
        seen = world.start("one", python(text))
    finally:
        signal.signal(signal.SIGINT, old)
    world.await_lines("one", 1)
    stop(world, seen, name="INT")
    assert world.look("one").exit_code == 9
    with pytest.raises(RuntimeRefused, match="cannot stop one: there is no signal SIGNONE"):
        stop(world, seen, name="SIGNONE")


def test_after_the_grace_it_is_killed(world: World) -> None:
    seen = world.start("one", python(IGNORE + SLEEP))
    world.await_lines("one", 1)
    assert 0.4 <= stop(world, seen, grace=0.4) < SOON
    assert world.look("one").exit_code == 137
    assert world.alive() == []


def test_a_process_that_is_stopped_hears_of_it(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGSTOP)
    assert stop(world, seen) < SOON
    assert world.look("one").exit_code == 143


def test_nothing_escapes(world: World) -> None:
    """Orphans in sessions of their own, which ignore SIGTERM."""
    seen = world.start("one", python(STUBBORN + "escape(3)\nprint(flush=True)" + SLEEP))
    world.await_lines("one", 1)
    until(lambda: len(world.alive()) >= 5, "four generations")
    assert stop(world, seen, grace=0.3) < SOON
    assert world.alive() == []
    assert world.look("one").state is RunState.EXITED


def test_nothing_escapes_by_forgetting_who_it_is(world: World) -> None:
    """With a keeper, the tree is enough: the environment need not name us."""
    command = sh("env -i setsid sh -c 'trap \"\" TERM; sleep 61 & sleep 62' & echo $!; sleep 63")
    seen = world.start("one", command)
    world.await_lines("one", 1)
    keeper = world.record("one")["keeper"]["pid"]
    until(lambda: len(procfs.descendants([keeper])) == 5, "all of them")
    tree = procfs.descendants([keeper])
    stop(world, seen, grace=0.3)
    assert [pid for pid in tree if runs(pid)] == []


def test_a_process_that_forks_without_end_is_caught(world: World) -> None:
    seen = world.start("one", python(HOPPER + "print(flush=True)" + SLEEP))
    world.await_lines("one", 1)
    stop(world, seen, grace=0.2)
    assert world.alive() == []


@pytest.mark.parametrize("text", [STUBBORN + "escape(2)", HOPPER])
def test_what_a_process_leaves_behind_ends_with_it(world: World, text: str) -> None:
    world.start("one", python(text + "\nos._exit(4)"))
    seen = world.await_state("one", "exited")
    assert seen.exit_code == 4
    assert world.alive() == []  # the status is written after


def test_until_the_rest_is_gone_it_counts_as_running(world: World) -> None:
    text = STUBBORN + "escape(0)\ntime.sleep(0.2)\nos._exit(0)"
    world.start("one", python(text))
    until(lambda: world.look("one").error is not None, "its end")
    seen = world.look("one")
    assert (seen.state, seen.pid, seen.error) == (
        RunState.RUNNING,
        None,
        "its main process has ended, and what it left is being ended",
    )
    assert stop(world, seen, grace=0) < SOON
    assert world.look("one").exit_code == 0
    assert world.alive() == []


# --- keepers that were killed -----------------------------------------------------------------


def test_without_its_keeper_a_process_is_found_and_stopped(world: World) -> None:
    seen = world.start("one", python(STUBBORN + "escape(1)\nprint(flush=True)" + SLEEP))
    world.await_lines("one", 1)
    world.kill_keeper("one")
    stray = world.make().observe().workloads[0]
    assert (stray.state, stray.pid) == (RunState.RUNNING, seen.pid)
    assert stray.error == "its keeper was killed: its exit status will be lost"
    world.runtime.start(world.launch("one", ("sleep", "60")))  # it runs: nothing to do
    assert world.look("one").pid == seen.pid
    stop(world, stray, grace=0.3)
    assert world.alive() == []
    after = world.look("one")
    assert (after.state, after.exit_code, after.error) == (
        RunState.EXITED,
        None,
        "its keeper was killed; exit status lost",
    )


def test_without_its_keeper_the_tree_is_known_by_descent(world: World) -> None:
    """What forgot who it is, and is orphaned as soon as the main process ends."""
    forgetful = "env -i setsid sh -c 'trap \"\" TERM; echo; sleep 61 & sleep 62' &"
    seen = world.start("one", sh(f"{forgetful} exec sleep 63"))
    world.await_lines("one", 1)
    assert seen.pid is not None
    root = seen.pid
    until(lambda: len(procfs.descendants([root])) == 3, "all of them")
    tree = [root, *procfs.descendants([root])]
    world.kill_keeper("one")
    stop(world, seen, grace=1.0)
    assert [pid for pid in tree if runs(pid)] == []


def test_without_its_keeper_the_tree_is_known_by_its_session(world: World) -> None:
    """What forgot who it is, and was an orphan before."""
    forgetful = "(env -i sh -c 'trap \"\" TERM; echo $$; sleep 61' &)"
    seen = world.start("one", sh(f"{forgetful}; exec sleep 63"))
    (pid,) = map(int, world.await_lines("one", 1))
    world.kill_keeper("one")
    assert pid not in procfs.descendants([seen.pid or 0]) and runs(pid)
    stop(world, seen, grace=1.0)
    assert not runs(pid)


def leave_remains(world: World) -> int:
    """A run that has ended, without a keeper, and one process that it left behind."""
    text = STUBBORN + "escape(0)\nprint(flush=True)" + SLEEP
    seen = world.start("one", python(text))
    world.await_lines("one", 1)
    until(lambda: len(world.alive()) == 2, "the escaped one")
    world.kill_keeper("one")
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGKILL)
    until(lambda: world.look("one").state is RunState.EXITED, "the end")
    (pid,) = world.alive()
    return pid


def test_what_a_run_without_keeper_left_is_named_and_ended(world: World) -> None:
    pid = leave_remains(world)
    seen = world.look("one")
    assert seen.error == (
        f"its keeper was killed; exit status lost; its other processes still run: PID {pid}"
    )
    assert runs(pid)  # looking changed nothing
    stop(world, seen)
    assert world.alive() == []


def test_starting_anew_ends_what_was_left_first(world: World) -> None:
    leave_remains(world)
    seen = world.start("one", ("sleep", "60"))
    assert world.alive() == [seen.pid]


def test_removing_ends_what_was_left_first(world: World) -> None:
    leave_remains(world)
    world.runtime.remove(world.look("one"))
    assert world.alive() == []
    assert world.names() == []


@pytest.mark.slow
def test_a_keeper_that_does_not_answer_is_replaced(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    os.kill(world.record("one")["keeper"]["pid"], signal.SIGSTOP)
    stop(world, seen)
    after = world.look("one")
    assert (after.state, after.error) == (
        RunState.EXITED,
        "its keeper was killed; exit status lost",
    )


def test_a_keeper_that_is_told_to_end_stops_its_process(world: World) -> None:
    command = sh("trap 'exit 6' TERM; echo up; while :; do sleep 0.05; done")
    world.start("one", command)
    world.await_lines("one", 1)
    os.kill(world.record("one")["keeper"]["pid"], signal.SIGTERM)
    assert world.await_state("one", "exited").exit_code == 6


def test_a_keeper_that_is_told_to_end_kills_in_the_end(world: World) -> None:
    world.start("one", python(IGNORE + SLEEP), stop_timeout=0.1)
    world.await_lines("one", 1)
    os.kill(world.record("one")["keeper"]["pid"], signal.SIGTERM)
    assert world.await_state("one", "exited").exit_code == 137


# --- processes that are not ours --------------------------------------------------------------


def forge(world: World, who: str, pid: int, start_time: int) -> None:
    path = world.directory / "one" / "record.json"
    record: dict[str, Any] = json.loads(path.read_text())
    record[who] = {"pid": pid, "start_time": start_time}
    path.write_text(json.dumps(record))


def start_time_of(process: subprocess.Popen[bytes]) -> int:
    found = procfs.stat(process.pid)
    assert found is not None
    return found.start_time


@pytest.mark.parametrize("who", ["keeper", "child"])
def test_a_pid_that_was_used_again_is_not_touched(
    world: World, foreign: subprocess.Popen[bytes], who: str
) -> None:
    seen = world.start("one", ("sleep", "60"))
    record = world.record("one")
    world.kill_keeper("one")
    os.kill(record["child"]["pid"], signal.SIGKILL)
    until(lambda: not world.alive(), "the end")
    forge(world, who, foreign.pid, start_time_of(foreign) - 1)
    assert world.look("one").state is RunState.EXITED
    stop(world, seen)
    world.start("one", ("true",))
    ended = world.await_state("one", "exited")
    forge(world, who, foreign.pid, start_time_of(foreign) - 1)
    world.runtime.remove(ended)
    assert foreign.poll() is None


def test_processes_of_another_run_are_not_touched(world: World) -> None:
    one = world.start("one", ("sleep", "60"))
    two = world.start("two", ("sleep", "60"))
    stop(world, one)
    assert world.look("two") == two
    assert world.alive() == [two.pid]


def test_survivors_are_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = world.start("one", ("sleep", "60"))
    runtime = world.make(kill_timeout=0.1)
    real = procfs.send_signal
    monkeypatch.setattr(procfs, "send_signal", lambda pid, started, number: True)
    with pytest.raises(StopFailed) as raised:
        runtime.stop(seen, signal="SIGTERM", grace=0.1)
    assert str(raised.value) == f"cannot stop one: PID {seen.pid} (sleep) survived KILL"
    assert world.look("one").state is RunState.RUNNING
    monkeypatch.setattr(procfs, "send_signal", real)
    stop(world, seen)
    assert world.alive() == []


def test_a_process_that_may_not_be_signalled_is_a_survivor(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = world.start("one", ("sleep", "60"))

    def refuse(pid: int, started: int, number: int) -> bool:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(procfs, "send_signal", refuse)
        with pytest.raises(StopFailed) as raised:
            world.runtime.stop(seen, signal="SIGTERM", grace=0.1)
    assert str(raised.value) == "cannot stop one: [Errno 1] Operation not permitted"


def test_what_is_not_there_is_stopped_already(world: World, tmp_path: Path) -> None:
    seen = world.start("one", ("true",))
    world.await_state("one", "exited")
    world.runtime.remove(seen)
    assert stop(world, seen) < SOON


def copy_of(pid: int, **more: str) -> subprocess.Popen[bytes]:
    """A process of somebody else, with the environment of `pid`."""
    return subprocess.Popen(["sleep", "60"], env={**(procfs.environ(pid) or {}), **more})


def test_a_copied_environment_makes_nobody_ours(world: World) -> None:
    """Not while the keeper runs, which keeps the whole tree below itself."""
    seen = world.start("one", python(STUBBORN + "escape(1)\n" + SLEEP))
    assert seen.pid is not None
    keeper = world.record("one")["keeper"]["pid"]
    until(lambda: len(procfs.descendants([keeper])) >= 3, "the strays")
    strays = {keeper, *procfs.descendants([keeper])}
    with copy_of(seen.pid) as mine:
        try:
            stop(world, seen, grace=0.3)
            assert mine.poll() is None
            assert not [pid for pid in strays if runs(pid)]
        finally:
            mine.kill()


# --- what comes through the keeper's pipe -------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b'{"pid": 7}\n', None),
        (b'warning: x\n{"pid": 7}\n', None),
        (b'{"error": "no room"}\n', "no room"),
        (b"", "its keeper failed: it was killed"),
        (b'{"pi', 'its keeper failed: “{"pi”'),
        (b"{}", "its keeper failed: “{}”"),
        (b"[]", "its keeper failed: “[]”"),
        (b"null", "its keeper failed: “null”"),
        (b'{"error": 5}', 'its keeper failed: “{"error": 5}”'),
        (b'{"pid": "7"}', 'its keeper failed: “{"pid": "7"}”'),
        (b"a\0\xff\x1b[2J", "its keeper failed: “a\ufffd\ufffd\ufffd[2J”"),
    ],
)
def test_what_a_keeper_answers(answer: bytes, why: str | None) -> None:
    assert problem(answer) == why


@given(st.binary() | st.sampled_from([b"[" * 50_000, b"x" * 1_000_000, b"1" * 10_000]))
def test_whatever_a_keeper_answers_is_a_failure_with_words(answer: bytes) -> None:
    why = problem(answer)
    assert why is not None and why.isprintable() and len(why) < 400
