"""Draining asks the server itself until it is idle, gone, out of time, or nobody cares any more."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor.backends import BackendBase
from mic_supervisor.converge.apply import Steps
from mic_supervisor.converge.http_calls import Answer, HttpCalls, NoAnswer
from mic_supervisor.converge.observe import Sources
from mic_supervisor.converge.probes import Checker
from mic_supervisor.errors import CompileError, MicError, StopFailed
from mic_supervisor.gpu.source import NoSource
from mic_supervisor.model import HttpCall
from mic_supervisor.plan.actions import Drain
from tests.unit.converge.probed import SILENCE, Server
from tests.unit.plan.builders import on, program, workload

BUSY, IDLE = {"left": 1}, {"left": 0}


class Counting(BackendBase):
    name = "counting"

    def is_drained(self, status: int, body: str) -> bool:
        return status == 200 and bool(json.loads(body)["left"] == 0)


class Baffled(Counting):
    """Cannot read the first answer."""

    def is_drained(self, status: int, body: str) -> bool:
        if "left" not in json.loads(body):
            raise MicError("backend counting cannot tell whether it is drained: KeyError: 'left'")
        return super().is_drained(status, body)


class Scripted(Server):
    """Answers with one of `script` after the other, and for ever with the last."""

    def __init__(self) -> None:
        self.script: list[Any] = [IDLE]
        super().__init__()

    def answer(self, path: str) -> object:
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if not callable(said):
            return said
        said()
        return SILENCE


@pytest.fixture
def server() -> Iterator[Scripted]:
    with closing(Scripted()) as made:
        yield made


def run(
    step: Drain,
    emit: Callable[[str], None] = lambda _: None,
    *,
    backend: Callable[[str], Any] = lambda _: Counting(),
    ends_after: float | None = None,
) -> None:
    """Drain, on a supervisor that perhaps ends so many seconds after the beginning."""

    async def drained() -> None:
        with ThreadPoolExecutor(4) as pool:
            sources = Sources(NoSource(), {}, lambda: ())
            steps = Steps(sources, lambda _: pytest.fail("asked"), backend, Checker(pool))
            if ends_after is not None:
                asyncio.get_running_loop().call_later(ends_after, steps.end)
            await steps.run(step, emit)

    asyncio.run(drained())


def drain(
    port: int, *, timeout: float = 60.0, answer: float = 20.0, listen: str = "127.0.0.1"
) -> Drain:
    """`answer` is how long the server has for one."""
    runs = workload(on("face", 0, workload=program()), ports={"http": port})
    call = HttpCall("GET", "/prompt", timeout=answer)
    return Drain("drain face", "face", runs, call, timeout, listen)


def test_it_asks_until_there_is_nothing_left(server: Scripted) -> None:
    server.script = [BUSY, BUSY, IDLE]
    told: list[str] = []
    run(drain(server.port), told.append)
    assert server.asked == ["/prompt"] * 3
    assert told == ["draining"]


def test_it_reaches_who_listens_everywhere(server: Scripted) -> None:
    run(drain(server.port, listen="0.0.0.0"))
    assert server.asked == ["/prompt"]


def test_it_gives_up_in_time_and_says_so(server: Scripted) -> None:
    server.script = [BUSY]
    told: list[str] = []
    began = time.monotonic()
    run(drain(server.port, timeout=0.6), told.append)
    assert 0.6 <= time.monotonic() - began < 8
    assert told == ["draining", "still busy after 0.6 s; stopping it anyway"]


def test_who_is_gone_is_not_waited_for() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    run(drain(port))
    assert time.monotonic() - began < 8


def test_an_answer_that_the_backend_cannot_read_is_no_idleness(server: Scripted) -> None:
    server.script = [{}, {}, BUSY, IDLE]
    told: list[str] = []
    run(drain(server.port), told.append, backend=lambda _: Baffled())
    assert len(server.asked) == 4
    assert told == [
        "draining",
        "backend counting cannot tell whether it is drained: KeyError: 'left'; waiting",
    ]


def test_one_answer_that_is_missing_is_no_idleness(server: Scripted) -> None:
    server.script = [lambda: time.sleep(1.5), BUSY, IDLE]
    run(drain(server.port, answer=1.0))
    assert len(server.asked) == 3


@pytest.mark.slow
def test_three_of_them_are_enough(server: Scripted) -> None:
    server.script = [lambda: time.sleep(1.5)]
    run(drain(server.port, answer=1.0))
    assert len(server.asked) == 3


@pytest.mark.slow
def test_what_this_end_lacks_is_no_silence_of_the_server(
    monkeypatch: pytest.MonkeyPatch, server: Scripted
) -> None:
    server.script = [BUSY, IDLE]
    lacks = [True] * 4
    ask = HttpCalls.ask

    async def lacking(calls: HttpCalls, *args: Any, **kwargs: Any) -> Answer:
        if lacks:
            lacks.pop()
            raise NoAnswer("this machine has no connection to give", own=True)
        return await ask(calls, *args, **kwargs)

    monkeypatch.setattr(HttpCalls, "ask", lacking)
    run(drain(server.port))
    assert len(server.asked) == 2


def test_the_end_of_the_supervisor_stops_nothing(server: Scripted) -> None:
    server.script = [BUSY]
    began = time.monotonic()
    with pytest.raises(StopFailed, match="it was still being drained when this supervisor ended"):
        run(drain(server.port), ends_after=0.3)
    assert time.monotonic() - began < 8


def test_a_backend_that_is_gone_keeps_nothing_alive(server: Scripted) -> None:
    def gone(name: str) -> Any:
        raise CompileError(f"backend {name} is no longer installed")

    told: list[str] = []
    run(drain(server.port), told.append, backend=gone)
    assert told == [
        "it cannot be drained (backend process is no longer installed); stopping it anyway"
    ]
    assert server.asked == []


def test_nor_does_a_record_without_a_port(server: Scripted) -> None:
    step = drain(server.port)
    identity = replace(step.workload.identity, ports={})
    told: list[str] = []
    run(replace(step, workload=replace(step.workload, identity=identity)), told.append)
    assert told == ["it cannot be drained ('http'); stopping it anyway"]
