"""One writer per scope, and who that is."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mic_supervisor import codec
from mic_supervisor.clocks import local
from mic_supervisor.errors import LockHeld, MicError
from mic_supervisor.host.files import read_file

_LOCKS = Path("/proc/locks")
_LISTS = 8  # of the kernel's locks that are read before nobody is said to hold one


@dataclass(frozen=True, slots=True)
class LockHolder:
    """What the holder of a scope's lock wrote into it. `since` is seconds since the epoch."""

    pid: int
    command: str
    user: str
    since: float


@contextmanager
def writer(path: Path, command: str, timeout: float) -> Iterator[Callable[[], None]]:
    """Hold the lock of a scope while something is changed.

    The kernel drops it with the process, however that ends. `timeout` is in seconds; LockHeld says
    who holds it, with which command and since when.

    The context gives what takes the lock again where its file was removed or replaced, for who
    holds it for long. It raises LockHeld where somebody else has it by now: then two converge.
    """
    held = _take(path, command, timeout)

    def renew() -> None:
        nonlocal held
        if not _is_at(path, held):
            fresh = _take(path, command, 0.0)
            os.close(held)
            held = fresh

    try:
        yield renew
    finally:
        os.truncate(held, 0)
        os.close(held)


def _take(path: Path, command: str, timeout: float) -> int:
    """The descriptor that holds the lock, with who we are in the file. Raises MicError."""
    deadline = time.monotonic() + timeout
    while True:
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
            _acquire(descriptor, path, deadline)
            if _is_at(path, descriptor):  # else it was removed meanwhile, and guards nothing
                holder = LockHolder(os.getpid(), command, _user(), time.time())
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(codec.encode(holder)).encode(), 0)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            raise MicError(f"cannot write the lock {path}: {error.strerror}") from error
        # LockHeld and Ctrl-C: a descriptor that nobody knows of would hold the lock. Raised again.
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the file at `path` is the open one."""
    try:
        there, held = path.lstat(), os.fstat(descriptor)
    except OSError:
        return False  # whoever opens it says why
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


def _acquire(descriptor: int, path: Path, deadline: float) -> None:
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
        since = local(holder.since).strftime("%H:%M:%S")
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

    The kernel gives the list by the page, of some 65 locks. Of those that were given, as many as
    are let go of before the next page are left out at its beginning: nobody is found only where
    several lists have nobody.
    """
    inode = path.stat().st_ino
    for _ in range(_LISTS):
        # "12: FLOCK  ADVISORY  WRITE 4121 fd:01:131 0 EOF"; "->" marks one that waits.
        rows = [line.split() for line in _LOCKS.read_text().splitlines()]
        found = [
            int(row[4])
            for row in rows
            if len(row) > 5 and row[1] == "FLOCK" and row[5].endswith(f":{inode}")
        ]
        if found:
            return found
    return []
