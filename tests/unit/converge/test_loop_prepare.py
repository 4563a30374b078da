"""The command of `prepare` in a loop on runtimes in memory: what it holds up, and what ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mic_supervisor.errors import PreflightFailed, Withdrawn
from mic_supervisor.model import ContainerSpec, Hook, Instance, Launch, Preparation
from mic_supervisor.plan.assess import Selection
from mic_supervisor.plan.memory import Drained
from mic_supervisor.runtimes import HostCommand, Progress
from tests.unit.converge.rig import TIMEOUT, A, Engine, File, converging, on, replacing, run
from tests.unit.plan import builders as b

FETCH = Preparation(("/opt/fetch", "all"))
NEWER = on("a", 0, workload=b.container("mam:2", user="1000"), prepare=FETCH)


class Fetches(Engine):
    """An engine that is also this host. A command ends when `done` is set, or it is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[HostCommand] = []
        self.done = threading.Event()
        self.error: PreflightFailed | None = None
        self.side_by_side = 0

    def run_command(
        self, what: HostCommand, progress: Progress, given_up: Callable[[], bool]
    ) -> None:
        self.commands.append(what)
        self.calls.append(f"run {what.instance}")
        self.side_by_side += 1
        assert self.side_by_side == 1
        progress(f"prepare: “run {len(self.commands)}”")
        try:
            for _ in range(int(TIMEOUT / 0.01)):
                if given_up():
                    self.calls.append(f"give up {what.instance}")
                    raise Withdrawn("gave up")
                if self.done.wait(0.01):
                    if self.error is not None:
                        raise self.error
                    return
            raise AssertionError("nobody ended it")
        finally:
            self.side_by_side -= 1


def test_what_serves_goes_on_while_it_runs_and_a_failure_stops_nothing() -> None:
    async def body() -> None:
        engine = Fetches()
        async with replacing(engine, NEWER) as rig:
            await rig.until(lambda: rig.row(A.id).reason == "prepare: “run 1”")
            assert engine.running() == [A.id]
            (what,) = engine.commands
            assert (what.command, what.user, what.directory) == (FETCH.command, "1000", "/")
            engine.error = PreflightFailed("cannot prepare: /opt/fetch exits with 3")
            engine.done.set()
            await rig.phases(a_aaaaaaaa="backoff")
            assert rig.row(A.id).reason == "backoff: cannot prepare: /opt/fetch exits with 3"
            assert engine.running() == [A.id]
            assert f"stop {A.id}" not in engine.calls
            engine.error = None
            rig.later += 60.0
            await rig.until(lambda: f"stop {A.id}" in engine.calls)
            await rig.phases(a_aaaaaaaa="ready")
            assert engine.calls.count(f"run {A.id}") == 2
            assert rig.converger.memory.of(A.id).prepared is not None

    run(body)


def test_it_is_given_up_where_the_file_asks_for_something_else() -> None:
    async def body() -> None:
        engine = Fetches()
        async with replacing(engine, NEWER) as rig:
            await rig.until(lambda: len(engine.commands) == 1)
            # Another command for the same: what hangs can be corrected.
            rig.says(replace(NEWER, prepare=Preparation(("/opt/fetch", "less"))))
            await rig.until(lambda: len(engine.commands) == 2)
            assert engine.commands[1].command == ("/opt/fetch", "less")
            rig.says(A)
            await rig.until(lambda: engine.calls.count(f"give up {A.id}") == 2)
            await rig.phases(a_aaaaaaaa="ready")
            assert engine.running() == [A.id]
            assert f"stop {A.id}" not in engine.calls
            assert rig.tells("failed", A.id) == []
            assert rig.converger.memory.of(A.id).failures == 0

    run(body)


def test_it_is_given_up_for_a_pause_and_when_the_supervisor_ends() -> None:
    async def body() -> None:
        engine = Fetches()
        async with replacing(engine, NEWER) as rig:
            await rig.until(lambda: len(engine.commands) == 1)
            rig.converger.pause(Selection(models=frozenset({"a"})), None)
            await rig.until(lambda: f"give up {A.id}" in engine.calls)
            await rig.phases(a_aaaaaaaa="paused")
            rig.converger.resume(Selection(models=frozenset({"a"})))
            await rig.until(lambda: len(engine.commands) == 2)
            await rig.converger.close()
            assert engine.calls.count(f"give up {A.id}") == 2
            assert engine.running() == [A.id]

    run(body)


def test_it_is_given_up_where_the_host_is_drained() -> None:
    """Else a drain waits for as long as the command takes, and what serves goes on meanwhile."""

    async def body() -> None:
        engine, file = Fetches(), File(A)
        async with converging(file, engine) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            file.says(NEWER)
            rig.converger.wake()
            await rig.until(lambda: len(engine.commands) == 1)
            rig.converger.drain(Drained(0.0))
            await rig.phases(a_aaaaaaaa="drained")
            assert f"give up {A.id}" in engine.calls
            assert engine.running() == []
            assert rig.tells("failed", A.id) == []
            engine.done.set()
            rig.converger.drain(None)
            await rig.phases(a_aaaaaaaa="ready")
            assert len(engine.commands) == 2

    run(body)


def test_of_one_model_one_runs_at_a_time() -> None:
    several = [on("a", number, prepare=FETCH) for number in range(3)]

    async def body() -> None:
        engine = Fetches()
        engine.done.set()
        async with converging(File(*several), engine) as rig:
            await rig.until(lambda: len(engine.running()) == 3)
            assert sorted(what.instance for what in engine.commands) == [one.id for one in several]

    run(body)


