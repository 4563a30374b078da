"""Holders at a converger: what they are told, and what becomes of what they hold."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.load import load
from mic_supervisor.converge.claims import ClaimDesk
from mic_supervisor.converge.events import Event
from mic_supervisor.desired import FileDesired
from mic_supervisor.desired.claims import RECONNECT
from mic_supervisor.errors import MicError, RuntimeRefused, Unserviceable
from mic_supervisor.model import DesiredState
from mic_supervisor.plan.assess import Selection
from mic_supervisor.plan.memory import Drained
from tests.unit.converge.rig import SHORT, Engine, Rig, run
from tests.unit.plan import builders as b

MODELS = "models: {a: {backend: container, image: a}, b: {backend: container, image: b}}\n"
GRACE = 60.0


@dataclass
class Holder:
    """One connection. `said` is what it heard: state, text and instance of each word."""

    desk: ClaimDesk
    params: dict[str, Any]
    by: str = "alice"
    said: list[Event] = field(default_factory=list)
    task: asyncio.Task[Any] = field(init=False)

    def __post_init__(self) -> None:
        method = self.desk.methods(self.by)["claim"]
        self.task = asyncio.ensure_future(method(self.params, self.said.append))

    @property
    def state(self) -> str | None:
        return self.said[-1].phase if self.said else None

    @property
    def instance(self) -> str | None:
        return self.said[-1].instance if self.said and self.said[-1].gpus else None

    async def cut(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def release(self) -> None:
        params = {**self.params, "instance": self.instance}
        await self.desk.methods(self.by)["release"](params, self.said.append)


class World(Rig):
    """A rig whose file hands GPUs over."""

    desk: ClaimDesk
    path: Path

    def holder(self, token: str, model: str = "a", **more: Any) -> Holder:
        return Holder(self.desk, {"model": model, "token": token, **more})

    def says(self, gpus: str, models: str = MODELS) -> None:
        self.path.write_text(f"version: 1\n{models}gpus: {gpus}\n")
        self.desired.use(load(self.path, Registry(), environ={}))
        self.converger.wake()

    async def states(self, *wanted: Holder, are: str) -> None:
        await self.until(lambda: all(one.state == are for one in wanted))

    def restarts(self) -> None:
        """As a supervisor that comes anew: nobody is known, and the same runs."""
        self.desk = ClaimDesk(
            self.desired, GRACE, self.events, self.converger._clock, self.converger.wake
        )
        self.converger.claims = self.desk
        self.converger.observers[:] = [self.desk.on_snapshot]


@asynccontextmanager
async def world(tmp_path: Path, gpus: str, engine: Engine | None = None) -> AsyncIterator[World]:
    path = tmp_path / "gpus.yaml"
    path.write_text(f"version: 1\n{MODELS}gpus: {gpus}\n")
    desired = FileDesired(load(path, Registry(), environ={}), Registry(), tmp_path)
    made: Any = World(desired, engine or Engine())  # type: ignore[arg-type]
    made.desired, made.path = desired, path
    made.restarts()
    made.converger.act()
    task = asyncio.create_task(made.converger.run())
    try:
        yield made
        assert not task.done(), "the loop has ended"
    finally:
        task.cancel()
        await made.converger.close(timeout=0.2)


def test_a_holder_hears_how_it_goes_until_nothing_is_left(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            first = rig.holder("1", holder="task 1")
            await rig.states(first, are="ready")
            second = rig.holder("2", "b")
            await rig.states(second, are="waiting")
            assert second.said[0].text == "waits for a GPU: it is number 1 of 1 in the queue"
            assert second.said[0].gpus == ()
            assert first.said[0].phase in ("starting", "ready")
            assert rig.engine.running() == ["a-aaaaaaaa"]
            await first.release()
            assert rig.engine.boxes == {} or rig.engine.running() == ["b-aaaaaaaa"]
            assert await first.task == {"ended": "released"}
            await rig.states(second, are="ready")
            assert rig.tells("order", "a") == ["claim a (task 1)"]
            assert rig.tells("order", "a-aaaaaaaa") == ["release its claim of a (task 1)"]
            assert rig.tells("claim", "a-aaaaaaaa") == [
                "claimed by alice (task 1)",
                "the claim ends: its claim was released",
            ]
            (begin,) = (e for e in rig.told if e.kind == "begin" and e.phase == "remove")
            assert begin.text == "its claim was released"
            begins = rig.tells("begin", "a-aaaaaaaa")
            assert begins[0] == "nothing runs for it yet; claimed by alice (task 1)"

    run(body)


def test_one_that_is_cut_off_keeps_what_it_has_and_another_goes_on(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            first = rig.holder("1")
            await rig.states(first, are="ready")
            calls = [*rig.engine.calls]
            await first.cut()
            assert [one.token for one in rig.desk.claims] == ["1"]
            second = rig.holder("2")
            await rig.states(second, are="ready")
            assert (rig.engine.calls, second.instance) == (calls, "a-aaaaaaaa")
            waiting = rig.holder("3")
            await rig.states(waiting, are="waiting")
            await waiting.cut()
            assert [one.token for one in rig.desk.claims] == ["2"]

    run(body)


def test_when_the_grace_is_over_it_is_removed(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            first = rig.holder("1")
            await rig.states(first, are="ready")
            await first.cut()
            rig.later = GRACE - 5
            await asyncio.sleep(0.3)
            assert rig.engine.running() == ["a-aaaaaaaa"]
            rig.later = GRACE + 5
            await rig.until(lambda: not rig.engine.boxes)
            await rig.until(lambda: not rig.desk.claims)

    run(body)


def test_after_a_restart_a_holder_gets_what_it_had(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet, 1: fleet}") as rig:
            first = rig.holder("1")
            await rig.states(first, are="ready")
            calls = [*rig.engine.calls]
            rig.restarts()
            rig.converger.wake()
            await rig.until(lambda: [one.found for one in rig.desk.claims] == [True])
            again = rig.holder("1", instance=first.instance, waited=100.0)
            await rig.states(again, are="ready")
            assert (again.instance, rig.engine.calls) == ("a-aaaaaaaa", calls)
            rig.restarts()
            rig.later += RECONNECT + 1
            again.desk = rig.desk  # which has not heard of it yet
            await asyncio.wait_for(again.release(), 10)
            await rig.until(lambda: not rig.engine.boxes)

    run(body)


def test_after_a_restart_what_the_file_merely_lacks_is_found_before_its_holder_comes(
    tmp_path: Path,
) -> None:
    """Else it would be nobody's for a while: `starting` again, and no longer served."""

    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            first = rig.holder("1")
            await rig.states(first, are="ready")
            calls = [*rig.engine.calls]
            rig.converger.removal_confirmed = lambda _hash: False
            rig.says("{1: none}")
            rig.restarts()
            await rig.until(lambda: [one.found for one in rig.desk.claims] == [True])
            again = rig.holder("1", instance=first.instance)
            await rig.states(again, are="ready")
            assert (again.instance, rig.engine.calls) == (first.instance, calls)
            rig.converger.removal_confirmed = lambda _hash: True
            rig.converger.wake()
            with pytest.raises(Unserviceable, match="the file hands no GPU over"):
                await asyncio.wait_for(again.task, 10)
            await rig.until(lambda: not rig.engine.boxes)

    run(body)


