"""Threads that are there while they are needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait

import pytest

from mic_supervisor.converge.tasks import Threads

TIMEOUT = 20.0


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    made = threading.Event()
    yield made
    made.set()


def test_gives_what_the_call_gave_or_raised() -> None:
    threads = Threads(2, "mic-test")
    assert threads.submit(divmod, 7, 2).result(TIMEOUT) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 7, 0).result(TIMEOUT)


def test_starts_what_is_asked_at_once_up_to_its_number(gate: threading.Event) -> None:
    threads = Threads(3, "mic-test")
    began = threading.Semaphore(0)

    def work() -> str:
        began.release()
        gate.wait(TIMEOUT)
        return threading.current_thread().name

    futures = [threads.submit(work) for _ in range(5)]
    assert all(began.acquire(timeout=TIMEOUT) for _ in range(3))
    assert not began.acquire(timeout=0.1)
    gate.set()
    assert {one.result(TIMEOUT) for one in futures} == {"mic-test"}


def test_leaves_no_thread_behind() -> None:
    threads = Threads(8, "mic-test-rest")
    wait([threads.submit(time.sleep, 0.01) for _ in range(20)], TIMEOUT)
    end = time.monotonic() + TIMEOUT
    while any(one.name == "mic-test-rest" for one in threading.enumerate()):
        assert time.monotonic() < end
    # Each place is free again.
    wait([threads.submit(time.sleep, 0.01) for _ in range(20)], TIMEOUT)


def test_does_not_begin_what_was_cancelled_or_waited_at_the_end(gate: threading.Event) -> None:
    threads = Threads(1, "mic-test")
    done: list[str] = []
    hangs = threads.submit(gate.wait, TIMEOUT)
    cancelled: Future[None] = threads.submit(done.append, "cancelled")
    last = threads.submit(done.append, "in its turn")
    assert cancelled.cancel()
    gate.set()
    assert hangs.result(TIMEOUT) is True
    last.result(TIMEOUT)
    assert done == ["in its turn"]
    gate.clear()
    hangs = threads.submit(gate.wait, TIMEOUT)
    threads.submit(done.append, "after the end")
    threads.shutdown()
    gate.set()
    hangs.result(TIMEOUT)
    threads.submit(done.append, "asked later").result(TIMEOUT)
    assert done == ["in its turn", "asked later"]
