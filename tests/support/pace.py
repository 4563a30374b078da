"""Processor time as a machine with nothing else to do would have taken it.

Who computes on the other half of a core, or fills the caches, makes a second of ours longer: three
workers of the suite by up to a half, more by more.
"""

from __future__ import annotations

import time
from statistics import median

_USUAL = 0.0065  # seconds that `pace` says on the idle machine on which the bounds were set


def pace() -> float:
    """The shortest of a few tries at a dictionary that is made and sorted, as a round does much."""
    return min(_tries())


def idle(seconds: float) -> float:
    """So much processor time of just now, at the pace of that machine while it is idle."""
    return seconds * _USUAL / median(_tries())


def _tries() -> list[float]:
    took: list[float] = []
    for _ in range(5):
        begun = time.thread_time()
        sorted({str(number): number for number in range(20_000)}.items())
        took.append(time.thread_time() - begun)
    return took
