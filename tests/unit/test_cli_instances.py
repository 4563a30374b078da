"""The logs of several instances at once, as a terminal gets them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mic_supervisor.cli import instances
from mic_supervisor.converge.logs import Log
from tests.support.waiting import until

A, B = Log((), None, "a"), Log((), None, "b")


def test_what_is_not_printed_yet_is_bounded() -> None:
    """A model that logs much, into a pager, would fill the memory."""
    so_far: list[str] = []

    def read(_log: Log) -> Iterator[str]:
        for number in range(1_000_000):
            so_far.append(str(number))
            yield so_far[-1]

    def waits() -> bool:
        before = len(so_far)
        time.sleep(0.2)
        return len(so_far) == before

    found = instances._together([A], read, at_once=True)
    assert [next(found) for _ in range(2)] == ["a | 0", "a | 1"]
    until(waits, "the reader to wait")
    assert len(so_far) < 2 * instances._MOST_WAITING


def test_one_that_fails_in_an_odd_way_does_not_hold_up_the_end_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # what it raises is meant

    def read(log: Log) -> Iterator[str]:
        if log is A:
            raise OSError("odd")
        yield "only"

    found: list[str] = []
    reading = threading.Thread(
        target=lambda: found.extend(instances._together([A, B], read, at_once=True)), daemon=True
    )
    reading.start()
    reading.join(20.0)
    assert (reading.is_alive(), found) == (False, ["b | only"])
