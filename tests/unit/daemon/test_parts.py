"""Parts of the daemon that end, hang, or are deaf to a cancellation."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from mic_supervisor.converge import tasks
from mic_supervisor.daemon import parts
from mic_supervisor.daemon.parts import Parts, in_thread
from mic_supervisor.errors import MicError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_FIRST_DELAY", 0.02)
    monkeypatch.setattr(parts, "_PROVEN", 0.2)
    monkeypatch.setattr(tasks, "_AGAIN", 0.02)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    logger = logging.getLogger("mic")
    before, logger.propagate = logger.propagate, True
    yield lambda: caplog.text
    logger.propagate = before


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not true():
            await asyncio.sleep(0.01)


async def ends() -> None:
    await asyncio.sleep(0)


async def refuses() -> None:
    raise MicError("cannot go on: no")


async def breaks() -> None:
    raise ZeroDivisionError("a defect")


async def is_cancelled() -> None:
    raise asyncio.CancelledError


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("dies", "why"),
    [
        (ends, "it ended"),
        (refuses, "cannot go on: no"),
        (breaks, "“ZeroDivisionError: a defect”"),
        (is_cancelled, "it was cancelled"),
        (lambda: in_thread("t", lambda: 1 / 0 and None), "“ZeroDivisionError: division by zero”"),
        (lambda: in_thread("t", exit), "“RuntimeError: the thread t exited”"),
    ],
)
def test_one_that_ends_is_told_of_and_started_again(
    dies: Callable[[], Awaitable[None]], why: str, log: Callable[[], str]
) -> None:
    async def story() -> None:
        told: list[dict[str, str]] = []
        made = Parts(lambda: told.append(dict(made.down)))
        begun: list[int] = []

        async def part() -> None:
            begun.append(1)
            if len(begun) == 1:
                await dies()
            else:
                await asyncio.Event().wait()

        made.keep("the part", part)
        await until(lambda: made.down)
        assert made.down == {"the part": why}
        await until(lambda: len(begun) == 2)
        await until(lambda: not made.down)  # it lives for a while
        assert told == [{"the part": why}, {}]
        await made.stop()
        assert len(begun) == 2

    asyncio.run(story())
    assert f"the part is not alive: {why}; it is started again in 0.02 s" in log()
    assert ("Traceback" in log()) == ("Error" in why)


def test_one_that_dies_again_and_again_rests_longer_and_stays_down() -> None:
    async def story() -> None:
        made = Parts(lambda: None)
        begun: list[float] = []

        async def part() -> None:
            begun.append(time.monotonic())
            raise MicError("no")

        made.keep("p", part)
        await until(lambda: len(begun) >= 4)
        assert made.down == {"p": "no"}
        waits = [later - earlier for earlier, later in itertools.pairwise(begun)]
        assert all(wait >= least for wait, least in zip(waits, (0.02, 0.04, 0.08), strict=False))
        await made.stop()

    asyncio.run(story())


def test_a_lost_cancellation_is_sent_again(log: Callable[[], str]) -> None:
    async def story() -> None:
        made, swallowed = Parts(lambda: None), []

        async def part() -> None:
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    if len(swallowed) == 3:
                        raise
                    swallowed.append(1)

        made.keep("p", part)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await made.stop()
        assert len(swallowed) == 3

    asyncio.run(story())
    assert log() == ""


def test_one_that_takes_a_cancellation_for_its_end_is_not_started_again() -> None:
    async def story() -> None:
        made, begun = Parts(lambda: None), []

        async def part() -> None:
            begun.append(1)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return

        made.keep("p", part)
        await until(lambda: begun)
        await made.stop()
        assert (begun, made.down) == ([1], {})

    asyncio.run(story())


def test_one_that_never_ends_is_named_and_left(log: Callable[[], str]) -> None:
    async def story() -> None:
        stubborn = [True]

        async def part() -> None:
            while stubborn:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    continue

        task = asyncio.create_task(part(), name="the part")
        await asyncio.sleep(0)
        began = time.monotonic()
        await tasks.end([task], timeout=0.1)
        assert 0.1 <= time.monotonic() - began < 2.0
        stubborn.clear()
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(story())
    assert "the part does not end; it is left behind" in log()


def test_what_dies_of_its_cancellation_is_told_of(log: Callable[[], str]) -> None:
    async def part() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ZeroDivisionError("a defect")

    async def story() -> None:
        task = asyncio.create_task(part(), name="the part")
        await asyncio.sleep(0)
        await tasks.end([task])

    asyncio.run(story())
    assert "the part has died" in log()
    assert "ZeroDivisionError: a defect" in log()


def test_a_thread_that_is_waited_for_no_more_disturbs_nobody() -> None:
    over = threading.Event()

    async def story() -> None:
        task = asyncio.create_task(in_thread("t", lambda: (over.wait(10), None)[1]))
        await asyncio.sleep(0.01)
        await tasks.end([task])
        assert task.cancelled()

    asyncio.run(story())
    over.set()  # its loop is closed by now
