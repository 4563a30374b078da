"""What is on disk when a step begins: the supervisor may be killed in the middle of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mic_supervisor.clocks import Clock
from mic_supervisor.converge.events import Events
from mic_supervisor.converge.loop import Converger, Lane
from mic_supervisor.converge.observe import Sources
from mic_supervisor.errors import MicError, RuntimeRefused
from mic_supervisor.plan.actions import Change, Remove, Restart, Step, Stop
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.words import Code, because
from tests.unit.plan.builders import (
    CONTEXT,
    MAM,
    NEW,
    assessment,
    workload,
)

RUNS = workload(MAM)

LANE = Lane(frozenset({MAM.id}), frozenset(MAM.gpus))


class Runtime:
    """Calls `begins` when a step comes to it, and fails with `error` if there is one."""

    def __init__(self, begins: Callable[[], None], error: MicError | None = None) -> None:
        self._begins = begins
        self._error = error

    def _act(self, *_: object, **__: object) -> None:
        self._begins()
        if self._error is not None:
            raise self._error

    observe = stop = restart = remove = _act


def converger(runtime: Runtime, memory: Memory, saved: list[Memory]) -> Converger:
    gpus: Any = SimpleNamespace(observe=lambda: None)
    docker: Any = runtime
    desired: Any = SimpleNamespace(backend=lambda name: name)
    return Converger(
        sources=Sources(gpus, {"docker": docker}, lambda: ()),
        desired=desired,
        context=CONTEXT,
        memory=memory,
        save=saved.append,
        events=Events(),
        clock=Clock(lambda: 1000.0),
    )


def change(*steps: Step) -> Change:
    why = because(Code.ASKED_FOR)
    return Change("replace", MAM.id, "MAM", "container", MAM.gpus, "lane", why, steps=steps)


@pytest.mark.parametrize(
    "step", [Stop("stop", MAM.id, RUNS, "SIGTERM", 1.0), Restart("restart", MAM.id, RUNS)]
)
def test_that_an_end_is_asked_for_is_on_disk_before_it_is(step: Step) -> None:
    """Or the next supervisor takes it for a crash, and gives the specification up."""
    saved: list[Memory] = []
    on_disk: list[str | None] = []
    runtime = Runtime(lambda: on_disk.append(saved[-1].of(MAM.id).started))

    async def run() -> None:
        loop = converger(runtime, Memory({MAM.id: InstanceMemory(started=RUNS.name)}), saved)
        await loop._step(step, change(step), LANE)
        await loop.close()

    asyncio.run(run())
    assert on_disk == [None]


def test_a_remove_that_finds_it_running_is_no_failure_of_what_is_to_run() -> None:
    remove = Remove("remove", MAM.id, RUNS)
    runtime = Runtime(lambda: None, RuntimeRefused("cannot remove: it still runs"))
    entry = InstanceMemory(ready="earlier", ready_workload=RUNS.name)

    async def run() -> Memory:
        loop = converger(runtime, Memory({MAM.id: entry}), [])
        loop._assessments = {MAM.id: assessment(NEW, RUNS)}
        await loop._execute([change(remove)], LANE)
        await loop.close()
        return loop.memory

    assert replace(asyncio.run(run()).of(MAM.id), cooldown=None) == entry
