"""Reads the log of a host process, which its keeper rotates by copy and truncate, as it grows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mic_supervisor.runtimes.keeper import LOG

_BLOCK = 1 << 16
_LONGEST = 1 << 20  # bytes; a longer line is given in pieces
_PATIENCE = 10  # looks at a log that has shrunk until it counts as started anew


def read(
    directory: Path,
    *,
    tail: int | None,
    follow: bool = False,
    ended: Callable[[], bool] = lambda: True,
    pause: float = 0.2,
) -> Iterator[str]:
    """Lines of the log in `directory`, oldest first, without line ends.

    `tail` None is all of them. With `follow` it goes on until `ended` says so and everything was
    read, looking every `pause` seconds. Raises OSError.
    """
    try:
        handle = os.open(directory / LOG, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        while True:  # until no rotation came between the two
            rotated = _mark(directory)
            size = os.fstat(handle).st_size
            if rotated == _mark(directory):
                break
        if tail is None:
            parts = _forwards(directory, handle, size)
        else:
            parts = iter([_backwards(directory, handle, size, tail)])
        lines = _Lines()
        for part in parts:
            yield from lines.feed(part)
        if follow:
            for part in _follow(directory, handle, size, rotated, ended, pause):
                yield from lines.feed(part)
        yield from lines.rest()
    finally:
        os.close(handle)


class _Lines:
    """Cuts bytes into lines."""

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, part: bytes) -> Iterator[str]:
        *lines, self._partial = (self._partial + part).split(b"\n")
        if len(self._partial) > _LONGEST:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")

    def rest(self) -> Iterator[str]:
        if self._partial:
            yield self._partial.decode(errors="replace")
            self._partial = b""


def _mark(directory: Path) -> tuple[int, int] | None:
    """Tells one `log.1` from the next."""
    try:
        found = (directory / f"{LOG}.1").stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _older(directory: Path) -> list[Path]:
    """The rotated logs, newest first."""
    found = [path for path in directory.glob(f"{LOG}.*") if path.suffix.removeprefix(".").isdigit()]
    return sorted(found, key=lambda path: int(path.suffix[1:]))


def _blocks(handle: int, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    while end is None or start < end:
        part = os.pread(handle, _BLOCK if end is None else min(_BLOCK, end - start), start)
        if not part:
            return
        start += len(part)
        yield part


def _forwards(directory: Path, handle: int, size: int) -> Iterator[bytes]:
    for path in reversed(_older(directory)):
        with path.open("rb") as file:
            yield from _blocks(file.fileno())
    yield from _blocks(handle, 0, size)


def _backwards(directory: Path, handle: int, size: int, count: int) -> bytes:
    """The last `count` lines; a line that is not complete yet counts as one."""
    if count <= 0:
        return b""
    parts: list[bytes] = []
    ends = 0

    def enough(number: int, end: int) -> bool:
        nonlocal ends
        while end > 0 and ends <= count:
            start = max(0, end - _BLOCK)
            part = os.pread(number, end - start, start)
            parts.append(part)
            ends += part.count(b"\n")
            end = start
        return ends > count

    if not enough(handle, size):
        for path in _older(directory):
            with path.open("rb") as file:
                if enough(file.fileno(), os.fstat(file.fileno()).st_size):
                    break
    text = b"".join(reversed(parts))
    complete = text.endswith(b"\n")
    lines = text.split(b"\n")
    return b"\n".join(lines[-count - 1 :] if complete else lines[-count:])


def _follow(
    directory: Path,
    handle: int,
    position: int,
    rotated: tuple[int, int] | None,
    ended: Callable[[], bool],
    pause: float,
) -> Iterator[bytes]:
    shrunk = 0
    while True:
        over = ended()  # before the last look, so that nothing is left unread
        mark = _mark(directory)
        if mark != rotated:
            rotated = mark
            if mark is not None:
                yield from _blocks_of(directory / f"{LOG}.1", position)
            position = 0
        if os.fstat(handle).st_size < position:
            # Truncated, and what it held is about to appear as log.1 - unless none is kept.
            shrunk += 1
            if shrunk >= _PATIENCE or over:
                position = shrunk = 0
        for part in _blocks(handle, position):
            position += len(part)
            yield part
        if over:
            return
        time.sleep(pause)


def _blocks_of(path: Path, start: int) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from _blocks(file.fileno(), start)
