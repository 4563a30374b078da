"""The one way in which a file is read that somebody else wrote, or may have replaced."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from pathlib import Path

MOST = 1 << 20  # bytes, of what people write


def read_file(path: Path, most: int = MOST) -> bytes:
    """All bytes of a regular file.

    Raises OSError, also for what is not a regular file, since a FIFO or a device may never end or
    never answer, and for one of more than `most` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, "its path holds a NUL") from error
    with os.fdopen(descriptor, "rb") as file:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "it is not a regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most >> 10} KiB")
    return content


def read_text(path: Path, most: int = MOST) -> str:
    """The same as text. Raises OSError and UnicodeDecodeError."""
    return read_file(path, most).decode("utf-8")


def read_in_time(path: Path, most: int = MOST, seconds: float = 2.0) -> str:
    """The same, of a file that may lie on a file system that does not answer (a hung NFS).

    Raises TimeoutError after `seconds`. The read is left behind then, since nothing can end it, and
    every further one of this path fails at once until it returns.
    """
    left = _LEFT.get(path)
    if left is not None and left.is_alive():
        raise OSError(errno.ETIMEDOUT, "its file system does not answer")
    outcome: list[str | Exception] = []

    def read() -> None:
        try:
            outcome.append(read_text(path, most))
        except (OSError, UnicodeDecodeError) as error:  # raised below, for who waits
            outcome.append(error)

    thread = threading.Thread(target=read, name="mic-read", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _LEFT[path] = thread
        raise OSError(errno.ETIMEDOUT, f"it does not answer within {seconds:g} s")
    _LEFT.pop(path, None)  # it answers again
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def hint_to_replace(path: Path, error: OSError) -> str | None:
    """The way out where a file cannot be replaced since it is a mount, as `-v FILE:FILE` makes."""
    if error.errno != errno.EBUSY:
        return None
    return f"{path} is mounted by itself, and nothing replaces a mount: mount {path.parent} instead"


def set_aside(path: Path) -> Path:
    """Rename what cannot be read, whatever it is, and keep it for a person. Raises OSError."""
    names = (path.with_name(f"{path.name}.damaged-{count}") for count in itertools.count(1))
    target = next(name for name in names if not os.path.lexists(name))
    return path.rename(target)


_LEFT: dict[Path, threading.Thread] = {}  # reads that were given up, by path
