"""A converger on runtimes in memory, and everything around it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from mic_supervisor.backends import BackendBase
from mic_supervisor.clocks import Clock
from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.loop import Converger
from mic_supervisor.converge.observe import Sources
from mic_supervisor.errors import MicError, RuntimeRefused
from mic_supervisor.model import (
    DesiredState,
    EngineCheck,
    GpuInventory,
    Instance,
    Launch,
    ObservedWorkload,
    Probe,
    Probes,
    RunState,
    RuntimeView,
)
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.status import InstanceStatus
from tests.unit.plan import builders as b

HEALTH = Probes(*[Probe(EngineCheck(), period=0.05)] * 3)
TIMEOUT = 20.0  # seconds that a test waits for what must happen
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
        self.unreadable: str | None = None  # why, where it is

    def _asked(self, what: str, instance: str) -> None:
        text = f"{what} {instance}"
        self.calls.append(text)
        if (gate := self.gates.get(text)) is not None:
            gate.wait(TIMEOUT)
        if (error := self.refuses.get(text)) is not None:
            raise error

    def observe(self) -> RuntimeView:
        self.looks += 1
        if (gate := self.gates.get("observe")) is not None:
            gate.wait(TIMEOUT)
        if self.unreadable is not None:
            return RuntimeView(self.name, error=self.unreadable)
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
    def __init__(self) -> None:
        self.count = 4

    def observe(self) -> GpuInventory:
        return GpuInventory("simulated", b.gpus(self.count, simulated=True))

    def close(self) -> None:
        return None


class Rig:
    """A converger in a task, and everything around it."""

    def __init__(
        self, file: File, *engines: Engine, save: Callable[[Memory], None] | None = None
    ) -> None:
        self.file, self.engine, self.gpus = file, engines[0], Gpus()
        self.told: list[Event] = []
        self.events = Events([self.told.append])
        self.saved: list[Memory] = []
        self.later = 0.0  # seconds by which the clock is ahead
        self.converger = Converger(
            sources=Sources(self.gpus, {engine.name: engine for engine in engines}, lambda: ()),
            desired=file,
            context=b.CONTEXT,
            memory=Memory(),
            save=save or self.saved.append,
            events=self.events,
            clock=Clock(lambda: time.monotonic() + self.later),
        )
        self.converger.resync = 0.1

    def says(self, *instances: Instance) -> None:
        """What the file asks for from now on."""
        self.file.says(*instances)
        self.converger.wake()

    async def until(self, enough: Callable[[], Any]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not enough():
            assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {self.engine.calls}"
            await asyncio.sleep(0.01)

    async def phases(self, **wanted: str) -> None:
        """Until these instances, `_` for `-`, are in these phases."""
        await self.until(
            lambda: {name: self.phase(name.replace("_", "-")) for name in wanted} == wanted
        )

    def phase(self, instance: str) -> str | None:
        found = self._rows(instance)
        return found[0].phase.value if found else None

    def row(self, instance: str) -> InstanceStatus:
        """As it is shown; before the first round, as nothing is known of it."""
        nothing = InstanceStatus(
            instance, "", "", "", (), Phase.PENDING, "unknown", "unknown", None
        )
        return next(iter(self._rows(instance)), nothing)

    def _rows(self, instance: str) -> list[InstanceStatus]:
        snapshot = self.converger.snapshot
        return [row for row in snapshot.statuses if row.id == instance] if snapshot else []

    def tells(self, kind: str, instance: str) -> list[str]:
        return [e.text for e in self.told if e.kind == kind and e.instance == instance]


@asynccontextmanager
async def converging(
    file: File, *engines: Engine, save: Callable[[Memory], None] | None = None
) -> AsyncIterator[Rig]:
    rig = Rig(file, *(engines or (Engine(),)), save=save)
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
        await rig.converger.close(timeout=0.2)


@asynccontextmanager
async def replacing(engine: Engine, newer: Instance, *held: str) -> AsyncIterator[Rig]:
    """A is ready, and the file asks for `newer` in its place. The calls `held` wait at a gate."""
    async with converging(File(A), engine) as rig:
        await rig.phases(a_aaaaaaaa="ready")
        engine.gates |= {call: threading.Event() for call in held}
        rig.says(newer)
        yield rig


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


def on(model: str, *indices: int, **values: Any) -> Instance:
    return b.on(model, *indices, **{"probes": HEALTH, **values})


A, B = on("a", 0), on("b", 1)
