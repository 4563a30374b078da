"""The logs of host processes: a directory for each run, in which `log.1` is older than `log`.

They lie on a disk, since the records lie in memory. A log beside its record is of an earlier
version, or of a run that found no room on the disk.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from mic_supervisor.runtimes import lines
from mic_supervisor.runtimes.keeper.program import LOG

_BLOCK = 1 << 16
_MOMENT = 0.01  # seconds; longer than a keeper takes from the truncation to the renaming
_OLD = 7 * 86400.0  # seconds for which the logs of a workload without a record are kept


class LogStore:
    """Where the logs of a scope's runs are. `records` is the directory with the records."""

    def __init__(self, directory: Path, records: Path) -> None:
        self._directory = directory
        self._records = records

    def make(self, name: str, run_id: str) -> Path:
        """A directory for the log of a run that is about to start.

        Where none can be made it is the record's: a full disk must not keep a model from serving.
        """
        path = self._directory / name / run_id
        try:
            for part in (path.parent.parent, path.parent, path):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return self._records / name
        return path

    def of(self, name: str, run_id: str | None) -> Path:
        """That of a run; None: of the last one."""
        if run_id is None:
            return next(reversed(self._runs(name)), self._records / name)
        path = self._directory / name / run_id
        return path if path.is_dir() else self._records / name

    def previous(self, name: str) -> Path | None:
        """That of the run before the last; None where there was none."""
        return next(reversed(self._runs(name)[:-1]), None)

    def prune(self, name: str, *, now: float) -> None:
        """Keep the last two runs of `name`, and forget workloads that are long gone."""
        with suppress(OSError):  # the next start tries again
            for path in self._runs(name)[:-2]:
                for file in path.glob(f"{LOG}*"):
                    file.unlink()
                if path != self._records / name:
                    path.rmdir()
            for path in self._directory.iterdir():
                if not (self._records / path.name).exists() and _newest(path) < now - _OLD:
                    shutil.rmtree(path)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(self._directory / name)

    def _runs(self, name: str) -> list[Path]:
        """The directories that hold a log of `name`, oldest first."""
        beside = self._records / name
        before = [path for path in (beside / "previous", beside) if (path / LOG).exists()]
        own = [path for path in (self._directory / name).glob("*") if (path / LOG).exists()]
        return before + sorted(own, key=lambda path: path.stat().st_mtime)


def _newest(path: Path) -> float:
    """When something below it was written last. After a reboot nothing has a record yet."""
    return max(one.stat().st_mtime for one in (path, *path.rglob("*")))


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
    with ExitStack() as files:
        log = _Log(directory, files)
        yield from lines(_parts(log, tail, ended if follow else lambda: True, pause))


def _parts(log: _Log, tail: int | None, ended: Callable[[], bool], pause: float) -> Iterator[bytes]:
    if tail is None:
        yield from log.older()
    else:
        yield log.end(tail)
    while True:
        over = ended()  # before the last look, so that nothing is left unread
        while part := log.further():
            yield part
        if over:
            return
        time.sleep(pause)


class _Log:
    """The two files of a log, opened at one moment.

    `_position` is how far the newest was read, and `_mark` tells which `log.1` belongs to it. Who
    reads more slowly than a whole file is written loses what was in between.
    """

    def __init__(self, directory: Path, files: ExitStack) -> None:
        self._directory = directory
        self._position = 0
        self._newest = _open(directory / LOG, files)
        self._older = _open(directory / f"{LOG}.1", files)
        self._mark = _mark(self._older)

    def older(self) -> Iterator[bytes]:
        """What was rotated away before; `further` gives the rest."""
        while self._older is not None and (part := self._older.read(_BLOCK)):
            yield part

    def end(self, count: int) -> bytes:
        """The last `count` lines; a line that is not complete yet counts as one."""
        parts: list[bytes] = []
        ends = 0
        for file in (self._newest, self._older):
            end = 0 if file is None else os.fstat(file.fileno()).st_size
            if file is self._newest:
                self._position = end
            while file is not None and end > 0 and ends <= count:
                start = max(0, end - _BLOCK)
                parts.append(os.pread(file.fileno(), end - start, start))
                ends += parts[-1].count(b"\n")
                end = start
        text = b"".join(reversed(parts))
        kept = count + 1 if text.endswith(b"\n") else count
        return b"\n".join(text.split(b"\n")[-kept:]) if count > 0 else b""

    def further(self) -> bytes:
        """The next piece; empty: there is no more now."""
        if self._newest is None:
            return b""
        rest = b""
        shrunk = os.fstat(self._newest.fileno()).st_size < self._position
        if shrunk:
            time.sleep(_MOMENT)
        with ExitStack() as files:
            older = _open(self._directory / f"{LOG}.1", files)
            if older is not None and (mark := _mark(older)) != self._mark:
                self._mark = mark
                older.seek(self._position)
                rest = older.read()
                self._position = 0
            elif shrunk:
                self._position = 0  # nothing could be kept
        part = os.pread(self._newest.fileno(), _BLOCK, self._position)
        self._position += len(part)
        return rest + part


def _open(path: Path, files: ExitStack) -> BinaryIO | None:
    try:
        return files.enter_context(path.open("rb"))
    except FileNotFoundError:
        return None


def _mark(file: BinaryIO | None) -> tuple[int, int] | None:
    """Tells one `log.1` from the next."""
    if file is None:
        return None
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_mtime_ns
