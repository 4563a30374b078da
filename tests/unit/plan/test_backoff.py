"""When something that failed is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.plan import backoff


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(0, 0), (1, 0), (2, 5), (3, 10), (4, 20), (5, 40), (6, 80), (7, 160), (8, 300), (9, 300)],
)
def test_the_first_failure_restarts_at_once_and_each_further_one_doubles(
    failures: int, seconds: float
) -> None:
    assert backoff.delay(failures) == seconds


def test_jitter_adds_a_tenth_at_most() -> None:
    assert backoff.delay(1, 1.0) == 0.0
    assert backoff.delay(2, 0.5) == pytest.approx(5.25)
    assert backoff.delay(9, 1.0) == pytest.approx(330.0)


@given(st.integers(0, 10**9), st.floats(0, 1))
def test_it_is_never_terminal(failures: int, jitter: float) -> None:
    assert 0.0 <= backoff.delay(failures, jitter) <= 330.0


def test_failures_are_forgotten_after_ten_minutes_or_the_startups_budget() -> None:
    assert not backoff.is_stable(None, 1e9, 1.0)
    assert not backoff.is_stable(0.0, 599.0, 1.0)
    assert backoff.is_stable(0.0, 600.0, 1.0)
    assert not backoff.is_stable(0.0, 600.0, 900.0)
    assert backoff.is_stable(0.0, 900.0, 900.0)
