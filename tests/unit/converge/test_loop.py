"""The loop on runtimes in memory: what it carries out, side by side, and what it leaves alone."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable

import pytest

from mic_supervisor.clocks import Clock
from mic_supervisor.converge import observe, outcome
from mic_supervisor.converge.outcome import Snapshots
from mic_supervisor.errors import RuntimeRefused, RuntimeUnavailable
from mic_supervisor.model import Launch, RuntimeView
from mic_supervisor.plan.assess import Selection
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.memory import Drained
from tests.unit.converge.rig import (
    SHORT,
    TIMEOUT,
    A,
    B,
    Engine,
    File,
    Rig,
    converging,
    on,
    replacing,
    run,
)
from tests.unit.plan import builders as b


def test_brings_up_what_the_file_asks_for_and_then_does_nothing_more() -> None:
    async def body() -> None:
        engine = Engine()
        async with converging(File(A, B), engine) as rig:
            await rig.phases(**{"a_aaaaaaaa": "ready", "b_bbbbbbbb": "ready"})
            done = list(engine.calls)
            looks = engine.looks
            await rig.until(lambda: engine.looks > looks + 3)
            assert engine.calls == done
        for instance in (A.id, B.id):
            mine = [call for call in done if call.endswith(instance)]
            assert mine == [f"{what} {instance}" for what in ("prepare", "create", "start")]

    run(body)


class SlowEngine(Engine):
    def observe(self) -> RuntimeView:
        time.sleep(0.12)
        return super().observe()


@pytest.mark.parametrize("engine", [Engine, SlowEngine])
@pytest.mark.parametrize("refused", [False, True], ids=["starts", "is tried again soon"])
def test_rounds_keep_a_distance_whatever_wakes_the_loop(
    engine: type[Engine], refused: bool
) -> None:
    ends: list[tuple[float, float]] = []  # when, and the gap that is due after it

    async def body() -> None:
        made = engine()
        if refused:  # a round is due when the cooldown of a second ends
            made.refuses[f"create {A.id}"] = RuntimeUnavailable("cannot reach the engine")
        async with converging(File(A), made) as rig:
            rig.converger.observers.append(lambda seen: ends.append((time.monotonic(), seen.gap)))
            while len(ends) < 5:
                if not refused:
                    rig.converger.wake()
                await asyncio.sleep(0.001)

    run(body)
    assert all(0 < gap <= 0.5 for _, gap in ends)
    assert all(
        later - before >= 0.99 * gap for (before, gap), (later, _) in itertools.pairwise(ends)
    )


def test_does_nothing_before_it_is_told_to_act() -> None:
    async def body() -> None:
        engine = Engine()
        rig = Rig(File(A), engine)
        task = asyncio.create_task(rig.converger.run())
        rig.converger.wake()
        await rig.until(lambda: rig.converger.snapshot is not None)
        snapshot = rig.converger.snapshot
        assert snapshot is not None
        assert [change.kind for change in snapshot.plan.changes] == ["create"]
        assert engine.calls == []
        task.cancel()
        await rig.converger.close()

    run(body)


def test_a_lane_that_hangs_holds_up_no_other_and_is_left_out_meanwhile() -> None:
    async def body() -> None:
        engine = Engine()
        engine.gates[f"start {A.id}"] = threading.Event()
        async with converging(File(A, B), engine) as rig:
            await rig.phases(b_bbbbbbbb="ready")
            looks = engine.looks
            await rig.until(lambda: engine.looks > looks + 3)
            assert engine.calls.count(f"start {A.id}") == 1
            assert rig.converger.snapshot is not None
            assert rig.converger.snapshot.busy == {A.id}
            engine.gates[f"start {A.id}"].set()
            await rig.phases(a_aaaaaaaa="ready")

    run(body)


def test_what_shares_gpus_is_one_lane_and_starts_after_all_of_it_stopped() -> None:
    both = on("both", 0, 1)

    async def body() -> None:
        engine = Engine()
        file = File(both)
        async with converging(file, engine) as rig:
            await rig.until(lambda: rig.phase(both.id) == "ready")
            rig.says(A, B)
            await rig.phases(a_aaaaaaaa="ready", b_bbbbbbbb="ready")
        stopped = engine.calls.index(f"stop {both.id}")
        assert engine.calls.index(f"start {A.id}") > stopped
        assert engine.calls.index(f"start {B.id}") > stopped
        # What can fail early was tried before anything was stopped.
        assert engine.calls.index(f"prepare {A.id}") < stopped
        assert engine.calls.index(f"prepare {B.id}") < stopped

    run(body)


def test_what_a_start_waits_for_is_its_reason_meanwhile() -> None:
    newer = on("b", 0)

    class Pulls(Engine):
        def prepare(self, launch: Launch, progress: Callable[[str], None]) -> None:
            progress(f"pulling 34 % for {launch.identity.instance}")
            super().prepare(launch, progress)

    async def body() -> None:
        engine = Pulls()
        file = File(A)
        pull = engine.gates[f"prepare {A.id}"] = threading.Event()
        stop = engine.gates[f"stop {A.id}"] = threading.Event()
        async with converging(file, engine) as rig:
            await rig.until(lambda: rig.row(A.id).reason == f"pulling 34 % for {A.id}")
            assert rig.row(A.id).phase is Phase.PENDING
            pull.set()
            await rig.phases(a_aaaaaaaa="ready")
            rig.says(newer)
            waits = f"waits for {A.id}, which is stopping"
            await rig.until(lambda: rig.row(newer.id).reason == waits)
            assert rig.row(A.id).phase is Phase.STOPPING
            stop.set()
            await rig.until(lambda: rig.phase(newer.id) == "ready")

    run(body)


def test_what_fails_again_stays_in_its_phase_and_is_no_news() -> None:
    async def body() -> None:
        engine = Engine()
        engine.refuses[f"create {A.id}"] = RuntimeUnavailable("cannot reach the engine")
        async with converging(File(A), engine) as rig:
            await rig.phases(a_aaaaaaaa="backoff")
            known = len(rig.told)
            gate = engine.gates[f"create {A.id}"] = threading.Event()
            rig.later += 5.0
            await rig.until(lambda: engine.calls.count(f"create {A.id}") == 2)
            looks = engine.looks
            await rig.until(lambda: engine.looks > looks + 2)
            row = rig.row(A.id)  # while it is tried again
            assert (row.phase, row.reason) == (Phase.BACKOFF, "cannot reach the engine")
            engine.gates.clear()
            gate.set()
            await rig.until(lambda: len(rig.tells("failed", A.id)) == 2)
            assert [event.kind for event in rig.told[known:]] == ["progress", "failed"]

    run(body)


def test_a_pause_while_it_prepares_leaves_what_runs() -> None:
    newer = on("a", 0, workload=b.container("mam:2"))

    async def body() -> None:
        engine = Engine()
        async with replacing(engine, newer, f"create {A.id}") as rig:
            await rig.until(lambda: engine.calls.count(f"create {A.id}") == 2)
            rig.converger.pause(Selection(models=frozenset({"a"})), None)
            engine.gates[f"create {A.id}"].set()
            await rig.until(
                lambda: "paused before anything was stopped for it" in rig.tells("progress", A.id)
            )
            assert f"stop {A.id}" not in engine.calls
            assert engine.running() == [A.id]

    run(body)


def test_a_drain_while_it_prepares_stops_what_runs_and_starts_nothing() -> None:
    newer = on("a", 0, workload=b.container("mam:2"))

    async def body() -> None:
        engine = Engine()
        async with replacing(engine, newer, f"create {A.id}") as rig:
            await rig.until(lambda: engine.calls.count(f"create {A.id}") == 2)
            rig.converger.drain(Drained(since=1.0))
            engine.gates[f"create {A.id}"].set()
            await rig.phases(a_aaaaaaaa="drained")
            assert "drained before anything was stopped for it" in rig.tells("progress", A.id)
            assert engine.calls.count(f"start {A.id}") == 1
            assert engine.running() == []
            assert rig.saved[-1].drained == Drained(since=1.0)
            rig.converger.drain(None)
            await rig.phases(a_aaaaaaaa="ready")

    run(body)


def test_a_start_that_is_refused_waits_for_its_backoff_and_is_tried_at_once_when_forgiven() -> None:
    async def body() -> None:
        engine = Engine()
        engine.refuses[f"start {A.id}"] = RuntimeRefused("cannot start it: no such device")
        async with converging(File(A), engine) as rig:
            await rig.phases(a_aaaaaaaa="backoff")
            tries = engine.calls.count(f"start {A.id}")
            await asyncio.sleep(SHORT)
            assert engine.calls.count(f"start {A.id}") == tries
            assert rig.saved[-1].of(A.id).failures == 1
            engine.refuses.clear()
            assert rig.converger.forgive() == {A.id}
            await rig.phases(a_aaaaaaaa="ready")

    run(body)


def test_a_backoff_is_over_when_its_time_has_come() -> None:
    async def body() -> None:
        engine = Engine()
        engine.refuses[f"start {A.id}"] = RuntimeRefused("cannot start it: no such device")
        async with converging(File(A), engine) as rig:
            await rig.phases(a_aaaaaaaa="backoff")
            engine.refuses.clear()
            rig.later = 600.0
            await rig.phases(a_aaaaaaaa="ready")

    run(body)


def test_an_engine_that_goes_away_is_no_failure_of_the_instance() -> None:
    async def body() -> None:
        engine = Engine()
        engine.refuses[f"create {A.id}"] = RuntimeUnavailable("cannot reach the engine")
        async with converging(File(A), engine) as rig:
            await rig.until(lambda: rig.tells("failed", A.id))
            engine.refuses.clear()
            await rig.phases(a_aaaaaaaa="ready")
            assert rig.converger.memory.of(A.id).failures == 0

    run(body)


def test_what_ends_is_started_again_and_counted() -> None:
    async def body() -> None:
        engine = Engine()
        async with converging(File(A), engine) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            engine.ends(engine.name_of(A.id), 137)
            await rig.until(lambda: f"restart {A.id}" in engine.calls)
            await rig.phases(a_aaaaaaaa="ready")
            assert rig.converger.memory.of(A.id).restarts == 1

    run(body)


def test_what_is_gone_from_the_file_is_removed_and_forgotten() -> None:
    async def body() -> None:
        engine = Engine()
        file = File(A, B)
        async with converging(file, engine) as rig:
            await rig.phases(a_aaaaaaaa="ready", b_bbbbbbbb="ready")
            rig.says(B)
            await rig.until(lambda: engine.running() == [B.id])
            await rig.until(lambda: A.id not in rig.converger.memory.instances)

    run(body)


def test_nothing_is_removed_that_nobody_confirmed() -> None:
    async def body() -> None:
        engine = Engine()
        file = File(A, B)
        async with converging(file, engine) as rig:
            await rig.phases(a_aaaaaaaa="ready", b_bbbbbbbb="ready")
            rig.converger.removal_confirmed = lambda _hash: False
            file.says(B)
            await rig.phases(a_aaaaaaaa="blocked")
            assert engine.running() == [A.id, B.id]

    run(body)


def test_a_runtime_that_hangs_freezes_its_own_and_nothing_is_asked_of_it_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observe, "_QUICK", 0.1)

    async def body() -> None:
        engine = Engine()
        async with converging(File(A), engine) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            engine.gates["observe"] = threading.Event()
            looks = engine.looks
            await rig.until(lambda: engine.looks == looks + 1)
            await rig.phases(a_aaaaaaaa="blocked")
            assert engine.looks == looks + 1
            assert engine.running() == [A.id]
            engine.gates.pop("observe").set()
            await rig.phases(a_aaaaaaaa="ready")
            assert f"restart {A.id}" not in engine.calls

    run(body)


@pytest.mark.parametrize("answers", [True, False])
def test_a_command_waits_a_while_for_a_runtime_that_is_late(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """On a machine that is busy it answers later than usual; one that hangs is not waited for."""
    monkeypatch.setattr(observe, "_QUICK", 0.1)
    monkeypatch.setattr(outcome, "SOURCE_TIMEOUT", TIMEOUT if answers else 1.0)

    async def body() -> None:
        engine = Engine()
        gate = engine.gates["observe"] = threading.Event()
        async with converging(File(A), engine) as rig:
            waiting = Snapshots(rig.converger, Clock().steady, complete=True)
            rig.converger.observers.append(waiting.on_snapshot)
            first = asyncio.ensure_future(waiting.first())
            done = asyncio.ensure_future(waiting.converged())
            await rig.phases(a_aaaaaaaa="blocked")
            assert not first.done()
            if answers:
                gate.set()
            assert (await first).observed.late is not answers
            phase = Phase.READY if answers else Phase.BLOCKED
            assert [row.phase for row in (await done).statuses] == [phase]
            gate.set()

    run(body)


def test_closing_waits_for_no_step_that_hangs() -> None:
    async def body() -> None:
        engine = Engine()
        gate = engine.gates[f"start {A.id}"] = threading.Event()
        rig = Rig(File(A), engine)
        rig.converger.act()
        task = asyncio.create_task(rig.converger.run())
        await rig.until(lambda: f"start {A.id}" in engine.calls)
        task.cancel()
        began = time.monotonic()
        await rig.converger.close(timeout=0.2)
        assert time.monotonic() - began < TIMEOUT
        gate.set()

    run(body)
