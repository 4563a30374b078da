"""The records of host processes: what is on disk, and whether it can be believed.

One directory per workload, 0700: `record.json` (identity, keeper and child by PID and start time),
`exit.json` (written when nothing of the tree is left), `log`, `log.1` …, and `previous/` with the
same of the run before. A keeper holds a flock(2) on the directory for as long as it lives. No file
holds a secret.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mic_supervisor import clocks
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import Identity, ObservedWorkload, RunState
from mic_supervisor.runtimes.keeper.program import EXIT, RECORD, write_json

T = TypeVar("T")

VERSION = 1
PREVIOUS = "previous"
RUN_ID = "MIC_RUN_ID"
LOST = "its keeper was killed; exit status lost"
_LARGEST = 1 << 20  # bytes of a file that is read


class BadRecord(Exception):
    """A record that cannot be believed: whatever it names is not touched. The text says why.

    `claims` is the instance of which it is a copy.
    """

    def __init__(self, text: str, claims: str | None = None) -> None:
        super().__init__(text)
        self.claims = claims


@dataclass(frozen=True, slots=True)
class Anchor:
    """One process for certain: a PID and its start time in clock ticks since boot."""

    pid: int
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
    created_at: float
    keeper: Anchor | None = None
    child: Anchor | None = None
    started_at: float | None = None
    user: str | None = None
    working_dir: str = "/"

    def document(self) -> dict[str, Any]:
        """As record.json holds it, without keeper and child, which the keeper puts in."""
        identity = self.identity
        return {
            "version": VERSION,
            "identity": {
                "scope": identity.scope,
                "host": identity.host,
                "instance": identity.instance,
                "model": identity.model,
                "backend": identity.backend,
                "gpus": list(identity.gpus),
                "ports": dict(identity.ports),
                "spec": _plain(identity.spec),
                "spec_hash": identity.spec_hash,
                "schema": identity.schema,
                "origin": identity.origin,
            },
            "run_id": self.run_id,
            "boot_id": self.boot_id,
            "pid_namespace": self.pid_namespace,
            "created_at": self.created_at,
            "user": self.user,
            "working_dir": self.working_dir,
        }


@dataclass(frozen=True, slots=True)
class Exit:
    """How a run ended. Both numbers None: nobody was there to see it."""

    exit_code: int | None
    signal: int | None
    finished_at: float | None
    error: str | None

    @property
    def code(self) -> int | None:
        """As a shell gives it: 128 and the signal's number for a death by signal."""
        return self.exit_code if self.signal is None else 128 + self.signal

    @property
    def reason(self) -> str | None:
        if self.error or self.signal is None:
            return self.error
        try:
            return f"ended by {signal.Signals(self.signal).name}"
        except ValueError:
            return f"ended by signal {self.signal}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# --- reading ----------------------------------------------------------------------------------


