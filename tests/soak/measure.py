"""What is looked at, and when it counts as growing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

from tests.support.pace import pace

KEPT_LINES = 2000  # of the history; see mic_supervisor/daemon/log.py


@dataclass(frozen=True)
class Look:
    """`seconds` since the beginning; `memory` and sizes in bytes, `cpu` in seconds of a processor.

    `pace` is the processor time of a fixed piece of work, in seconds: on a machine that does other
    things as well, everything takes longer while they share its caches. `state` are all files below
    MIC_STATE_DIR and MIC_RUN_DIR, `left` the containers of the scope and the directories of host
    processes.
    """

    seconds: float
    crashes: int
    memory: int
    files: int
    threads: int
    cpu: float
    pace: float
    log: int
    history: int
    state: int
    left: int


def look(
    pid: int, seconds: float, crashes: int, *, log: Path, state: Path, run: Path, left: int
) -> Look:
    process = psutil.Process(pid)
    with process.oneshot():
        times = process.cpu_times()
        return Look(
            seconds=round(seconds, 1),
            crashes=crashes,
            memory=process.memory_info().rss,
            files=process.num_fds(),
            threads=process.num_threads(),
            cpu=times.user + times.system,
            pace=pace(),
            log=log.stat().st_size,
            history=sum(
                len(path.read_bytes().splitlines()) for path in state.glob("*/history.jsonl")
            ),
            state=sum(size(path) for top in (state, run) for path in top.rglob("*")),
            left=left,
        )


def size(path: Path) -> int:
    """0 where it is gone meanwhile, and of what is no file."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


@dataclass(frozen=True)
class Trend:
    """`first` and `last` are medians, of the second and of the last quarter of a run: what a start
    takes once is no growth. `slope` is per hour.
    """

    name: str
    unit: str
    first: float
    last: float
    slope: float
    allowed: float

    @property
    def grows(self) -> bool:
        return self.last - self.first > self.allowed


def trends(looks: Sequence[Look]) -> list[Trend]:
    """Of everything that must not grow. What counts with each crash is divided by the crashes, and
    processor time is what it would have been at the pace in the middle of the run.
    """
    mib = 1 << 20
    usual = median(one.pace for one in looks)

    def level(name: str, unit: str, of: Callable[[Look], float], allowed: float) -> Trend:
        points = [(one.seconds, of(one)) for one in looks]
        return _trend(name, unit, points, allowed)

    def each(name: str, unit: str, added: Callable[[Look, Look], float], share: float) -> Trend:
        """How much a crash adds, which may grow by a share of itself at most."""
        points = [
            (after.seconds, added(before, after) / (after.crashes - before.crashes))
            for before, after in itertools.pairwise(looks)
            if after.crashes > before.crashes
        ]
        trend = _trend(name, unit, points, 0.0)
        return Trend(**{**asdict(trend), "allowed": abs(trend.first) * share})

    def milliseconds(before: Look, after: Look) -> float:
        return (after.cpu - before.cpu) * 1000 * 2 * usual / (before.pace + after.pace)

    return [
        level("memory", "MiB", lambda one: one.memory / mib, 4.0),
        level("open files", "", lambda one: one.files, 2.0),
        level("threads", "", lambda one: one.threads, 2.0),
        level("containers and records", "", lambda one: one.left, 2.0),
        each("processor time of a crash", "ms", milliseconds, 0.25),
        each("log of a crash", "bytes", lambda before, after: after.log - before.log, 0.25),
    ]


def _trend(name: str, unit: str, points: Sequence[tuple[float, float]], allowed: float) -> Trend:
    quarter = max(1, len(points) // 4)
    second, last = points[quarter : 2 * quarter] or points, points[-quarter:]
    later = points[quarter:] or points
    return Trend(
        name,
        unit,
        median(value for _, value in second),
        median(value for _, value in last),
        slope(later) * 3600,
        allowed,
    )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through the points that is nearest to them (least squares)."""
    count = len(points)
    x0 = sum(x for x, _ in points) / count
    y0 = sum(y for _, y in points) / count
    width = sum((x - x0) ** 2 for x, _ in points)
    return sum((x - x0) * (y - y0) for x, y in points) / width if width else 0.0


def grown(looks: Sequence[Look]) -> list[str]:
    """What grew, in words. The history has a bound instead, at which it is cut to half."""
    found = [
        f"{one.name} grew from {one.first:.1f} to {one.last:.1f} {one.unit}".rstrip()
        for one in trends(looks)
        if one.grows
    ]
    if (most := max(one.history for one in looks)) > KEPT_LINES:
        found.append(f"the history had {most} lines, {KEPT_LINES} at most are kept")
    return found