def test_the_loop_goes_on_however_many_wait() -> None:
    """A machine has 112 slices of GPUs, and each of them may be about to get the same image."""
    without = replace(b.container(), ports=())
    several = [on("a", number, workload=without) for number in range(112)]

    class Waits(Engine):
        begun, over = 0, threading.Event()

        def prepare(self, launch: Launch, progress: Progress) -> None:
            self.begun += 1
            self.over.wait(TIMEOUT)

    async def body() -> None:
        engine = Waits()
        async with converging(File(*several), engine) as rig:
            rig.gpus.count = len(several)
            try:
                await rig.until(lambda: engine.begun == len(several))
                rounds = rig.converger.rounds_begun
                await rig.until(lambda: rig.converger.rounds_begun > rounds + 1)
            finally:
                engine.over.set()

    run(body)


@pytest.mark.parametrize("how", ["undrained", "paused", "taken back"])
def test_what_was_only_withdrawn_is_not_stopped_for_what_is_over(tmp_path: Path, how: str) -> None:
    """A drain may take its `drain_timeout`, and whoever ordered it may think better of it."""
    told, hook = tmp_path / "told", tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\nwhile [ -e {tmp_path}/slow ]; do sleep 0.02; done; cat > {told}\n")
    hook.chmod(0o755)
    follow = {"hook": Hook((str(hook),), 60.0, 0.0)}

    async def body() -> None:
        engine, file = Engine(), File(A, **follow)
        async with converging(file, engine) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            await rig.until(lambda: told.exists() and A.id in told.read_text())
            (tmp_path / "slow").touch()
            if how == "undrained":
                rig.converger.drain(Drained(0.0))
            else:
                file.says(on("a", 0, workload=b.container("mam:2")), **follow)
                rig.converger.wake()
            await rig.phases(a_aaaaaaaa="stopping")
            if how == "undrained":
                rig.converger.drain(None)
            elif how == "paused":
                rig.converger.pause(Selection(models=frozenset({"a"})), None)
            else:
                file.says(A, **follow)
                rig.converger.wake()
            rounds = rig.converger.rounds_begun
            await rig.until(lambda: rig.converger.rounds_begun > rounds + 1)
            (tmp_path / "slow").unlink()
            await rig.phases(a_aaaaaaaa="paused" if how == "paused" else "ready")
            await rig.until(lambda: A.id in told.read_text())  # it is known again
            assert f"stop {A.id}" not in engine.calls
            (said,) = [text for text in rig.tells("progress", A.id) if "before anything" in text]
            expected = "something else was asked for" if how == "taken back" else how
            assert said == f"{expected} before anything was stopped for it"

    run(body)


class Pulls(Engine):
    """An engine that pulls the second image for as long as it is wanted."""

    def prepare(self, launch: Launch, progress: Progress) -> None:
        super().prepare(launch, progress)
        if isinstance(launch.spec, ContainerSpec) and launch.spec.image == "mam:2":
            for percent in range(int(TIMEOUT / 0.01)):
                progress(f"pulling mam:2: {percent} %")
                time.sleep(0.01)
            raise AssertionError("nobody ended it")


@pytest.mark.parametrize("prepared", [False, True])
def test_a_pull_is_given_up_as_well(prepared: bool) -> None:
    """Of an image of many gigabytes: a drain, or another image, would wait for all of it."""
    old = on("a", 0, prepare=FETCH) if prepared else A
    newer = replace(old, workload=b.container("mam:2"))

    async def body() -> None:
        engine, host, file = Pulls(), Fetches(), File(old)
        host.done.set()
        host.name = "host"
        async with converging(file, engine, host) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            file.says(newer)
            rig.converger.wake()
            await rig.until(lambda: (rig.row(A.id).reason or "").startswith("pulling mam:2: 2"))
            file.says(old)
            await rig.until(lambda: not rig.converger.activities)
            await rig.phases(a_aaaaaaaa="ready")
            assert f"stop {A.id}" not in engine.calls
            assert rig.tells("failed", A.id) == []
            file.says(newer)
            rig.converger.wake()
            await rig.until(lambda: (rig.row(A.id).reason or "").startswith("pulling mam:2: 2"))
            rig.converger.drain(Drained(0.0))
            await rig.phases(a_aaaaaaaa="drained")
            assert engine.running() == []

    run(body)


def test_nothing_is_stopped_for_what_the_file_no_longer_asks_for() -> None:
    """An image takes its time to be pulled, and the file may be taken back meanwhile."""

    async def body(says: Instance) -> None:
        engine, file = Engine(), File(A)
        async with converging(file, engine) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            (before,) = engine.boxes
            pulled = engine.gates[f"prepare {says.id}"] = threading.Event()
            file.says(says)
            rig.converger.wake()
            await rig.until(lambda: f"prepare {says.id}" in engine.calls[3:])
            file.says(A)
            rounds = rig.converger.rounds_begun
            await rig.until(lambda: rig.converger.rounds_begun > rounds + 1)
            pulled.set()
            await rig.until(lambda: not rig.converger.activities)
            await rig.phases(a_aaaaaaaa="ready")
            await rig.until(lambda: [*engine.boxes] == [before])
            assert engine.calls[3:] == [f"prepare {says.id}"]
            assert rig.tells("failed", says.id) == []

    for says in (on("a", 0, workload=b.container("mam:2")), on("b", 0)):
        run(partial(body, says))
