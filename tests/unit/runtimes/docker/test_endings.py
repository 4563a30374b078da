"""What is known of a death before the engine has written it down."""

from __future__ import annotations

import threading

from mic_supervisor.model import Identity, ObservedWorkload, RunState
from mic_supervisor.runtimes.docker.endings import Endings, as_ended
from tests.support.waiting import until


class Engine:
    """Settles when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.done = threading.Event()

    def settle(self, ref: str) -> None:
        self.asked.append(ref)
        self.done.wait(10)


def workload(state: RunState = RunState.RUNNING, ref: str = "c1") -> ObservedWorkload:
    identity = Identity(
        scope="s", host="h", instance="a", model="a", backend="container",
        gpus=("GPU-1",), ports={"http": 20000}, spec={}, spec_hash="x",
    )  # fmt: skip
    return ObservedWorkload("docker", "a", ref, identity, state, address="172.17.0.2")


def test_what_has_ended_is_told_until_the_engine_knows() -> None:
    engine = Engine()
    endings = Endings(engine.settle)
    endings.ended("c1", 137)
    assert endings.now() == {"c1": 137}
    engine.done.set()
    until(lambda: endings.now() == {}, "the end of it")
    assert engine.asked == ["c1"]


def test_a_list_that_began_before_stays_as_it_was() -> None:
    engine = Engine()
    endings = Endings(engine.settle)
    endings.ended("c1", 1)
    before = endings.now()
    engine.done.set()
    until(lambda: endings.now() == {}, "the end of it")
    assert before == {"c1": 1}


def test_our_own_start_ends_it() -> None:
    endings = Endings(Engine().settle)
    endings.ended("c1", 137)
    endings.starting("c1")
    assert endings.now() == {"c1": 137}  # the start waits for the engine
    endings.runs("c1")
    assert endings.now() == {}


def test_a_death_read_after_our_start_is_of_the_run_before() -> None:
    engine = Engine()
    engine.done.set()
    endings = Endings(engine.settle)
    endings.starting("c1")
    endings.runs("c1")
    endings.ended("c1", 137)
    assert (endings.now(), engine.asked) == ({}, ["c1"])
    endings.started("c1")
    engine.done.clear()
    endings.ended("c1", 137)  # and this one is of the run that we started
    assert endings.now() == {"c1": 137}
    engine.done.set()


def test_a_start_that_was_refused_leaves_nothing() -> None:
    endings = Endings(Engine().settle)
    endings.starting("c1")
    endings.refused("c1")
    endings.ended("c1", None)
    assert endings.now() == {"c1": None}


def test_a_start_by_somebody_else_ends_it() -> None:
    endings = Endings(Engine().settle)
    endings.ended("c1", 0)
    endings.started("c1")
    assert endings.now() == {}


def test_only_what_is_listed_as_running_is_corrected() -> None:
    running, exited = workload(), workload(RunState.EXITED)
    other = workload(ref="c2")
    found = as_ended([running, exited, other], {"c1": 137})
    assert (found[1], found[2]) == (exited, other)
    corrected = found[0]
    assert (corrected.state, corrected.exit_code) == (RunState.EXITED, 137)
    assert corrected.closing  # its ports are not free yet, and no stranger's either
    assert as_ended([running], {}) == (running,)
