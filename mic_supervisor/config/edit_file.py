"""Replaces a configuration file as a whole, for one writer at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mic_supervisor.config.source import MAX_BYTES, cause_of
from mic_supervisor.errors import LockHeld, MicError

PATIENCE = 10.0  # seconds for another edit to be over
_BOM = b"\xef\xbb\xbf"


class LockedFile:
    """A file that is locked against other edits. `data` is what is in it."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path = path
        self._handle = handle
        self._seen = _stamp(os.fstat(handle))
        self.data = os.read(handle, MAX_BYTES + 1)

    @property
    def text(self) -> str:
        """Raises UnicodeDecodeError."""
        return self.data.removeprefix(_BOM).decode()

    def encode(self, text: str) -> bytes:
        """`text` as it has to stand in the file."""
        return (_BOM if self.data.startswith(_BOM) else b"") + text.encode()

    def replace(self, data: bytes) -> None:
        """Put `data` in the file's place, at once and with the same owner, mode and attributes.

        Raises MicError when an editor, which knows nothing of the lock, has changed it meanwhile.
        """
        try:
            handle, draft = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            with os.fdopen(handle, "wb") as file:
                self._make_alike(handle)
                file.write(data)
                file.flush()
                os.fsync(handle)
            if _stamp(self._path.stat()) != self._seen:
                raise MicError(
                    f"cannot edit {self._path}: it was changed meanwhile", hint="try again"
                )
            Path(draft).replace(self._path)
        # Ctrl-C included: a draft may hold secrets, and is never left lying. It is raised again.
        except BaseException as error:
            with suppress(OSError):
                Path(draft).unlink()
            if isinstance(error, OSError):
                raise self._cannot_write(error) from error
            raise
        # From here on another may have the file: what follows concerns a loss of power only.
        with suppress(OSError):
            _sync(self._path.parent)

    def _make_alike(self, handle: int) -> None:
        """Give the file that `handle` is open on the owner, mode and attributes of the old one."""
        old = os.fstat(self._handle)
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(handle, old.st_uid, old.st_gid)
        os.fchmod(handle, old.st_mode & 0o7777)
        # SELinux labels and ACLs; a file system without them has none to lose.
        with suppress(OSError):
            for name in os.listxattr(self._handle):
                os.setxattr(handle, name, os.getxattr(self._handle, name))

    def _cannot_write(self, error: OSError) -> MicError:
        return MicError(f"cannot write {self._path}: {cause_of(error)}", hint=_hint(error))


@contextmanager
def locked(path: Path, patience: float = PATIENCE) -> Iterator[LockedFile]:
    """The file that `path` is, or leads to, for as long as nobody else may edit it.

    Raises MicError, and LockHeld after `patience` seconds.
    """
    real, handle = _open(path, time.monotonic() + patience)
    try:
        try:
            file = LockedFile(real, handle)
        except OSError as error:
            raise MicError(f"cannot read {path}: {cause_of(error)}") from error
        yield file
    finally:
        os.close(handle)


def _open(path: Path, deadline: float) -> tuple[Path, int]:
    """The file itself, and a locked descriptor on it."""
    try:
        real = path.resolve(strict=True)
        while True:
            handle = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                _lock(handle, real, deadline)
                # Whoever had the lock before has put another file in its place.
                current = os.path.samestat(os.fstat(handle), real.stat())
            # Ctrl-C included: a lock that nobody knows of would outlast the edit. Raised again.
            except BaseException:
                os.close(handle)
                raise
            if current:
                return real, handle
            os.close(handle)
    except OSError as error:
        raise MicError(f"cannot edit {path}: {cause_of(error)}", hint=_hint(error)) from error


def _lock(handle: int, path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LockHeld(
                    f"cannot edit {path}: another edit holds it", hint="try again when it is over"
                ) from None
            time.sleep(0.02)
        else:
            return


def _stamp(seen: os.stat_result) -> tuple[int, int, int]:
    return seen.st_ino, seen.st_mtime_ns, seen.st_size


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hint(error: OSError) -> str | None:
    if isinstance(error, PermissionError):
        return "run as root, or as the user that the file belongs to"
    return None