def test_what_a_file_hands_over_that_waits_for_a_word_is_waited_for(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: none}") as rig:
            before = rig.desired.config
            rig.says("{0: fleet}")
            after = rig.desired.config
            rig.desired.use(before, after)
            holder = rig.holder("1")
            await rig.states(holder, are="waiting")
            assert holder.said[-1].text.startswith("waits for the file to hand over 1 at a time, ")
            with pytest.raises(Unserviceable, match="the file has no model c"):
                await asyncio.wait_for(rig.holder("2", "c").task, 10)
            rig.desired.use(after)
            rig.converger.wake()
            await rig.states(holder, are="ready")

    run(body)


def test_who_is_ready_stays_so_while_its_engine_cannot_be_read(tmp_path: Path) -> None:
    """Else a scheduler would take a model that serves for one that is not well, and end it."""

    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            holder = rig.holder("1")
            await rig.states(holder, are="ready")
            said = [*holder.said]
            rig.engine.unreadable = "it hangs"
            await rig.until(lambda: rig.phase("a-aaaaaaaa") == "blocked")
            await asyncio.sleep(SHORT)
            assert holder.said == said
            rig.engine.unreadable = None
            rig.engine.ends(rig.engine.name_of("a-aaaaaaaa"), 1)
            await rig.until(lambda: holder.said != said)

    run(body)


