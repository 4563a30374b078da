"""Ends are told of as they happen."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.model import RunState
from mic_supervisor.runtimes.keeper import runtime
from tests.support.waiting import until
from tests.unit.runtimes.keeper.test_run import leave_remains
from tests.unit.runtimes.process_world import World, runs, sh


def pidfds() -> int:
    """How many processes this one has open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            found += "[pidfd]" in str(link.readlink())
    return found


class Listening:
    def __init__(self, world: World) -> None:
        self.names: list[str] = []
        self._stop = threading.Event()
        self._events = world.make().events(self._stop)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def waits_for(self, count: int) -> None:
        """Until it has looked, and waits for the end of so many."""
        until(lambda: pidfds() == count, f"it to wait for {count}")

    def _run(self) -> None:
        self.names.extend(self._events)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(15)
        assert not self._thread.is_alive()


@pytest.fixture
def ended(world: World) -> World:
    world.start("old", ("true",))
    world.await_state("old", "exited")
    return world


@pytest.mark.slow
def test_an_end_is_told_of_at_once(ended: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the next look for new records, which is a minute away here."""
    monkeypatch.setattr(runtime, "_POLL", 60.0)
    one, two = (ended.start(name, ("sleep", "60")) for name in ("one", "two"))
    listening = Listening(ended)
    listening.waits_for(2)
    assert one.pid is not None
    assert two.pid is not None
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: listening.names, "the end", period=0.005)
    assert listening.names == ["one"]
    assert ended.look("one").state is RunState.EXITED
    os.kill(two.pid, signal.SIGKILL)
    until(lambda: len(listening.names) > 1, "the other end", period=0.005)
    assert listening.names == ["one", "two"]  # each once
    listening.end()


@pytest.mark.slow
def test_what_starts_later_is_watched_too(ended: World) -> None:
    ended.start("stays", ("sleep", "60"))
    listening = Listening(ended)
    listening.waits_for(1)
    ended.start("quick", ("true",))
    until(lambda: listening.names == ["quick"], "the end of what was never seen to run")
    seen = ended.start("slow", sh("sleep 1.5"))
    until(lambda: listening.names == ["quick", "slow"], "the end of what was")
    ended.runtime.start(ended.launch("slow", ("true",)))
    until(lambda: listening.names == ["quick", "slow", "slow"], "the end of its second run")
    assert seen.identity.instance == "slow"
    listening.end()


@pytest.mark.slow
def test_the_end_of_a_keeper_is_told_of_and_so_is_that_of_its_child(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    listening = Listening(world)
    listening.waits_for(1)
    world.kill_keeper("one")
    until(lambda: listening.names == ["one"], "the keeper's end")
    time.sleep(1.3)
    assert seen.pid is not None and runs(seen.pid)
    os.kill(seen.pid, signal.SIGKILL)
    until(lambda: listening.names == ["one", "one"], "the child's end")
    listening.end()


def test_what_a_run_without_keeper_left_is_ended(world: World) -> None:
    pid = leave_remains(world)
    listening = Listening(world)
    until(lambda: not runs(pid), "the end of what was left")
    until(
        lambda: (
            world.look("one").error == f"its keeper was killed; exit status lost; "
            f"its other processes still run: PID {pid}"
        ),
        "its record",
    )
    listening.end()


def test_records_that_cannot_be_listed_end_it(world: World) -> None:
    world.directory.write_text("a file is in the way")
    with pytest.raises(RuntimeUnavailable, match="cannot watch the process records: "):
        next(world.runtime.events(threading.Event()))
