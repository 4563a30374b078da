"""The machine's two clocks, and the one way from a stamp of the first to a time for people.

| clock | what it is for | what moves it |
|---|---|---|
| steady | durations and decisions: budgets, backoff, how long something is ready | nothing |
| wall | what people, Prometheus and files of other boots read | NTP, an operator |

The steady clock is CLOCK_BOOTTIME: seconds since the boot, the time asleep included. All processes
of one boot share it, and the kernel counts the start of a process on it (proc(5), field 22 of
/proc/PID/stat). A stamp of one clock is never compared with a stamp of the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

_LAST = 253402128000.0  # 9999-12-30: from 3.13 on datetime looks a day ahead
_FLICKER = 0.5  # seconds: a smaller step of the wall clock does not move what was told


def steady() -> float:
    """Seconds since the boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall() -> float:
    """Seconds since the epoch, as far as the machine knows."""
    return time.time()


class Clock:
    """Both clocks of this machine."""

    def __init__(
        self, steady: Callable[[], float] = steady, wall: Callable[[], float] = wall
    ) -> None:
        self.steady = steady
        self.wall = wall
        self._offset = wall() - steady()

    def offset(self) -> float:
        """What makes a steady stamp a time for people: seconds to add, as the clock is set now.

        Two readings differ by microseconds, and NTP slews. That moves nothing, so that the time of
        one event stays the same number from one document to the next.
        """
        found = self.wall() - self.steady()
        if abs(found - self._offset) >= _FLICKER:
            self._offset = found
        return self._offset


def from_ticks(ticks: int) -> float:
    """The steady time of a process's start, from the kernel's clock ticks since the boot."""
    return ticks / os.sysconf("SC_CLK_TCK")


def from_monotonic(stamp: float) -> float:
    """The steady time of a CLOCK_MONOTONIC stamp, which leaves out the time asleep."""
    # The time asleep, as a number that two looks agree on.
    return stamp + round(steady() - time.monotonic(), 1)


def local(at: float) -> datetime:
    """A time of the wall clock for people, where this machine is.

    One that no calendar has, as a damaged file may hold, is the nearest that it has.
    """
    return datetime.fromtimestamp(min(_LAST, max(0.0, at))).astimezone()


def later(at: float | None, seconds: float) -> float | None:
    """A stamp on another clock, which says that much more; None stays None."""
    return None if at is None else at + seconds


def in_wall(at: float, noted: float | None = None) -> float:
    """When something was, by the wall clock as it is set now.

    `noted` is what the wall clock said then. It is finer than ticks, and wrong once the clock was
    set.
    """
    found = at + round(wall() - steady(), 1)
    return noted if noted is not None and abs(found - noted) < 1.0 else found


def boot_id() -> str:
    """Another one after each boot of the kernel, see random(4). Raises OSError."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
