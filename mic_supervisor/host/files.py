"""The one way in which a file is read that somebody else wrote, or may have replaced."""

from __future__ import annotations

import errno
import os
import stat
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
