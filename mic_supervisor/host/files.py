"""The one way in which a file is read that somebody else wrote, or may have replaced."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import stat
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

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


def read_in_time(path: Path, seconds: float = 2.0) -> str:
    """The same, of a file that may lie on a file system that does not answer (a hung NFS).

    Raises TimeoutError as `in_time` does.
    """
    return in_time(path, lambda: read_text(path), seconds)


def in_time(key: Hashable, work: Callable[[], T], seconds: float) -> T:
    """What `work` gives or raises, where it may hang.

    Raises TimeoutError, an OSError, after `seconds`. It is left behind then, since nothing can end
    it, and every further one of this key fails at once until it returns.
    """
    left = _LEFT.get(key)
    if left is not None and left.is_alive():
        raise OSError(errno.ETIMEDOUT, "it has not answered since it was last asked")
    given: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            given.append(work())
        # Whatever it is belongs to who waits, and is raised there.
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=run, name="mic-in-time", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _LEFT[key] = thread
        raise OSError(errno.ETIMEDOUT, f"it does not answer within {seconds:g} s")
    _LEFT.pop(key, None)  # it answers again
    if raised:
        raise raised[0]
    return given[0]


def fingerprint(directory: Path) -> str:
    """Of the names, sizes and times of the files below a directory, hidden ones aside: another one
    where a file was changed, added or removed. Links are followed. Raises OSError.
    """
    found: list[str] = []
    visited: set[tuple[int, int]] = set()  # a link may lead back

    def refuse(error: OSError) -> None:
        raise error

    for at, below, names in os.walk(directory, onerror=refuse, followlinks=True):
        here = Path(at).stat()
        if (here.st_dev, here.st_ino) in visited:
            below.clear()
            continue
        visited.add((here.st_dev, here.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):  # a link to nothing, or gone since
                one = (Path(at) / name).stat()
                found.append(f"{at}/{name}\0{one.st_size}\0{one.st_mtime_ns}")
    whole = "\n".join(found).encode(errors="surrogateescape")
    return hashlib.sha256(whole).hexdigest()[:16]


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


_LEFT: dict[Hashable, threading.Thread] = {}  # what was given up, by its key