def test_a_release_of_what_nobody_has_is_done(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            release = rig.desk.methods("alice")["release"]
            await release({"model": "a", "token": "x"}, lambda _event: None)
            gone = {"model": "a", "token": "x", "instance": "a-aaaaaaaa"}
            await asyncio.wait_for(release(gone, lambda _event: None), 10)
            assert rig.engine.calls == []

    run(body)


def test_of_two_connections_with_one_token_the_newer_counts(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            older = rig.holder("1")
            await rig.states(older, are="ready")
            newer = rig.holder("1")
            with pytest.raises(MicError, match="another connection holds it now"):
                await older.task
            await rig.states(newer, are="ready")
            (claim,) = rig.desk.claims
            assert claim.vanished_at is None
            other = rig.holder("1", "b")
            with pytest.raises(Unserviceable, match="its token is of another claim"):
                await other.task

    run(body)


@pytest.mark.parametrize(
    "params",
    [
        {"gpus": 0},
        {"gpus": True},
        {"gpus": "1"},
        {"model": ""},
        {"model": 7},
        {"token": ""},
        {"holder": []},
        {"waited": "long"},
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, params: dict[str, Any]) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            with pytest.raises(Unserviceable):
                await Holder(rig.desk, {"model": "a", "token": "1", **params}).task

    run(body)


def test_the_file_is_read_before_anything_is_refused_for_good(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: none}") as rig:
            reads: list[str] = []

            async def read_file() -> None:
                await asyncio.sleep(0.01)
                reads.append("read")
                rig.says("{0: fleet}" if len(reads) == 2 else "{0: none}")

            rig.desk.read_file = read_file
            with pytest.raises(Unserviceable, match="hands no GPU over"):
                await rig.holder("1").task
            assert reads == ["read"]
            # Whoever goes meanwhile leaves nothing begun.
            gone = rig.holder("2")
            await asyncio.sleep(0)
            await gone.cut()
            await rig.until(lambda: len(reads) == 2)
            assert rig.desk.claims == ()
            await rig.states(rig.holder("3"), are="ready")
            assert len(reads) == 2  # nothing is refused

    run(body)


def test_no_round_waits_for_what_others_ask_and_an_engine_does_not_answer(tmp_path: Path) -> None:
    """`logs` of an engine that hangs takes one of asyncio's few threads, for each who asks."""

    async def body() -> None:
        answers = threading.Event()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        asking = asyncio.ensure_future(asyncio.to_thread(answers.wait, 60))
        try:
            async with world(tmp_path, "{0: fleet}") as rig:
                await rig.states(rig.holder("1"), are="ready")
        finally:
            answers.set()
            await asking

    run(body)


def test_a_start_that_is_refused_ends_the_claim_and_leaves_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        engine = Engine()
        engine.refuses["start a-aaaaaaaa"] = RuntimeRefused("no such runtime")
        async with world(tmp_path, "{0: fleet}", engine) as rig:
            holder = rig.holder("1")
            with pytest.raises(MicError) as error:
                await holder.task
            assert error.value.message == "cannot serve a: its start failed: no such runtime"
            assert not isinstance(error.value, Unserviceable)
            assert engine.boxes == {}

    run(body)


def test_a_file_that_comes_during_a_round_takes_nothing_away_by_the_word_on_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            await rig.states(rig.holder("1"), are="ready")
            confirmed, state = rig.desired.config.hash, rig.desired.state
            rig.converger.removal_confirmed = lambda asked: asked == confirmed

            def comes(*given: Any) -> DesiredState:
                found: DesiredState = state(*given)
                if rig.desired.config.hash == confirmed:
                    rig.says("{0: fleet}", MODELS.replace("a:", "c:"))
                return found

            monkeypatch.setattr(rig.desired, "state", comes)
            await rig.until(lambda: rig.desired.config.hash != confirmed)
            await asyncio.sleep(SHORT)
            assert [one.ending for one in rig.desk.claims] == [None]
            assert rig.engine.running() == ["a-aaaaaaaa"]

    run(body)


def test_the_file_takes_a_gpu_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet, 1: b}") as rig:
            holder = rig.holder("1")
            await rig.states(holder, are="ready")
            rig.says("{0: b, 1: fleet}")
            await rig.until(lambda: holder.instance == "a-bbbbbbbb" and holder.state == "ready")
            await rig.until(lambda: rig.engine.running() == ["a-bbbbbbbb", "b-aaaaaaaa"])
            rig.says("{0: b, 1: none}")
            with pytest.raises(Unserviceable, match="the file hands no GPU over"):
                await holder.task

    run(body)


def test_what_the_file_has_is_no_claims_and_goes_with_no_claim(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet, 1: a}") as rig:
            holder = rig.holder("1")
            await rig.states(holder, are="ready")
            await rig.until(lambda: rig.engine.running() == ["a-aaaaaaaa", "a-bbbbbbbb"])
            origins = {
                box.identity.instance: box.identity.origin for box in rig.engine.boxes.values()
            }
            assert origins == {"a-aaaaaaaa": "claim", "a-bbbbbbbb": "file"}
            await holder.release()
            assert rig.engine.running() == ["a-bbbbbbbb"]

    run(body)


def test_a_gpu_that_is_paused_is_claimed_last(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet, 1: fleet}") as rig:
            rig.converger.pause(Selection(gpus=frozenset({b.uuid(0)})), "a new riser")
            holder = rig.holder("1")
            await rig.states(holder, are="ready")
            assert holder.instance == "a-bbbbbbbb"

    run(body)


def test_a_drained_host_ends_claims(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, "{0: fleet}") as rig:
            holder, waiting = rig.holder("1"), None
            await rig.states(holder, are="ready")
            waiting = rig.holder("2")
            await rig.states(waiting, are="waiting")
            rig.converger.drain(Drained(time.time(), "a new riser"))
            for one in (waiting, holder):
                with pytest.raises(MicError, match="the host is drained since"):
                    await one.task
            assert rig.engine.running() == []

    run(body)
