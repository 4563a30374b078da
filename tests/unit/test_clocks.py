"""The two clocks, and the way from one to the other."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor import clocks
from mic_supervisor.clocks import Clock


def test_the_steady_clock_is_the_one_that_the_kernel_counts_starts_by() -> None:
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    began = clocks.from_ticks(ticks)
    assert 0.0 < began <= clocks.steady()
    up = float(Path("/proc/uptime").read_text().split()[0])
    assert clocks.steady() == pytest.approx(up, abs=5.0)
    assert ticks == pytest.approx(began * os.sysconf("SC_CLK_TCK"))


def test_a_monotonic_stamp_of_now_is_now() -> None:
    assert clocks.from_monotonic(time.monotonic()) == pytest.approx(clocks.steady(), abs=1.0)


@given(st.floats() | st.sampled_from([-1e300, 1e300, 253402300800.0]))
def test_any_number_is_a_time_for_people(at: float) -> None:
    assert 1969 <= clocks.local(at).year <= 9999


def test_a_time_for_people_is_that_of_the_wall_clock() -> None:
    assert clocks.local(1_795_300_000.5).timestamp() == 1_795_300_000.5


def test_an_offset_follows_a_clock_that_is_set_and_does_not_flicker() -> None:
    now, offset = [100.0], [1e9]
    clock = Clock(lambda: now[0], lambda: now[0] + offset[0])
    assert clock.offset() == 1e9
    offset[0] += 0.001
    now[0] += 10
    assert clock.offset() == 1e9
    for jump in (3600.0, -7200.0):
        offset[0] += jump
        assert clock.offset() == offset[0]


def test_a_start_is_told_by_the_clock_as_it_is_set_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "steady", lambda: 1000.0)
    monkeypatch.setattr(clocks, "wall", lambda: 1_000_001_000.0)
    assert clocks.in_wall(990.0) == 1_000_000_990.0
    assert clocks.in_wall(990.0, 1_000_000_990.4) == 1_000_000_990.4
    assert clocks.in_wall(990.0, 1_000_004_590.4) == 1_000_000_990.0
