"""When something counts as growing: see tests/soak."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.soak.measure import Look, grown, slope

MIB = 1 << 20


def look(number: int) -> Look:
    """A run that takes something once, in its first quarter, and nothing after that."""
    return Look(
        seconds=number * 10.0,
        crashes=number * 3,
        memory=60 * MIB + min(number, 5) * 2 * MIB,
        files=20 + number % 2,
        threads=8,
        cpu=number * 0.15,
        pace=0.008,
        log=number * 1500,
        history=min(number * 12, 1200),
        state=100_000,
        left=6,
    )


LOOKS = [look(number) for number in range(60)]


def test_what_a_start_takes_once_is_no_growth() -> None:
    assert grown(LOOKS) == []


@pytest.mark.parametrize(
    ("name", "grow"),
    [
        ("memory", lambda one, n: replace(one, memory=one.memory + n * MIB // 5)),
        ("open files", lambda one, n: replace(one, files=one.files + n // 5)),
        ("threads", lambda one, n: replace(one, threads=one.threads + n // 5)),
        ("containers and records", lambda one, n: replace(one, left=one.left + n // 5)),
        ("processor time of a crash", lambda one, n: replace(one, cpu=one.cpu + n * n * 0.005)),
        ("log of a crash", lambda one, n: replace(one, log=one.log + n * n * 50)),
        ("the history", lambda one, n: replace(one, history=n * 40)),
    ],
)
def test_what_grows_is_named(name: str, grow) -> None:  # type: ignore[no-untyped-def]
    (found,) = grown([grow(one, number) for number, one in enumerate(LOOKS)])
    assert found.startswith(name)


def test_a_machine_that_gets_slower_is_no_growth() -> None:
    """Half of the run beside something that doubles what all work takes."""
    looks = [
        replace(one, cpu=one.cpu + max(0, number - 30) * 0.15, pace=0.016 if number > 30 else 0.008)
        for number, one in enumerate(LOOKS)
    ]
    assert grown(looks) == []
    (found,) = grown([replace(one, pace=0.008) for one in looks])
    assert found.startswith("processor time of a crash")


def test_the_slope_of_a_line() -> None:
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    assert slope([(1.0, 1.0)]) == 0.0
