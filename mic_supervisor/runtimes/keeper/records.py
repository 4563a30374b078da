"""The records of host processes: what is on disk, and whether it can be believed.

One directory per workload, 0700: `record.json` (identity, keeper and child by PID and start time),
`exit.json` (written when nothing of the tree is left). A keeper holds a flock(2) on the directory
for as long as it lives. No file holds a secret.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, FiniteFloat

from mic_supervisor import clocks, codec
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import Identity, ObservedWorkload, RunState
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.keeper.program import EXIT, RECORD, write_json

T = TypeVar("T")

VERSION = 1
RUN_ID = "MIC_RUN_ID"
LOST = "its keeper was killed; exit status lost"
_LARGEST = 1 << 20  # bytes of a file that is read


class BadRecord(Exception):
    """A record that cannot be believed: whatever it names is not touched. The text says why.

    `claims` is the instance of which it is a copy; `elsewhere`: it is another scope's.
    """

    def __init__(self, text: str, claims: str | None = None, *, elsewhere: bool = False) -> None:
        super().__init__(text)
        self.claims = claims
        self.elsewhere = elsewhere


class NotOurs(BadRecord):
    """A record that can be believed, and says that it is another's, or another record's copy."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """One process for certain: a PID and its start time in clock ticks since boot."""

    pid: Annotated[int, Field(gt=1)]  # to signal the others is to signal everybody
    start_time: int

    def runs(self) -> bool:
        return procfs.is_running(self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class Record:
    """`keeper` and `child` None: the start has not come that far. `run_id` is another each run."""

    name: str
    identity: Identity
    run_id: str
    boot_id: str
    pid_namespace: str
    created_at: FiniteFloat
    keeper: Anchor | None = None
    child: Anchor | None = None
    started_at: FiniteFloat | None = None
    user: str | None = None
    working_dir: str = "/"

    @property
    def anchors(self) -> list[Anchor]:
        """Main process and keeper, as far as they are known."""
        return [one for one in (self.child, self.keeper) if one is not None]

    def document(self) -> dict[str, Any]:
        """As record.json holds it; the keeper puts in keeper and child."""
        text = json.dumps(self, default=_plain)
        return {"version": VERSION, **json.loads(text)}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a run ended. Both numbers None: nobody was there to see it."""

    exit_code: int | None = None
    signal: int | None = None
    finished_at: FiniteFloat | None = None
    error: str | None = None

    @property
    def code(self) -> int | None:
        """As a shell gives it: 128 and the signal's number for a death by signal."""
        return self.exit_code if self.signal is None else 128 + self.signal

    @property
    def reason(self) -> str | None:
        if self.error or self.signal is None:
            return self.error
        return checks.ended_by(self.signal)


def _plain(value: Any) -> dict[str, Any]:
    """What json.dumps does not know: one of our classes, or a mapping that is no dict."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(value)


# --- reading and writing ----------------------------------------------------------------------


def _text(path: Path) -> bytes | None:
    try:
        # Without waiting: a pipe has no writer.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadRecord(f"{path.name} cannot be read: {error.strerror}") from error
    try:
        there = os.fstat(handle)
        if not stat.S_ISREG(there.st_mode):
            raise BadRecord(f"{path.name} is not a regular file")
        # What anybody else could have written names whatever they like.
        if there.st_uid not in (0, os.geteuid()):
            raise BadRecord(f"{path.name} belongs to another user")
        text = os.read(handle, _LARGEST + 1)
    except OSError as error:
        raise BadRecord(f"{path.name} cannot be read: {error.strerror}") from error
    finally:
        os.close(handle)
    if len(text) > _LARGEST:
        raise BadRecord(f"{path.name} has more than {_LARGEST} bytes")
    return text


def _document(text: bytes, file: str) -> dict[str, Any]:
    try:
        document = codec.parse(text)
    except codec.BadDocument as error:
        raise BadRecord(f"{file} is {error}") from error
    if not isinstance(document, dict):
        raise BadRecord(f"{file} is not a JSON object")
    return document


def _typed(kind: type[T], document: dict[str, Any], file: str) -> T:
    try:
        return codec.decode(kind, document)
    except codec.BadDocument as error:
        raise BadRecord(f"{file} is incomplete: {error}") from error


def load(path: Path) -> Record | None:
    """The record in the directory `path`; None when it holds none. Raises BadRecord."""
    text = _text(path / RECORD)
    return None if text is None else _record(path.name, text)


# Each is read every second, and changes twice in its life.
@lru_cache(maxsize=1024)
def _record(name: str, text: bytes) -> Record:
    document = _document(text, RECORD)
    if document.get("version") != VERSION:
        raise BadRecord(f"{RECORD} has version {document.get('version')!r}, not {VERSION}")
    return _typed(Record, {**document, "name": name}, RECORD)


def read_exit(path: Path, run_id: str) -> tuple[Exit | None, str | None]:
    """How the run `run_id` ended, None when it has not or was not seen to, and why it cannot be
    read: a damaged exit status says nothing of the rest.
    """
    try:
        text = _text(path / EXIT)
        document = {} if text is None else _document(text, EXIT)
        if document.get("run_id") != run_id:
            return None, None
        return _typed(Exit, document, EXIT), None
    except BadRecord as error:
        return None, f"its exit status is lost: {error}"


def write(path: Path, record: Record) -> None:
    """Write a record anew, in a directory that is made if need be. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(path, RECORD, record.document())


def write_exit(path: Path, record: Record, error: str, at: float) -> None:
    """For a run whose keeper could not do it. Raises OSError."""
    ended = Exit(finished_at=at, error=error)
    _write(path, EXIT, {"run_id": record.run_id, **_plain(ended)})


