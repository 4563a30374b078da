"""What is kept between runs: the memory, and the key for digests."""

from __future__ import annotations

import errno
import json
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mic_supervisor import codec
from mic_supervisor.clocks import Clock, boot_id
from mic_supervisor.errors import MicError
from mic_supervisor.host.files import read_file, set_aside
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.spec import SpecKey

_MEMORY = "memory.json"
_PREVIOUS = "memory.json.old"
_KEY = "spec.key"
_KEY_LENGTH = 32  # bytes
_MOST = 16 << 20  # bytes of a document
_OF_OTHER_VERSIONS = ("ready_probes", "ready_record")  # which may hold what this one cannot know


@dataclass(frozen=True, slots=True)
class _Written:
    """The boot that times were written down in, and the clocks' offset; None: it does not say."""

    boot_id: str | None = None
    offset: float | None = None


class StateDir:
    """One scope's directory under MIC_STATE_DIR. Files are 0600, the directory is 0700."""

    def __init__(self, path: Path, clock: Clock | None = None, boot: str | None = None) -> None:
        self.path = path
        self._clock = clock or Clock()
        self._boot = _boot() if boot is None else boot
        self._damaged = False  # whether what `memory` read has to be kept for a person
        self._unkept: bytes | None = None  # a key that could not be written yet

    def memory(self) -> Memory:
        """What was remembered, or nothing yet. Raises MicError when it may not be read.

        What of it is damaged is as if it was never there, and `lost` says so. What is lost, or was
        never there, explains nothing of what runs: then `unexplained` is not None.

        On disk times are the wall clock's, beside the offset that made them so. In the same boot
        they become exactly what they were, however the clock was set since; after a reboot, and of
        a version that wrote no offset, they are what the wall clock makes of them now.
        """
        path = self.path / _MEMORY
        lost: str | None = None
        data: Any = {}
        memory = Memory(unexplained={})
        try:
            if (found := self.read(_MEMORY)) is not None:
                memory, lost = _salvaged(path, found)
                data = found
        except codec.BadDocument as error:
            lost = f"{path} was damaged, and what it held is lost: {error}"
            with suppress(codec.BadDocument):
                if (found := self.read(_PREVIOUS)) is not None:
                    memory, _ = _salvaged(path, found)
                    data = found
                    lost = f"{path} was damaged; what it held before the last change is used"
        try:
            written = codec.decode(_Written, data.get("clock"))
        except codec.BadDocument:
            written = _Written()
        self._damaged = lost is not None
        if lost is not None:
            memory = replace(memory, unexplained={})
        now = self._clock.steady()
        boot, offset = written.boot_id, written.offset
        if not boot or offset is None or boot != self._boot:
            offset = self._clock.wall() - now
        rebooted = boot is not None and boot != self._boot
        if memory.drained is not None and memory.drained.boot not in (None, self._boot):
            memory = replace(memory, drained=None)  # it was meant to end with that boot
        return replace(memory.moved(-offset).in_time(now, rebooted=rebooted), lost=lost)

    def save_memory(self, memory: Memory) -> None:
        """What was found damaged is kept beside it, and so is the document before this one.

        Raises MicError when it cannot be written.
        """
        self._keep_key()
        path = self.path / _MEMORY
        if self._damaged:
            self._set_aside(path)
            self._damaged = False
        else:
            with suppress(OSError):  # a copy less is not worth an end
                (self.path / _PREVIOUS).unlink(missing_ok=True)
                (self.path / _PREVIOUS).hardlink_to(path)
        offset = self._clock.wall() - self._clock.steady()
        document = codec.encode(replace(memory.moved(offset), lost=None))
        document |= {"version": 1, "clock": codec.encode(_Written(self._boot, offset))}
        self.write(_MEMORY, json.dumps(document, indent=1))

    def _set_aside(self, path: Path) -> None:
        with suppress(OSError):  # then it is overwritten: it is of little use, and not worth an end
            set_aside(path)

    def key(self, *, create: bool) -> SpecKey:
        """The key that secrets in labels are digested with.

        `create` False, and there is none yet: one that is not kept. Then no label was written
        either, and nothing can be compared with it. One that is damaged is made anew: what was
        digested with the old one is unknown then, and the plan says so. One that cannot be written
        is used all the same, and written with the memory as soon as that can be.
        """
        path = self.path / _KEY
        try:
            value = read_file(path, _KEY_LENGTH)
        except FileNotFoundError:
            value = b""
        except OSError as error:
            if not _is_damage(error):
                raise _unreadable(path, error) from error
            value = b""
        # A short one, as a full disk leaves, would let secrets be guessed from their digests.
        if len(value) == _KEY_LENGTH:
            return SpecKey(value)
        value = os.urandom(_KEY_LENGTH)
        if create:
            self._set_aside(path)
            self._unkept = value
            with suppress(MicError):  # the memory cannot be written either, and that is said
                self._keep_key()
        return SpecKey(value)

    def _keep_key(self) -> None:
        if self._unkept is not None:
            self.write(_KEY, self._unkept)
            self._unkept = None

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a file at once: a reader sees the old content or the new one, never a part."""
        data = content.encode() if isinstance(content, str) else content
        target = self.path / name
        # A save that was given up may still be under way in its thread.
        scratch = self.path / f".{name}.{os.getpid()}.{threading.get_ident()}"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
        except OSError as error:
            with suppress(OSError):  # a read-only file system says so before it looks for it
                scratch.unlink()
            raise MicError(
                f"cannot write {target}: {error.strerror}",
                hint="run as root, or point MIC_STATE_DIR to a directory you may write to",
            ) from error

    def read(self, name: str) -> Any:
        """A document, or None where there is none. Raises BadDocument, or MicError."""
        path = self.path / name
        try:
            return codec.parse(read_file(path, _MOST))
        except FileNotFoundError:
            return None
        except OSError as error:
            if _is_damage(error):
                raise codec.BadDocument(error.strerror or str(error)) from error
            raise _unreadable(path, error) from error


def _salvaged(path: Path, data: Any) -> tuple[Memory, str | None]:
    """What is good of a document, and what to say of the rest. Raises BadDocument."""
    memory, locations = codec.salvage(Memory, data, whole=_OF_OTHER_VERSIONS)
    locations = [name for name in locations if not name.endswith(_OF_OTHER_VERSIONS)]
    return memory, f"{path} was damaged: {', '.join(locations)} was lost" if locations else None


def _is_damage(error: OSError) -> bool:
    """Whether the file, or the disk that it is on, is damaged.

    Else this program may not read it, or lacks what it takes to.
    """
    return error.errno not in (
        *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    )


def _boot() -> str:
    """ "" where the kernel does not tell: times are then taken as those of another boot."""
    try:
        return boot_id()
    except OSError:
        return ""


def _unreadable(path: Path, error: OSError) -> MicError:
    return MicError(
        f"cannot read {path}: {error.strerror}",
        hint="run as root: the state belongs to the user that converges",
    )
