"""Which of five servers hangs, and how many requests it takes to know."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from mic_supervisor.converge.http_calls import Answer, NoAnswer
from mic_supervisor.converge.requests import Requests, Verdict, counted
from mic_supervisor.converge.tasks import end
from mic_supervisor.model import HttpCall, Progress, WarmUp

CALL = HttpCall("POST", "/infer", "{}", 120.0)
MOVES = Progress("requests_total", CALL, within=120.0)
WARM = WarmUp(CALL, 3)
PERIOD = 5.0  # seconds between two looks
FINE = (True, "it makes progress")

LOOP = asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def close_the_loop() -> Iterator[None]:
    yield
    LOOP.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def to_the_end() -> None:
        await work
        await end(asyncio.all_tasks() - {asyncio.current_task()})

    LOOP.run_until_complete(to_the_end())


@dataclass
class Server:
    """One that is looked at every five seconds. Each request of ours takes `takes` seconds; None:
    it is never answered, and given up when its time is over.
    """

    takes: float | None = 0.0
    status: int = 200
    counts: bool = True  # whether an answered request of ours is counted
    value: float | None = 0.0
    fault: str = ""
    now: float = 1000.0
    sent: list[float] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self.requests = Requests(self.send)
        self.verdicts: list[Verdict | None] = []

    async def send(self, call: HttpCall) -> Answer:
        began = self.now
        self.sent.append(began)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            takes = call.timeout if self.takes is None else self.takes
            while self.now < began + takes:
                await asyncio.sleep(0)
            if self.takes is None or self.takes >= call.timeout:
                raise NoAnswer(f"no answer within {call.timeout:g} s")
            if self.counts and self.status == 200:
                self.value = (self.value or 0.0) + 1
            return Answer(self.status, "")
        finally:
            self.under_way -= 1

    async def look(self, what: Progress = MOVES) -> Verdict | None:
        for _ in range(3):  # what is on its way gets its turn
            await asyncio.sleep(0)
        found = self.requests.progress(what, self.value, self.fault, self.now)
        self.verdicts.append(found)
        self.now += PERIOD
        return found

    async def looks(self, seconds: float, works: Callable[[], bool] = lambda: False) -> None:
        end = self.now + seconds
        while self.now < end:
            if works():
                self.value = (self.value or 0.0) + 1
            await self.look()


def test_one_that_is_busy_is_never_asked() -> None:
    async def go() -> None:
        server = Server(takes=None)
        await server.looks(3600.0, lambda: True)
        assert {*server.verdicts} == {FINE}
        assert server.sent == []

    run(go())


def test_one_that_is_idle_answers_one_request_at_a_time_and_is_well() -> None:
    async def go() -> None:
        server = Server()
        await server.looks(1200.0)
        assert {*server.verdicts} == {FINE}
        spaces = [b - a for a, b in zip(server.sent, server.sent[1:], strict=False)]
        assert 7 <= len(server.sent) <= 10 and min(spaces) >= MOVES.within
        assert server.most == 1

    run(go())


def test_one_that_is_slow_is_waited_for() -> None:
    async def go() -> None:
        server = Server(takes=110.0)
        await server.looks(1200.0)
        assert {*server.verdicts} == {FINE}
        assert server.most == 1

    run(go())


def test_one_that_hangs_is_found_within_twice_the_time_and_stays_found() -> None:
    async def go() -> None:
        server = Server()
        await server.looks(600.0, lambda: True)
        hangs_since, server.takes = server.now, None
        server.verdicts.clear()
        await server.looks(1200.0)
        index = next(number for number, found in enumerate(server.verdicts) if found != FINE)
        assert 2 * MOVES.within <= index * PERIOD <= 2 * MOVES.within + 3 * PERIOD
        assert {*server.verdicts[index:]} == {
            (
                False,
                "it hangs: requests_total has not moved for 120 s, and POST /infer: "
                "no answer within 120 s",
            )
        }
        assert server.most == 1
        assert server.sent[0] >= hangs_since + MOVES.within - 2 * PERIOD

    run(go())


def test_one_that_comes_back_is_well_again() -> None:
    async def go() -> None:
        server = Server(takes=None)
        await server.looks(400.0)
        assert (await server.look() or FINE)[0] is False
        server.value = 1.0
        assert await server.look() == FINE
        server.takes = None
        await server.looks(400.0)
        assert (await server.look() or FINE)[0] is False
        server.takes = 0.0  # nobody but us asks it
        await server.looks(2 * MOVES.within + 3 * PERIOD)
        assert await server.look() == FINE

    run(go())


def test_the_request_is_given_up_once_others_are_answered() -> None:
    async def go() -> None:
        server = Server(takes=None)
        await server.looks(MOVES.within + 2 * PERIOD)
        assert server.under_way == 1
        server.value = 7.0
        assert await server.look() == FINE
        await asyncio.sleep(0)
        assert server.under_way == 0

    run(go())


@pytest.mark.parametrize(
    ("status", "ok", "words"),
    [
        (503, False, "requests_total has not moved for 120 s, and POST /infer answers 503"),
        (404, None, "answers 404: give `progress` a request that it accepts"),
        (401, None, "answers 401: give `progress` a request that it accepts"),
    ],
)
def test_an_answer_that_is_no_result(status: int, ok: bool | None, words: str) -> None:
    async def go() -> None:
        server = Server(status=status)
        await server.looks(MOVES.within + 3 * PERIOD)
        found = server.verdicts[-1]
        assert found is not None and found[0] is ok and found[1].endswith(words)

    run(go())


def test_what_this_machine_lacks_says_nothing() -> None:
    async def go() -> None:
        async def send(_call: HttpCall) -> Answer:
            raise NoAnswer("this machine has no connection to give", own=True)

        server = Server()
        server.requests = Requests(send)
        await server.looks(MOVES.within + 3 * PERIOD)
        found = server.verdicts[-1]
        assert found is not None and found[0] is None

    run(go())


def test_a_counter_that_begins_with_the_first_request_is_made_to_begin() -> None:
    """So are those with labels in many servers: nobody waits two minutes for them."""

    async def go() -> None:
        server = Server(value=None)
        await server.looks(4 * PERIOD)
        assert server.verdicts[0] is None
        assert server.verdicts[-1] == FINE
        assert len(server.sent) == 1

    run(go())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("", "GET /metrics shows no requests_total, although POST /infer answers 200"),
        ("GET /metrics answers 404", "GET /metrics answers 404"),
    ],
)
def test_a_counter_that_is_not_there_is_reported_and_restarts_nothing(
    fault: str, words: str
) -> None:
    async def go() -> None:
        server = Server(value=None, counts=False, fault=fault)
        await server.looks(4 * PERIOD)
        assert server.verdicts[-1] == (None, words)

    run(go())


def test_a_server_whose_metrics_are_silent_for_a_while_is_no_news() -> None:
    async def go() -> None:
        server = Server()
        await server.looks(60.0, lambda: True)
        server.value, server.fault = None, "GET /metrics: no answer within 3 s"
        await server.looks(60.0)
        server.value = 99.0
        await server.looks(60.0, lambda: True)
        assert {*server.verdicts} == {FINE}
        assert server.sent == []

    run(go())


def test_two_counters_never_ask_at_the_same_time() -> None:
    later = Progress("requests_total", CALL, within=125.0)

    async def go() -> None:
        server = Server(takes=None)
        found: set[bool | None] = set()
        for _ in range(300):
            await server.look()
            other = server.requests.progress(later, server.value, "", server.now)
            found |= {other[0]} if other is not None else set()
        assert server.most == 1
        assert False in found

    run(go())


def test_warming_up_takes_as_many_answers_as_it_says() -> None:
    async def go() -> None:
        server = Server(takes=7.0)
        said = []
        while (found := server.requests.warm_up(WARM))[0] is not True:
            said.append(found)
            server.now += PERIOD
            for _ in range(5):
                await asyncio.sleep(0)
        assert said[0] == (False, "warming up: 0 of 3 requests answered")
        assert (False, "warming up: 2 of 3 requests answered") in said
        assert (len(server.sent), server.most) == (3, 1)
        server.requests.warm_up(WARM)
        assert len(server.sent) == 3

    run(go())


def test_warming_up_goes_on_after_an_answer_that_is_none() -> None:
    async def go() -> None:
        server = Server(status=400)
        for _ in range(5):
            found = server.requests.warm_up(WARM)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert found == (
            False,
            "warming up: 0 of 3 requests answered; POST /infer answers 400",
        )
        server.status = 200
        for _ in range(9):
            found = server.requests.warm_up(WARM)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert found == (True, "it is warm")

    run(go())


def test_nothing_goes_on_after_the_end() -> None:
    async def go() -> None:
        server = Server(takes=None)
        server.requests.warm_up(WARM)
        await asyncio.sleep(0)
        assert server.under_way == 1
        server.requests.close()
        await asyncio.sleep(0)
        assert server.under_way == 0

    run(go())


TEXT = """\
# HELP requests_total Requests.
# TYPE requests_total counter
requests_total{model="a",text="} 9\\" {"} 3
requests_total{model="b"} 4.5 1700000000000
requests_total_created 17
requests 99
steps_count 1e3
plain 12 # {trace_id="x"} 1
odd NaN
wrong x
engine:tokens_count{engine="0"} 7
"""


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("requests_total", 7.5),
        ("steps_count", 1000.0),
        ("plain", 12.0),
        ("engine:tokens_count", 7.0),
        ("odd", None),
        ("wrong", None),
        ("request", None),
        ("tokens_count", None),
    ],
)
def test_a_counter_is_the_sum_over_its_labels(metric: str, value: float | None) -> None:
    assert counted(TEXT, metric) == value
