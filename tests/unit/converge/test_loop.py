"""The loop on runtimes in memory: what it carries out, side by side, and what it leaves alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor.backends import BackendBase
from mic_supervisor.clocks import Clock
from mic_supervisor.converge import observe
from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.loop import Converger
from mic_supervisor.converge.observe import Sources
from mic_supervisor.errors import MicError, RuntimeRefused, RuntimeUnavailable
from mic_supervisor.model import (
    DesiredState,
    EngineCheck,
    GpuInventory,
    Instance,
    Launch,
    LoadState,
    ObservedWorkload,
    Placement,
    PlacementState,
    Probe,
    Probes,
    RunState,
    RuntimeView,
)
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.selection import Selection
from tests.unit.plan import builders as b

HEALTH = Probes(*[Probe(EngineCheck(), period=0.05)] * 3)
PATIENCE = 20.0  # seconds that a test waits for what must happen
SHORT = 0.3  # seconds in which what must not happen would have


class Engine:
    """Containers in memory. `calls` is what was asked of it, "start mic-test-a-…" and so on.

    `gates` hold a call back until they are set, `refuses` has it fail; both by the call's text up
    to the name's digest: "start a-aaaaaaaa".
    """

    creates_ahead = True

    def __init__(self, name: str = "docker") -> None:
        self.name = name
        self.boxes: dict[str, ObservedWorkload] = {}
        self.calls: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.refuses: dict[str, MicError] = {}
        self.looks = 0

    def _asked(self, what: str, instance: str) -> None:
        text = f"{what} {instance}"
        self.calls.append(text)
        if (gate := self.gates.get(text)) is not None:
            gate.wait(PATIENCE)
        if (error := self.refuses.get(text)) is not None:
            raise error

    def observe(self) -> RuntimeView:
        self.looks += 1
        if (gate := self.gates.get("observe")) is not None:
            gate.wait(PATIENCE)
        return RuntimeView(self.name, tuple(self.boxes.values()))

    def prepare(self, launch: Launch, progress: Callable[[str], None]) -> None:
        self._asked("prepare", launch.identity.instance)

    def create(self, launch: Launch) -> None:
        self._asked("create", launch.identity.instance)
        self.boxes[launch.name] = ObservedWorkload(
            self.name, launch.name, f"ref of {launch.name}", launch.identity, RunState.CREATED
        )

    def start(self, launch: Launch) -> None:
        self._asked("start", launch.identity.instance)
        self._run(launch.name)

    def restart(self, workload: ObservedWorkload) -> None:
        self._asked("restart", workload.identity.instance)
        self._run(workload.name)

    def _run(self, name: str) -> None:
        box = self.boxes[name]
        self.boxes[name] = replace(box, state=RunState.RUNNING, pid=7, engine_health="healthy")

    def stop(self, workload: ObservedWorkload, *, signal: str, grace: float) -> None:
        self._asked("stop", workload.identity.instance)
        self.ends(workload.name, 0)

    def remove(self, workload: ObservedWorkload) -> None:
        self._asked("remove", workload.identity.instance)
        self.boxes.pop(workload.name, None)

    def ends(self, name: str, code: int) -> None:
        self.boxes[name] = replace(self.boxes[name], state=RunState.EXITED, exit_code=code)

    def name_of(self, instance: str) -> str:
        (name,) = (n for n, box in self.boxes.items() if box.identity.instance == instance)
        return name

    def running(self) -> list[str]:
        alive = (box for box in self.boxes.values() if box.state is RunState.RUNNING)
        return sorted(box.identity.instance for box in alive)

    def run_check(self, *_: object) -> tuple[int, str]:
        raise RuntimeRefused("no command can be run here")

    def logs(self, *_: object, **__: object) -> Iterator[str]:
        return iter(())

    previous_logs = logs

    def events(self, stop: threading.Event) -> Iterator[str]:
        return iter(())


class File:
    """Desired state that a test sets."""

    def __init__(self, *instances: Instance, **values: Any) -> None:
        self.says(*instances, **values)

    def says(self, *instances: Instance, **values: Any) -> None:
        self.desired: DesiredState = b.desired(*instances, **values)

    def state(self, inventory: GpuInventory, bindings: Mapping[str, str]) -> DesiredState:
        return self.desired

    def backend(self, name: str) -> Any:
        return BackendBase()


class Gpus:
    def observe(self) -> GpuInventory:
        return GpuInventory("simulated", b.gpus(4, simulated=True))

    def close(self) -> None:
        return None


class Rig:
    """A converger in a task, and everything around it."""

    def __init__(self, file: File, *engines: Engine) -> None:
        self.file, self.engine = file, engines[0]
        self.told: list[Event] = []
        self.saved: list[Memory] = []
        self.later = 0.0  # seconds by which the clock is ahead
        self.converger = Converger(
            sources=Sources(Gpus(), {engine.name: engine for engine in engines}, lambda: ()),
            desired=file,
            context=b.CONTEXT,
            memory=Memory(),
            save=self.saved.append,
            events=Events([self.told.append]),
            clock=Clock(lambda: time.monotonic() + self.later),
        )
        self.converger.resync = 0.1

    async def until(self, enough: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not enough():
            assert time.monotonic() < deadline, f"not within {PATIENCE} s: {self.engine.calls}"
            await asyncio.sleep(0.01)

    async def phases(self, **wanted: str) -> None:
        """Until these instances, `_` for `-`, are in these phases."""
        await self.until(
            lambda: {name: self.phase(name.replace("_", "-")) for name in wanted} == wanted
        )

    def phase(self, instance: str) -> str | None:
        snapshot = self.converger.snapshot
        rows = snapshot.statuses if snapshot is not None else ()
        return next((row.phase.value for row in rows if row.id == instance), None)

    def tells(self, kind: str, instance: str) -> list[str]:
        return [e.text for e in self.told if e.kind == kind and e.instance == instance]


@asynccontextmanager
async def converging(file: File, *engines: Engine) -> AsyncIterator[Rig]:
    rig = Rig(file, *(engines or (Engine(),)))
    rig.converger.act()
    task = asyncio.create_task(rig.converger.run())
    try:
        yield rig
        assert not task.done(), "the loop has ended"
    finally:
        task.cancel()
        for engine in engines:
            for gate in engine.gates.values():
                gate.set()
        await rig.converger.close(patience=0.2)


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


def on(model: str, *indices: int, **values: Any) -> Instance:
    return b.on(model, *indices, **{"probes": HEALTH, **values})


A, B = on("a", 0), on("b", 1)


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
            file.says(A, B)
            rig.converger.wake()
            await rig.phases(a_aaaaaaaa="ready", b_bbbbbbbb="ready")
        stopped = engine.calls.index(f"stop {both.id}")
        assert engine.calls.index(f"start {A.id}") > stopped
        assert engine.calls.index(f"start {B.id}") > stopped
        # What can fail early was tried before anything was stopped.
        assert engine.calls.index(f"prepare {A.id}") < stopped
        assert engine.calls.index(f"prepare {B.id}") < stopped

    run(body)


def test_a_pause_while_it_prepares_leaves_what_runs() -> None:
    newer = on("a", 0, workload=b.container("mam:2"))

    async def body() -> None:
        engine = Engine()
        file = File(A)
        async with converging(file, engine) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            gate = engine.gates[f"create {A.id}"] = threading.Event()
            file.says(newer)
            rig.converger.wake()
            await rig.until(lambda: engine.calls.count(f"create {A.id}") == 2)
            rig.converger.pause(Selection(models=frozenset({"a"})), None)
            gate.set()
            await rig.until(
                lambda: "paused before anything was stopped for it" in rig.tells("progress", A.id)
            )
            assert f"stop {A.id}" not in engine.calls
            assert engine.running() == [A.id]

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
            file.says(B)
            rig.converger.wake()
            await rig.until(lambda: A.id not in rig.converger.memory.instances)
            assert engine.running() == [B.id]

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
        await rig.converger.close(patience=0.2)
        assert time.monotonic() - began < PATIENCE
        gate.set()

    run(body)


# --- models inside servers ----------------------------------------------------------------------


class Loader(BackendBase):
    """Its server answers a load at once, or never; what it says of a model is what was loaded."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.loaded: set[str] = set()
        self.hangs: set[str] = set()
        self.gate = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        verb, model = head.split()[1].split("/")[1:3]
        if verb == "load":
            self.asked.append(model)
            if model in self.hangs:
                await self.gate.wait()
            self.loaded.add(model)
        status = 200 if model in self.loaded else 404
        writer.write(f"HTTP/1.1 {status} \r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()

    def placement_state(self, item: Placement, status: int | None, body: str) -> PlacementState:
        if status == 200:
            return PlacementState(item.model, LoadState.LOADED, digest=item.digest)
        return PlacementState(item.model, LoadState.ABSENT)


@asynccontextmanager
async def loading(backend: Loader, *models: str) -> AsyncIterator[Rig]:
    """A converger with one server, which these models are to be loaded into."""
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0)
    port = int(server.sockets[0].getsockname()[1])
    places = tuple(b.placement(name, 0) for name in models)
    spec = b.container(ports=(replace(b.HTTP, host=port),))
    file = File(on("s", 0, workload=spec, placements=places, shared=True))
    file.backend = lambda name: backend  # type: ignore[method-assign]
    try:
        async with converging(file) as rig:
            yield rig
    finally:
        backend.gate.set()
        server.close()


def test_a_load_that_hangs_holds_up_no_other_and_is_not_asked_for_twice() -> None:
    async def body() -> None:
        backend = Loader()
        backend.hangs = {"slow"}
        async with loading(backend, "slow", "quick", "other") as rig:
            await rig.until(lambda: {"quick", "other"} <= backend.loaded)
            looks = rig.engine.looks
            await rig.until(lambda: rig.engine.looks > looks + 3)
            assert backend.asked.count("slow") == 1
            assert "slow" not in backend.loaded
            backend.gate.set()
            await rig.until(lambda: rig.phase("s-aaaaaaaa") == "ready")
            assert sorted(backend.asked) == ["other", "quick", "slow"]

    run(body)


def test_closing_waits_for_no_load_that_hangs() -> None:
    async def body() -> None:
        backend = Loader()
        backend.hangs = {"slow"}
        async with loading(backend, "slow") as rig:
            await rig.until(lambda: backend.asked)
            began = time.monotonic()
            await rig.converger.close(patience=0.2)
            assert time.monotonic() - began < 3.0
            assert rig.tells("failed", "s-aaaaaaaa") == []

    run(body)
