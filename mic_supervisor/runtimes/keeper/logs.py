"""Reads the log of a host process, which its keeper rotates by copy and truncate, as it grows."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mic_supervisor.runtimes.keeper.program import LOG

_BLOCK = 1 << 16
_LONGEST = 1 << 20  # bytes; a longer line is given in pieces


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
    lines = _Lines()
    with ExitStack() as files:
        log = _Log(directory, files)
        parts = log.older() if tail is None else log.end(tail)
        for part in parts:
            yield from lines.feed(part)
        for part in log.growth(ended if follow else lambda: True, pause):
            yield from lines.feed(part)
        yield from lines.rest()


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


class _Log:
    """The files of one log, opened at one moment between two rotations.

    A keeper rotates only while nobody holds a shared flock(2) on the log, which is held for moments
    here. `_position` is how far the newest file was read; as many rotations can be kept up with as
    files are kept.
    """

    def __init__(self, directory: Path, files: ExitStack) -> None:
        self._directory = directory
        self._position = 0
        newest = _open(directory / LOG, files)
        self._newest = newest if newest is not None else -1
        with self._still():
            self._mark = next(iter(self._marks()), None)
            opened = [_open(path, files) for path in _rotated(directory)]
        self._older = [handle for handle in opened if handle is not None]

    @contextmanager
    def _still(self) -> Iterator[None]:
        """No rotation meanwhile. Never held while a reader is waited for."""
        if self._newest >= 0:
            fcntl.flock(self._newest, fcntl.LOCK_SH)
        try:
            yield
        finally:
            if self._newest >= 0:
                fcntl.flock(self._newest, fcntl.LOCK_UN)

    def _marks(self) -> list[tuple[int, int]]:
        """Tells one rotated file from the next, `log.1` first; empty: none belong to our newest."""
        try:
            here, mine = (self._directory / LOG).stat(), os.fstat(self._newest)
            found = [path.stat() for path in _rotated(self._directory)]
        except OSError:
            return []
        if here.st_ino != mine.st_ino:
            return []  # a later run has begun: ours was put aside
        return [(item.st_ino, item.st_mtime_ns) for item in found]

    def older(self) -> Iterator[bytes]:
        """What was rotated away before; `growth` gives the rest."""
        for handle in reversed(self._older):
            yield from _blocks(handle, 0)

    def end(self, count: int) -> Iterator[bytes]:
        """The last `count` lines; a line that is not complete yet counts as one."""
        with self._still():
            text = self._last(count)
        kept = count + 1 if text.endswith(b"\n") else count
        yield b"\n".join(text.split(b"\n")[-kept:]) if count > 0 else b""

    def _last(self, count: int) -> bytes:
        """At least the last `count` lines."""
        parts: list[bytes] = []
        ends = 0
        self._position = os.fstat(self._newest).st_size if self._newest >= 0 else 0
        sizes = [(self._newest, self._position)]
        sizes += [(handle, os.fstat(handle).st_size) for handle in self._older]
        for handle, end in sizes:
            while end > 0 and ends <= count:
                start = max(0, end - _BLOCK)
                part = os.pread(handle, end - start, start)
                parts.append(part)
                ends += part.count(b"\n")
                end = start
        return b"".join(reversed(parts))

    def growth(self, ended: Callable[[], bool], pause: float) -> Iterator[bytes]:
        """What was added since, until `ended`."""
        while self._newest >= 0:
            over = ended()  # before the last look, so that nothing is left unread
            while part := self._further():
                yield part
            if over:
                return
            time.sleep(pause)

    def _further(self) -> bytes:
        """The next piece; empty: there is no more now."""
        with self._still(), ExitStack() as files:
            rest = b""
            marks = self._marks()
            # What was `log.1` at the last look is `log.3` after two rotations, or gone after more.
            rotations = marks.index(self._mark) if self._mark in marks else len(marks)
            for number in range(rotations, 0, -1):
                handle = _open(self._directory / f"{LOG}.{number}", files)
                if handle is not None:
                    rest += b"".join(_blocks(handle, self._position))
                self._position = 0
            if marks:
                self._mark = marks[0]
            if os.fstat(self._newest).st_size < self._position:
                self._position = 0  # it was truncated, and nothing is kept
            part = os.pread(self._newest, _BLOCK, self._position)
            self._position += len(part)
            return rest + part


def _open(path: Path, files: ExitStack) -> int | None:
    try:
        return files.enter_context(path.open("rb", buffering=0)).fileno()
    except FileNotFoundError:
        return None


def _rotated(directory: Path) -> list[Path]:
    """The rotated logs, newest first."""
    found = [path for path in directory.glob(f"{LOG}.*") if path.suffix.removeprefix(".").isdigit()]
    return sorted(found, key=lambda path: int(path.suffix[1:]))


def _blocks(handle: int, start: int) -> Iterator[bytes]:
    while part := os.pread(handle, _BLOCK, start):
        start += len(part)
        yield part
