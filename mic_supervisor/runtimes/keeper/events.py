"""Tells of host processes that end, as it happens."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mic_supervisor.runtimes.keeper import records
from mic_supervisor.runtimes.keeper.records import BadRecord, Record

_LOOK = 1.0  # seconds between two looks for new records
_STOP = 0.25  # seconds between two looks at `stop`


def watch(paths: Callable[[], Iterable[Path]], stop: threading.Event) -> Iterator[str]:
    """Names of records whose process has ended, until `stop` is set.

    A process that starts and ends between two looks is told of as well; what had ended before the
    first look is not. Where a keeper is killed, its record is told of, and again when its child
    ends. So is a record that cannot be read any more, or is gone, while its process ran.
    """
    watched: dict[str, tuple[str, int]] = {}  # run -> (name, pidfd)
    known: set[str] | None = None  # runs that were told of, or had ended at the first look
    before: dict[str, str] = {}  # what ran at the last look
    poll = select.poll()
    try:
        while not stop.is_set():
            running, over = _look(paths())
            fresh = (
                [] if known is None else [run for run in over if run not in known | set(watched)]
            )
            known = set(over)
            yield from (over[run] for run in fresh)
            lost = (before.keys() & watched.keys()) - {*running, *over}  # and not told of as ended
            yield from (before[run] for run in lost)
            before = {run: name for run, (name, _) in running.items()}
            for run, (name, pid) in running.items():
                if run not in watched and (handle := _open(pid)) is not None:
                    watched[run] = (name, handle)
                    poll.register(handle, select.POLLIN)
            again = time.monotonic() + _LOOK
            while not stop.is_set() and (left := again - time.monotonic()) > 0:
                ready = {handle for handle, _ in poll.poll(min(left, _STOP) * 1000)}
                for run in [run for run, (_, handle) in watched.items() if handle in ready]:
                    name, handle = watched.pop(run)
                    poll.unregister(handle)
                    os.close(handle)
                    known.add(run)
                    yield name
    finally:
        for _, handle in watched.values():
            os.close(handle)


def _look(paths: Iterable[Path]) -> tuple[dict[str, tuple[str, int]], dict[str, str]]:
    """(run -> name and the PID to watch, run -> name of those that have ended)."""
    running: dict[str, tuple[str, int]] = {}
    over: dict[str, str] = {}
    for path in paths:
        try:
            record = records.load(path)
            if record is None or record.child is None:
                continue
            pid = _pid(path, record)
        except (BadRecord, OSError):
            continue  # `observe` tells of it
        if pid is None:
            over[record.run_id] = path.name
        else:
            running[record.run_id] = (path.name, pid)
    return running, over


def _pid(path: Path, record: Record) -> int | None:
    """Whose end is the end: the keeper's, which comes after the exit status is written."""
    if records.read_exit(path, record.run_id)[0] is None:
        for anchor in (record.keeper, record.child):
            if anchor is not None and anchor.runs():
                return anchor.pid
    return None


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None  # it ended since: the next look finds it over
