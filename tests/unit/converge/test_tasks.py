"""Threads that are there while they are needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait

import pytest

from mic_supervisor.converge.tasks import Threads

PATIENCE = 20.0


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    made = threading.Event()
    yield made
    made.set()


def test_gives_what_the_call_gave_or_raised() -> None:
    threads = Threads(2, "mic-test")
    assert threads.submit(divmod, 7, 2).result(PATIENCE) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 7, 0).result(PATIENCE)


def test_starts_what_is_asked_at_once_up_to_its_number(gate: threading.Event) -> None:
    threads = Threads(3, "mic-test")
    began = threading.Semaphore(0)

    def work() -> str:
        began.release()
        gate.wait(PATIENCE)
        return threading.current_thread().name

    futures = [threads.submit(work) for _ in range(5)]
    assert all(began.acquire(timeout=PATIENCE) for _ in range(3))
    assert not began.acquire(timeout=0.1)
    gate.set()
    assert {one.result(PATIENCE) for one in futures} == {"mic-test"}


def test_leaves_no_thread_behind() -> None:
    threads = Threads(8, "mic-test-rest")
    wait([threads.submit(time.sleep, 0.01) for _ in range(20)], PATIENCE)
    end = time.monotonic() + PATIENCE
    while any(one.name == "mic-test-rest" for one in threading.enumerate()):
        assert time.monotonic() < end
    # Each place is free again.
    wait([threads.submit(time.sleep, 0.01) for _ in range(20)], PATIENCE)


def test_does_not_begin_what_was_cancelled_or_waited_at_the_end(gate: threading.Event) -> None:
    threads = Threads(1, "mic-test")
    done: list[str] = []
    hangs = threads.submit(gate.wait, PATIENCE)
    cancelled: Future[None] = threads.submit(done.append, "cancelled")
    last = threads.submit(done.append, "in its turn")
    assert cancelled.cancel()
    gate.set()
    assert hangs.result(PATIENCE) is True
    last.result(PATIENCE)
    assert done == ["in its turn"]
    gate.clear()
    hangs = threads.submit(gate.wait, PATIENCE)
    threads.submit(done.append, "after the end")
    threads.shutdown()
    gate.set()
    hangs.result(PATIENCE)
    threads.submit(done.append, "asked later").result(PATIENCE)
    assert done == ["in its turn", "asked later"]
