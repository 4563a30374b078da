"""The file that is there exactly while what a claim holds is ready: for health checks.

Beside it lies PATH.lock, which its holder locks for as long as it lives: two never share one.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mic_supervisor import codec
from mic_supervisor.cli.common import write_file
from mic_supervisor.config.names import safe_name
from mic_supervisor.errors import LockHeld, MicError, Unserviceable
from mic_supervisor.host.files import read_file
from mic_supervisor.host.lock import writer
from mic_supervisor.host.processes import is_running
from mic_supervisor.host.processes import stat as process

_LONGEST = 1 << 16  # bytes
_LOCK_TIMEOUT = 1.0  # seconds: a holder that has just ended lets go


class ReadyFile:
    """One path, while this process has it for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, document: Mapping[str, Any]) -> None:
        """All of it or nothing, in place of whatever has the name: no link is followed."""
        own = process(os.getpid())
        known = {"version": 1, "pid": os.getpid(), "started": own.start_time if own else None}
        text = json.dumps({**known, **document}, ensure_ascii=False, indent=2) + "\n"
        hint = "point --ready-file to a path that can be written"
        write_file(self.path, text, mode=0o644, replace=True, hint=hint)

    def remove(self) -> None:
        """Raises MicError."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise MicError(f"cannot remove {self.path}: {error.strerror}") from error


@contextmanager
def ready_file(path: Path | None, model: str) -> Iterator[ReadyFile]:
    """The file at `path`, or one of this process's own; it is gone at the end.

    Raises Unserviceable where another living holder has it, or it cannot be had.
    """
    if path is None:
        directory = _directory(create=True)
        for left in directory.glob("*.json"):
            if not _is_alive(_read(left)):
                left.unlink(missing_ok=True)
                left.with_name(f"{left.name}.lock").unlink(missing_ok=True)
        path = directory / f"{safe_name(model)}.{os.getpid()}.json"
    path = Path(os.path.abspath(path))  # noqa: PTH100 - a link in it stays as it is
    if os.path.lexists(path) and _read(path) is None:
        raise Unserviceable(
            f"cannot use {path}: it is there, and no ready file of a claim",
            hint="point --ready-file to another path",
        )
    lock = path.with_name(f"{path.name}.lock")
    try:
        with writer(lock, "mic-supervisor claim", _LOCK_TIMEOUT):
            made = ReadyFile(path)
            made.remove()
            try:
                yield made
            finally:
                with suppress(OSError, MicError):
                    made.remove()
                    lock.unlink(missing_ok=True)
    except LockHeld as error:
        raise Unserviceable(
            f"cannot use {path}: another claim that is held has it",
            hint="give each claim a --ready-file of its own",
        ) from error


def check(path: Path | None, model: str | None) -> None:
    """Returns where a claim's holder lives and its instance is ready; else raises MicError."""
    if path is None:
        directory = _directory(create=False)
        found = sorted(directory.glob(f"{safe_name(model)}.*.json" if model else "*.json"))
        alive = [one for one in found if _is_alive(_read(one))]
        if len(alive) > 1:
            raise MicError(
                f"cannot check the claim: {len(alive)} are held by this user",
                hint="give each claim a --ready-file of its own, and name it here as well",
            )
        if not alive:
            raise MicError(
                f"not ready: no claim{f' of {model}' if model else ''} is held and ready"
            )
        return
    if not os.path.lexists(path):
        raise MicError(f"not ready: {path} is not there")
    document = _read(path)
    if document is None:
        raise MicError(f"not ready: {path} cannot be read, or is no ready file of a claim")
    if not _is_alive(document):
        raise MicError(f"not ready: the holder of the claim, PID {document['pid']}, is gone")


def _read(path: Path) -> dict[str, Any] | None:
    """None: it is no ready file, or cannot be read. No link is followed."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        found = codec.parse(read_file(path, _LONGEST))
    except (OSError, codec.BadDocument):
        return None
    good = isinstance(found, dict) and all(type(found.get(n)) is int for n in ("pid", "started"))
    return found if good and "instance" in found else None


def _is_alive(document: dict[str, Any] | None) -> bool:
    if document is None:
        return False
    with suppress(OSError):
        return is_running(document["pid"], document["started"])
    return False


def _directory(*, create: bool) -> Path:
    """Where ready files are that nobody named: nobody else may write there."""
    own, uid = os.environ.get("XDG_RUNTIME_DIR"), os.getuid()
    path = Path(own) / "mic-claims" if own else Path(f"/tmp/mic-claims-{uid}")
    try:
        if create:
            path.mkdir(mode=0o700, parents=False, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        if not create:
            raise MicError("not ready: no claim of this user is held and ready") from error
        raise Unserviceable(
            f"cannot make {path}: {error.strerror}", hint="say where with --ready-file"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o022:
        raise Unserviceable(
            f"cannot use {path}: somebody else may write there", hint="say where with --ready-file"
        )
    return path