def _write(path: Path, name: str, document: dict[str, Any]) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if (path / name).is_dir() and not (path / name).is_symlink():
            # Nothing can be renamed over a directory.
            (path / name).rename(path / f".{name}.{time.monotonic_ns()}")
        write_json(handle, name, document)
    finally:
        os.close(handle)


# --- judging ----------------------------------------------------------------------------------


def members(path: Path, record: Record, also: Mapping[int, int] | None = None) -> dict[int, int]:
    """PID -> start time of everything that runs of the tree of the record in `path`, but for the
    keeper.

    Found by descent from keeper and child, by the child's session, and by MIC_RUN_ID in the
    environment, which also finds what has left the tree. `also` is what an earlier look found: it
    counts although its parents may be gone. Only what is certain is in it.

    An environment is copied like any text (`env $(cat …) prog`). While the keeper runs nothing can
    leave its tree, since it is the subreaper, and what it is no ancestor of has a copy. Once it has
    written the exit status nothing is left. So an environment counts where a keeper was killed.
    """
    known = procfs.processes()
    anchors = {**(also or {}), **{one.pid: one.start_time for one in record.anchors}}
    roots = {
        pid for pid, start in anchors.items() if pid in known and known[pid].start_time == start
    }
    found = roots | set(procfs.descendants(roots, known))
    if record.child is not None and record.child.pid in roots:
        found |= {one.pid for one in known.values() if one.session == record.child.pid}
    named = set(procfs.with_environ(RUN_ID, [record.run_id])) - found
    if record.keeper is not None and record.keeper.runs():
        # Asked anew: it may have been born, or have lost its parent, since the table was read.
        named = {pid for pid in named if procfs.ancestors(pid) & roots}
    elif read_exit(path, record.run_id)[0] is not None:
        named = set()
    found |= named
    found -= {os.getpid(), record.keeper.pid if record.keeper else 0}
    running = {}
    for pid in found:
        # Read again where the first look is older than the environment that named it.
        one = known.get(pid) or procfs.stat(pid)
        if one is not None and one.running:
            running[pid] = one.start_time
    return running


@cache
def machine() -> tuple[str, str]:
    """This boot and this PID namespace: what PIDs are relative to. Raises OSError."""
    return clocks.boot_id(), procfs.pid_namespace()


def as_workload(path: Path, record: Record, *, locked: bool | None = None) -> ObservedWorkload:
    """What runs of a record. `locked` False: the caller holds its lock, so that no keeper does.

    Raises BadRecord, and OSError when /proc cannot be read.
    """
    kept = record.keeper is not None and record.keeper.runs()
    runs = record.child is not None and record.child.runs()
    if locked is None:
        locked = is_locked(path)
    # Last: whoever has ended wrote it before.
    ended, unread = read_exit(path, record.run_id)
    if ended is not None:
        return _observed(record, RunState.EXITED, ended)
    boot, namespace = machine()
    if record.boot_id != boot:
        return _observed(record, RunState.EXITED, error="the machine was restarted")
    if record.pid_namespace != namespace:
        if locked:
            reason = "it runs in another PID namespace and cannot be seen from here"
            return _observed(record, RunState.UNKNOWN, error=reason)
        return _observed(record, RunState.EXITED, error="it ended with its PID namespace")
    if record.keeper is None or record.child is None:
        if locked:
            return _observed(record, RunState.RUNNING)
        return _observed(record, RunState.EXITED, error="its start was cut short")
    if kept:
        leaving = None if runs else "its main process has ended, and what it left is being ended"
        pid = record.child.pid if runs else None
        seen = _observed(record, RunState.RUNNING, pid=pid, error=leaving)
        return replace(seen, keeper=record.keeper.pid)
    if runs:
        reason = "its keeper was killed: its exit status will be lost"
        return _observed(record, RunState.RUNNING, pid=record.child.pid, error=reason)
    if locked:
        raise BadRecord(f"{RECORD} names a run that is over, and another one holds its directory")
    lost = unread or LOST
    if remains := members(path, record):
        pids = ", ".join(str(pid) for pid in sorted(remains))
        lost = f"{lost}; its other processes still run: PID {pids}"
    return _observed(record, RunState.EXITED, error=lost)


def _observed(
    record: Record,
    state: RunState,
    ended: Exit | None = None,
    *,
    pid: int | None = None,
    error: str | None = None,
) -> ObservedWorkload:
    # Times of a run that goes on are the kernel's: the wall clock may have been set since.
    running = state is RunState.RUNNING and record.child is not None
    began = clocks.from_ticks(record.child.start_time) if running and record.child else None
    return ObservedWorkload(
        runtime="subprocess",
        name=record.name,
        ref=record.name,
        identity=record.identity,
        state=state,
        pid=pid,
        exit_code=ended.code if ended else None,
        created_at=record.created_at,
        started_at=record.started_at if began is None else clocks.in_wall(began, record.started_at),
        running_since=began,
        finished_at=ended.finished_at if ended else None,
        error=ended.reason if ended else error,
    )


# --- the lock ---------------------------------------------------------------------------------


def is_locked(path: Path) -> bool:
    """Whether a keeper, or a start, holds the record. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def lock(path: Path, timeout: float) -> int | None:
    """Lock the directory `path`; its descriptor, or None when another holds it for `timeout`
    seconds. Raises OSError.
    """
    give_up = time.monotonic() + timeout
    while True:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(BlockingIOError, FileNotFoundError):  # held, or removed since it was opened
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        os.close(handle)
        if time.monotonic() >= give_up:
            return None
        time.sleep(0.01)


def discard(path: Path) -> None:
    """Delete a record and all that belongs to it; the caller holds the lock. Raises OSError."""
    bin_ = path.with_name(f".removed-{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    with suppress(FileNotFoundError):
        path.rename(bin_)
        shutil.rmtree(bin_)
