"""One writer per scope, and who that is."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mic_supervisor import codec
from mic_supervisor.errors import LockHeld, MicError
from mic_supervisor.host.files import read_file


@dataclass(frozen=True, slots=True)
class LockHolder:
    """What the holder of a scope's lock wrote into it. `since` is seconds since the epoch."""

    pid: int
    command: str
    user: str
    since: float


@contextmanager
def writer(path: Path, command: str, timeout: float) -> Iterator[None]:
    """Hold the lock of a scope while something is changed.

    The kernel drops it with the process, however that ends. `timeout` is in seconds; LockHeld says
    who holds it, with which command and since when.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Whoever can open it can hold it, and keep everybody else from converging.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        os.fchmod(descriptor, 0o600)
    except OSError as error:
        raise MicError(
            f"cannot open the lock {path}: {error.strerror}",
            hint="run as root, or point MIC_RUN_DIR to a directory you may write to",
        ) from error
    try:
        _acquire(descriptor, path, timeout)
        holder = LockHolder(os.getpid(), command, _user(), time.time())
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(codec.encode(holder)).encode(), 0)
        try:
            yield
        finally:
            os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LockHeld(
                    f"cannot converge: {_holder(descriptor, path)}",
                    hint="wait for it, or set a longer --lock-timeout",
                ) from None
            time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
        else:
            return


def _holder(descriptor: int, path: Path) -> str:
    """Who holds the lock. What it wrote may be half there: then the PID is all that is lost."""
    try:
        holder = codec.decode(LockHolder, codec.parse(os.pread(descriptor, 4096, 0)))
        since = datetime.fromtimestamp(holder.since).astimezone().strftime("%H:%M:%S")
    except (ValueError, OverflowError):
        return f"another process holds {path}"
    return (
        f"PID {holder.pid} ({holder.command}, started by {holder.user}) is converging since {since}"
    )


def _user() -> str:
    """Behind sudo, the person: root alone would help nobody to find who to ask."""
    if person := os.environ.get("SUDO_USER"):
        return person
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def lock_holder(path: Path) -> LockHolder | None:
    """The holder of the lock at `path`; None: nobody, or it cannot be told.

    What stands in the file may be of one that was killed: the kernel says whether it still holds
    the lock.
    """
    try:
        found = codec.decode(LockHolder, codec.parse(read_file(path, 4096)))
        pids = lock_pids(path)
    except (OSError, ValueError):
        return None
    return found if any(pid <= 0 or pid == found.pid for pid in pids) else None


def lock_pids(path: Path) -> list[int]:
    """Who holds the flock(2) on a file or directory, by the kernel's own list (proc(5)).

    A PID of another PID namespace is 0 or -1 here. Raises OSError.
    """
    inode = path.stat().st_ino
    # "12: FLOCK  ADVISORY  WRITE 4121 fd:01:131 0 EOF"; "->" marks one that waits.
    rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return [
        int(row[4])
        for row in rows
        if len(row) > 5 and row[1] == "FLOCK" and row[5].endswith(f":{inode}")
    ]
