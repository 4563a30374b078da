"""Ends the tree of one recorded process, and says so on disk."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mic_supervisor.errors import StopFailed
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import ObservedWorkload
from mic_supervisor.runtimes.keeper import records
from mic_supervisor.runtimes.keeper.records import Record

_KEEPER_GRACE = 2.0  # seconds that a keeper has to write the exit status once all is gone
_LONGEST_PAUSE = 0.05  # seconds between two looks at a tree that is dying


@dataclass(frozen=True, slots=True)
class Options:
    """How a runtime keeps its processes. See KeeperRuntime; times are in seconds."""

    log_max_size: int  # bytes
    kill_timeout: float
    remains_grace: float


def end_tree(path: Path, record: Record, number: int, grace: float, options: Options) -> None:
    """Signal the main process, wait `grace` seconds at most, then kill until nothing is left.

    What the main process leaves behind when it ends in time is asked too, and killed after
    `remains_grace`. Raises StopFailed `kill_timeout` after the first KILL.
    """
    deadline = time.monotonic() + grace
    # Before its parent ends: without a keeper, who its parent was is all that may tell.
    known = records.members(path, record)
    child = record.child
    if child is not None and procfs.send_signal(child.pid, child.start_time, number):
        procfs.send_signal(child.pid, child.start_time, signal.SIGCONT)  # or it never hears of it
        while child.runs() and time.monotonic() < deadline:
            time.sleep(0.005)
    if child is None or not child.runs():
        deadline = min(deadline, time.monotonic() + options.remains_grace)
    _kill(path, record, deadline, options.kill_timeout, known)


def end_remains(
    path: Path, record: Record, seen: ObservedWorkload, options: Options, *, at: float
) -> None:
    """Make sure that nothing is left of a run that has ended, where its keeper could not do it.

    TERM, then KILL after `remains_grace`, as a keeper does. Raises StopFailed and OSError.
    """
    if (record.boot_id, record.pid_namespace) == records.machine():
        _kill(path, record, time.monotonic() + options.remains_grace, options.kill_timeout)
    records.write_exit(path, record, seen.error or records.LOST, at)


def await_exit_status(path: Path, record: Record, *, at: float) -> None:
    """Wait until the keeper has written it and is gone; do its work where it does not."""
    give_up = time.monotonic() + _KEEPER_GRACE
    while record.keeper is not None and record.keeper.runs():
        if time.monotonic() >= give_up:  # it was stopped, or is stuck in writing
            procfs.send_signal(record.keeper.pid, record.keeper.start_time, signal.SIGKILL)
            break
        time.sleep(0.005)
    if path.exists() and records.read_exit(path, record.run_id)[0] is None:
        records.write_exit(path, record, records.LOST, at)


def kill_now(path: Path, record: Record, options: Options) -> None:
    """KILL for keeper, child and everything below. Raises StopFailed and OSError."""
    for anchor in record.anchors:
        procfs.send_signal(anchor.pid, anchor.start_time, signal.SIGKILL)
    _kill(path, record, time.monotonic(), options.kill_timeout)


def _kill(
    path: Path,
    record: Record,
    deadline: float,
    patience: float,
    known: dict[int, int] | None = None,
) -> None:
    """TERM once for everything that is left, where no keeper does it, and KILL from `deadline`.

    `known` is what an earlier look found.
    """
    give_up = max(deadline, time.monotonic()) + patience
    asked: set[tuple[int, int]] = set()
    empty = 0
    pause = 0.002
    # Twice: a process that forks and ends while the table is read may be missed once.
    while empty < 2:
        left = known = records.members(path, record, known)
        if not left:
            empty += 1
            continue
        empty = 0
        now = time.monotonic()
        if now >= give_up:
            raise StopFailed(
                f"cannot stop {record.name}: {_named(left)} survived KILL",
                hint="where the kernel does not let go of it, only a restart of the machine helps",
            )
        if now >= deadline:
            _signal(left.items(), signal.SIGKILL)
        elif record.keeper is None or not record.keeper.runs():
            _signal(left.items() - asked, signal.SIGTERM)
            asked |= left.items()
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


def _signal(processes: Iterable[tuple[int, int]], number: int) -> None:
    for pid, start_time in processes:
        with suppress(PermissionError):  # it will count as a survivor
            procfs.send_signal(pid, start_time, number)
            procfs.send_signal(pid, start_time, signal.SIGCONT)


def _named(pids: dict[int, int]) -> str:
    known = [(pid, procfs.stat(pid)) for pid in sorted(pids)]
    return "PID " + ", ".join(f"{pid} ({one.name if one else '?'})" for pid, one in known)
