"""When probes are asked, and how soon at the earliest their failures lead to something."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from mic_supervisor.backends import BackendBase
from mic_supervisor.converge.prober import FIRST_PERIOD, Prober, Schedule
from mic_supervisor.converge.probes import ALL_DUE, DEVICES, DEVICES_AGAIN, Checker, Target
from mic_supervisor.model import (
    ExecCheck,
    Health,
    Instance,
    LoadState,
    ObservedWorkload,
    Placement,
    PlacementState,
    Probe,
    ProbeResult,
    Probes,
)
from mic_supervisor.plan.assess import Assessment
from tests.unit.converge.probed import TIMEOUT
from tests.unit.plan.builders import assessment, container, on, placement, program, workload

LIVE, READY, UP = (ExecCheck((name,)) for name in ("live", "ready", "up"))
ALL = Probes(startup=Probe(UP), liveness=Probe(LIVE), readiness=Probe(READY))
ONE = Probes(*(Probe(ExecCheck(("live",))),) * 3)
DEFAULTS = [(5.0, 3), (1.0, 1), (0.2, 5), (30.0, 2)]


class AtOnce(Executor):
    """What is handed to it has been done when `submit` returns."""

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


CHECKER = Checker(AtOnce())
LOOP = asyncio.new_event_loop()  # one for all looks: there are very many


@pytest.fixture(scope="module", autouse=True)
def close_the_loop() -> Iterator[None]:
    yield
    LOOP.close()


def look(
    target: Target, now: float, before: Health | None, due: Collection[str] = ALL_DUE
) -> Health:
    return LOOP.run_until_complete(CHECKER.probe(target, now, before, due))


class Loads(BackendBase):
    """Says of each model what it is told to."""

    name = "loads"

    def __init__(self, state: LoadState = LoadState.LOADING) -> None:
        self.state = state

    def placement_state(self, item: Placement, status: int | None, body: str) -> PlacementState:
        return PlacementState(item.model, self.state, digest=item.digest)


@dataclass
class Model:
    """A model that is asked at its own clock. `answers` says whether a probe passes at a time."""

    instance: Instance
    answers: dict[str, Callable[[float], bool]] = field(default_factory=dict)
    backend: Loads = field(default_factory=Loads)
    takes: float = 0.0  # seconds that one try takes
    now: float = 1000.0
    asked: dict[str, list[float]] = field(default_factory=dict)
    health: Health | None = None

    def __post_init__(self) -> None:
        self.workload = workload(self.instance, ports={"http": 1})
        self.target = Target(self.instance, self.workload, self.backend, self.execute)
        self.schedule = Schedule(self.now)

    def execute(
        self, _workload: ObservedWorkload, command: tuple[str, ...], _timeout: float
    ) -> tuple[int, str]:
        self.asked.setdefault(command[0], []).append(self.now)
        answer = self.answers.get(command[0], lambda _at: True)(self.now)
        self.now += self.takes
        if command[0] == "nvidia-smi":
            return (0, "GPU 0: H200") if answer else (255, "Failed to initialize NVML: Unknown")
        return (0 if answer else 1), ""

    def once(self) -> None:
        """One turn of the prober, and the wait after it."""
        kinds = self.schedule.due(self.target, self.now)
        self.health = look(self.target, self.now, self.health, kinds)
        self.schedule.asked(kinds, self.target, self.health, self.now)
        self.now += max(self.schedule.wait(self.target, self.now), 1e-6)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.once()

    def until(self, happened: Callable[[Assessment], object], *, kick: float = 0.0) -> float:
        """Seconds until then; with `kick` somebody asks again each time so many have passed."""
        began = self.now
        while self.now < began + 1000.0:
            kinds = self.schedule.due(self.target, self.now)
            at, before = self.now, self.health
            self.health = look(self.target, at, before, kinds)
            if self.health != before and happened(
                assessment(self.instance, self.workload, health=self.health)
            ):
                return at - began
            self.schedule.asked(kinds, self.target, self.health, self.now)
            wait = self.schedule.wait(self.target, self.now)
            if kick and kick < wait:
                self.schedule.hurry()
                wait = kick
            self.now += max(wait, 1e-6)
        raise AssertionError("it never happened")


def spaces(times: list[float]) -> list[float]:
    return [round(later - earlier, 3) for earlier, later in itertools.pairwise(times)]


def never(_at: float) -> bool:
    return False


# --- each kind at its own pace ------------------------------------------------------------------


def test_a_start_is_seen_early_and_asked_ever_more_slowly_down_to_its_period() -> None:
    model = Model(on("m", 0, workload=program(), probes=ALL), {"up": never})
    model.run(60.0)
    found = spaces(model.asked["up"])
    assert found[0] <= 2 * FIRST_PERIOD
    assert found == sorted(found)
    assert found[-1] == 5.0
    assert list(model.asked) == ["up"]  # it gates the others


def test_a_failing_readiness_hastens_nothing() -> None:
    model = Model(on("m", 0, workload=program(), probes=ALL), {"ready": never})
    model.run(60.0)
    assert {*spaces(model.asked["live"]), *spaces(model.asked["ready"])} == {5.0}


def test_models_that_load_are_asked_for_soon_and_liveness_is_not() -> None:
    item = on("m", 0, workload=program(), probes=ALL, placements=(placement("a", 0),))
    model = Model(item)
    states: list[float] = []
    model.backend.placement_state = (  # type: ignore[method-assign]
        lambda one, *_: (states.append(model.now), PlacementState(one.model, LoadState.LOADING))[1]
    )
    model.run(30.0)
    assert spaces(states)[0] <= 2 * FIRST_PERIOD
    assert spaces(states) == sorted(spaces(states))
    assert set(spaces(model.asked["live"])) == {5.0}
    assert set(spaces(model.asked["ready"])) == {5.0}


def test_kinds_with_periods_of_their_own_keep_them() -> None:
    probes = Probes(Probe(UP), Probe(LIVE, period=7.0), Probe(READY, period=2.0))
    model = Model(on("m", 0, workload=program(), probes=probes), {"ready": lambda at: at > 1020.0})
    model.run(60.0)
    assert set(spaces(model.asked["live"])) == {7.0}
    assert set(spaces(model.asked["ready"])) == {2.0}


def test_the_period_runs_from_the_end_of_one_try_to_the_next() -> None:
    model = Model(on("m", 0, workload=program(), probes=Probes(liveness=Probe(LIVE))), takes=2.0)
    model.run(40.0)
    assert set(spaces(model.asked["live"])) == {7.0}


def test_a_look_from_inside_is_dear_and_a_kick_does_not_hasten_it() -> None:
    item = on("m", 0, workload=container(devices=("GPU-0",)), probes=ALL)
    model = Model(item)
    for _ in range(400):
        model.once()
        model.schedule.hurry()
    seen = model.asked["nvidia-smi"]
    assert model.now < 1001.0 or set(spaces(seen)) == {60.0}
    model.run(200.0)
    assert set(spaces(model.asked["nvidia-smi"])) == {60.0}


# --- the least time until it acts ---------------------------------------------------------------


@pytest.mark.parametrize(("period", "failures"), DEFAULTS)
@pytest.mark.parametrize("probes", [ONE, ALL], ids=["one probe for all", "three probes"])
@pytest.mark.parametrize("kick", [0.0, 0.01, 0.7])
def test_failures_in_a_row_restart_no_earlier_than_their_periods(
    period: float, failures: int, probes: Probes, kick: float
) -> None:
    def paced(probe: Probe | None) -> Probe:
        assert probe is not None
        return replace(probe, period=period, failures=failures)

    probes = Probes(paced(probes.startup), paced(probes.liveness), paced(probes.readiness))
    model = Model(on("m", 0, workload=program(), probes=probes))
    model.run(3 * period)
    broken = model.now
    model.answers = {"live": never, "ready": never}
    took = model.until(lambda item: item.live_failure, kick=kick)
    least = period * (failures - 1)
    assert least - 1e-3 <= took <= least + period + 1e-3 + kick * failures
    assert model.now >= broken + took


def test_a_model_that_answers_in_between_is_not_restarted() -> None:
    turns = iter([False, False, True] * 100)
    model = Model(on("m", 0, workload=program(), probes=replace(ONE, startup=None)))
    model.answers = {"live": lambda _at: next(turns)}
    with pytest.raises(AssertionError, match="never"):
        try:
            model.until(lambda item: item.live_failure)
        except StopIteration:
            raise AssertionError("it never happened") from None


def test_what_cannot_be_told_neither_counts_nor_forgives() -> None:
    item = on("m", 0, workload=program(), probes=Probes(liveness=Probe(LIVE)))
    model = Model(item, {"live": never})
    model.once()
    unknown = replace(model.target, backend=Loads(), execute=_unable)
    assert model.health is not None
    before = model.health.liveness
    after = look(unknown, model.now, model.health).liveness
    assert before is not None
    assert after is not None
    assert (after.ok, after.failures) == (None, 1)
    assert after.counted_at == before.counted_at


def _unable(*_: object) -> tuple[int, str]:
    from mic_supervisor.errors import MicError

    raise MicError("the engine is gone")


@pytest.mark.parametrize(("period", "failures"), DEFAULTS)
@pytest.mark.parametrize("budget", [2.0, 300.0])
@pytest.mark.parametrize("kick", [0.0, 0.03])
def test_an_adopted_instance_is_not_overdue_before_its_failures_count(
    period: float, failures: int, budget: float, kick: float
) -> None:
    """It spent its budget long ago, and the daemon has just been restarted."""
    probes = replace(ALL, startup=Probe(UP, period=period, failures=failures))
    item = on("m", 0, workload=program(), probes=probes, start_timeout=budget)
    model = Model(item, {"up": never})
    took = model.until(lambda seen: seen.overdue(1.0, model.now), kick=kick)
    least = min(period, budget / failures) * (failures - 1)
    assert least - 1e-3 <= took <= least + 2 * period


@pytest.mark.parametrize(("period", "failures"), DEFAULTS)
@pytest.mark.parametrize("budget", [1.0, 12.0, 300.0])
def test_a_start_has_its_whole_budget_and_no_more(
    period: float, failures: int, budget: float
) -> None:
    probes = replace(ALL, startup=Probe(UP, period=period, failures=failures))
    item = on("m", 0, workload=program(), probes=probes, start_timeout=budget)
    model = Model(item, {"up": never})
    model.workload = replace(model.workload, running_since=model.now)
    took = model.until(lambda seen: seen.overdue(None, model.now))
    assert budget <= took <= budget + 2 * period


@pytest.mark.parametrize("kick", [0.0, 0.05])
def test_a_container_counts_as_blind_after_two_looks_that_are_apart(kick: float) -> None:
    item = on("m", 0, workload=container(devices=("GPU-0",)), probes=ALL)
    model = Model(item, {"nvidia-smi": never})
    model.until(lambda seen: seen.blind, kick=kick)
    first, *_, last = model.asked["nvidia-smi"]
    assert last - first >= DEVICES_AGAIN - 1e-3


def test_one_that_starts_slowly_is_looked_into_when_it_is_up() -> None:
    item = on("m", 0, workload=container(devices=("GPU-0",)), probes=ALL)
    model = Model(item, {"up": lambda at: at > 1030.0})
    model.run(40.0)
    assert model.asked["nvidia-smi"][0] - model.asked["live"][0] < 0.1
    assert model.health is not None
    assert model.health.devices is not None
    assert DEVICES not in model.schedule.due(model.target, model.now)


# --- the prober itself --------------------------------------------------------------------------


def asked_by_a_prober(model: Model, failures: int, *, kicks: bool) -> list[ProbeResult]:
    """What liveness was, each time that it changed, while a prober really asked until so many."""
    seen: list[ProbeResult] = []

    async def go() -> None:
        with ThreadPoolExecutor(4) as pool:

            def note() -> None:
                found = prober.health.get(model.workload.ref)
                if found is not None and found.liveness is not None:
                    seen.append(found.liveness)

            prober = Prober(Checker(pool), note, time.monotonic)
            prober.watch({model.workload.ref: model.target})
            async with asyncio.timeout(TIMEOUT):
                while not any(one.failures >= failures for one in seen):
                    await asyncio.sleep(0.02)
                    if kicks:
                        prober.kick(model.workload.ref)
                        await prober.probe_now(model.workload.ref)
                        note()
            await prober.close()

    asyncio.run(go())
    return seen


@pytest.mark.parametrize("kicks", [False, True])
def test_who_asks_more_often_hastens_nothing(kicks: bool) -> None:
    probes = Probes(liveness=Probe(LIVE, period=0.25, failures=3), readiness=Probe(READY))
    model = Model(on("m", 0, workload=program(), probes=probes), {"live": never, "ready": never})
    seen = asked_by_a_prober(model, 3, kicks=kicks)
    first: dict[int, float] = {}
    for one in seen:
        assert one.counted_at is not None
        first.setdefault(one.failures, one.counted_at)
    assert [*first] == [1, 2, 3]
    assert all(space >= 0.25 for space in spaces([*first.values()]))


def test_a_task_of_it_that_dies_is_started_again() -> None:
    model = Model(on("m", 0, workload=program(), probes=Probes(liveness=Probe(LIVE, period=0.05))))
    ref = model.workload.ref

    async def go() -> None:
        broken = [True]

        def wake() -> None:
            if broken.pop() if broken else False:
                raise ZeroDivisionError("a defect")

        with ThreadPoolExecutor(4) as pool:
            prober = Prober(Checker(pool), wake, time.monotonic)
            prober.watch({ref: model.target})
            async with asyncio.timeout(TIMEOUT):
                while broken:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            before = len(model.asked["live"])
            prober.watch({ref: model.target})
            async with asyncio.timeout(TIMEOUT):
                while len(model.asked["live"]) <= before + 1:
                    await asyncio.sleep(0.01)
            await prober.close()

    asyncio.run(go())