def _document(path: Path) -> dict[str, Any] | None:
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
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{path.name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadRecord(f"{path.name} is not a JSON object")
    return document


def load(path: Path) -> Record | None:
    """The record in the directory `path`; None when it holds none. Raises BadRecord."""
    document = _document(path / RECORD)
    if document is None:
        return None
    if document.get("version") != VERSION:
        raise BadRecord(f"{RECORD} has version {document.get('version')!r}, not {VERSION}")
    try:
        return Record(
            name=path.name,
            identity=_identity(_a(dict, document["identity"])),
            run_id=_a(str, document["run_id"]),
            boot_id=_a(str, document["boot_id"]),
            pid_namespace=_a(str, document["pid_namespace"]),
            created_at=_number(document["created_at"]),
            keeper=_anchor(document.get("keeper")),
            child=_anchor(document.get("child")),
            started_at=_or_none(_number, document.get("started_at")),
            user=_or_none(_string, document.get("user")),
            working_dir=_a(str, document["working_dir"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecord(f"{RECORD} is incomplete: {error!r}") from error


def _identity(document: dict[str, Any]) -> Identity:
    texts = ("scope", "host", "instance", "model", "backend", "spec_hash", "origin")
    return Identity(
        gpus=tuple(_a(str, gpu) for gpu in _a(list, document["gpus"])),
        ports={name: _a(int, port) for name, port in _a(dict, document["ports"]).items()},
        spec=_or_none(lambda spec: _a(dict, spec), document["spec"]),
        schema=_a(int, document["schema"]),
        **{name: _a(str, document[name]) for name in texts},
    )


def _anchor(document: Any) -> Anchor | None:
    if document is None:
        return None
    pid, start_time = _a(int, document["pid"]), _a(int, document["start_time"])
    if pid <= 1:
        raise ValueError(f"PID {pid}")
    return Anchor(pid, start_time)


def _a(kind: type[T], value: Any) -> T:
    """The value, which is of that kind. Raises TypeError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} instead of {kind.__name__}")
    return value


def _string(value: Any) -> str:
    return _a(str, value)


def _number(value: Any) -> float:
    """Raises TypeError, and ValueError for what is not finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} instead of a number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _or_none(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def load_exit(path: Path, run_id: str) -> Exit | None:
    """How the run `run_id` ended; None when it has not, or was not seen to. Raises BadRecord."""
    document = _document(path / EXIT)
    if document is None or document.get("run_id") != run_id:
        return None
    try:
        return Exit(
            _or_none(lambda code: _a(int, code), document.get("exit_code")),
            _or_none(lambda number: _a(int, number), document.get("signal")),
            _or_none(_number, document.get("finished_at")),
            _or_none(_string, document.get("error")),
        )
    except (TypeError, ValueError) as error:
        raise BadRecord(f"{EXIT} is incomplete: {error!r}") from error


def read_exit(path: Path, run_id: str) -> tuple[Exit | None, str | None]:
    """As `load_exit`, and why it cannot be read: a damaged exit status says nothing of the rest."""
    try:
        return load_exit(path, run_id), None
    except BadRecord as error:
        return None, f"its exit status is lost: {error}"


def write(path: Path, record: Record) -> None:
    """Write a record anew, in a directory that is made if need be. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    document = record.document()
    for name, anchor in (("keeper", record.keeper), ("child", record.child)):
        if anchor is not None:
            document[name] = {"pid": anchor.pid, "start_time": anchor.start_time}
    _write(path, RECORD, {**document, "started_at": record.started_at})


def _write(path: Path, name: str, document: dict[str, Any]) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if (path / name).is_dir() and not (path / name).is_symlink():
            # Nothing can be renamed over a directory.
            (path / name).rename(path / f".{name}.{time.monotonic_ns()}")
        write_json(handle, name, document)
    finally:
        os.close(handle)


def write_exit(path: Path, record: Record, error: str, at: float) -> None:
    """For a run whose keeper could not do it. Raises OSError."""
    document = {
        "run_id": record.run_id,
        "exit_code": None,
        "signal": None,
        "finished_at": at,
        "error": error,
    }
    _write(path, EXIT, document)


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
    anchors = dict(also or {})
    for anchor in (record.keeper, record.child):
        if anchor is not None:
            anchors[anchor.pid] = anchor.start_time
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


@dataclass(frozen=True, slots=True)
class Machine:
    """What PIDs are relative to."""

    boot: str
    namespace: str


def machine() -> Machine:
    """This boot and this PID namespace. Raises OSError."""
    return Machine(clocks.boot_id(), procfs.pid_namespace())


def judge(path: Path, record: Record, here: Machine, *, held: bool = False) -> ObservedWorkload:
    """What runs of a record; `held`: the caller holds its lock, so that no keeper does.

    Raises BadRecord, and OSError when /proc cannot be read.
    """
    ended, unread = read_exit(path, record.run_id)
    if ended is not None:
        return _observed(record, RunState.EXITED, ended)
    if record.boot_id != here.boot:
        return _observed(record, RunState.EXITED, error="the machine was restarted")
    if record.pid_namespace != here.namespace:
        if not held and is_locked(path):
            reason = "it runs in another PID namespace and cannot be seen from here"
            return _observed(record, RunState.UNKNOWN, error=reason)
        return _observed(record, RunState.EXITED, error="it ended with its PID namespace")
    if record.keeper is None or record.child is None:
        if not held and is_locked(path):
            return _observed(record, RunState.RUNNING)
        return _settled(path, record, "its start was cut short")
    if record.keeper.runs():
        if record.child.runs():
            seen = _observed(record, RunState.RUNNING, pid=record.child.pid)
        else:
            reason = "its main process has ended, and what it left is being ended"
            seen = _settled(path, record, reason, RunState.RUNNING)
        return replace(seen, keeper=record.keeper.pid)
    if record.child.runs():
        reason = "its keeper was killed: its exit status will be lost"
        return _observed(record, RunState.RUNNING, pid=record.child.pid, error=reason)
    if not held and is_locked(path):
        ended, _ = read_exit(path, record.run_id)
        if ended is not None:
            return _observed(record, RunState.EXITED, ended)
        raise BadRecord(f"{RECORD} names a run that is over, and another one holds its directory")
    lost = unread or LOST
    ended, _ = read_exit(path, record.run_id)
    remains = members(path, record) if ended is None else {}
    if remains:
        pids = ", ".join(str(pid) for pid in sorted(remains))
        return _observed(record, RunState.EXITED, error=f"{lost}; PID {pids} of it still run")
    return _settled(path, record, lost)


def _settled(
    path: Path, record: Record, error: str, state: RunState = RunState.EXITED
) -> ObservedWorkload:
    """Look for the exit status once more: it may have been written between two looks."""
    ended, _ = read_exit(path, record.run_id)
    if ended is not None:
        return _observed(record, RunState.EXITED, ended)
    return _observed(record, state, error=error)


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


def try_lock(path: Path) -> int | None:
    """Lock the directory `path`; its descriptor, or None when another holds it. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there, mine = path.stat(), os.fstat(handle)
        if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # held, or removed between the two calls
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def lock(path: Path, patience: float) -> int | None:
    """As `try_lock`, trying again for `patience` seconds."""
    give_up = time.monotonic() + patience
    while (handle := try_lock(path)) is None and time.monotonic() < give_up:
        time.sleep(0.01)
    return handle


def discard(path: Path) -> None:
    """Delete a record and all that belongs to it; the caller holds the lock. Raises OSError."""
    bin_ = path.with_name(f".removed-{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        path.rename(bin_)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return
        raise
    shutil.rmtree(bin_)
