"""What is kept between runs: the memory, and the key for digests."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from mic_supervisor.clocks import Clock, boot_id
from mic_supervisor.errors import MicError
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.spec import SpecKey

_MOVE_AWAY = "move it away: only backoff counters, GPU bindings and pauses are lost"


class StateDir:
    """One scope's directory under MIC_STATE_DIR. Files are 0600, the directory is 0700."""

    def __init__(self, path: Path, clock: Clock | None = None, boot: str | None = None) -> None:
        self.path = path
        self._clock = clock or Clock()
        self._boot = _boot() if boot is None else boot

    def memory(self) -> Memory:
        """What was remembered, or nothing yet. Raises MicError when it is there and unreadable.

        On disk times are the wall clock's, beside the offset that made them so. In the same boot
        they become exactly what they were, however the clock was set since; after a reboot, and of
        a version that wrote no offset, they are what the wall clock makes of them now.
        """
        data = self.read_json("memory.json")
        if data is None:
            return Memory()
        try:
            memory = Memory.from_json(data)
            boot, offset = _written_by(data)
        except (TypeError, ValueError, AttributeError) as error:
            raise MicError(
                f"cannot use {self.path / 'memory.json'}: {error}",
                hint=_MOVE_AWAY,
            ) from error
        now = self._clock.steady()
        if offset is None or boot != self._boot:
            offset = self._clock.wall() - now
        return memory.moved(-offset).in_time(now, rebooted=boot not in (None, self._boot))

    def save_memory(self, memory: Memory) -> None:
        offset = self._clock.wall() - self._clock.steady()
        clock = {"boot_id": self._boot, "offset": offset}
        document = {**memory.moved(offset).to_json(), "clock": clock}
        self.write("memory.json", json.dumps(document, indent=1))

    def key(self, *, create: bool) -> SpecKey:
        """The key that secrets in labels are digested with.

        `create` False, and there is none yet: one that is not kept. Then no label was written
        either, and nothing can be compared with it.
        """
        path = self.path / "spec.key"
        try:
            value = path.read_bytes()
        except FileNotFoundError:
            value = os.urandom(32)
            if create:
                self.write("spec.key", value)
        except OSError as error:
            raise _unreadable(path, error) from error
        return SpecKey(value)

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a file at once: a reader sees the old content or the new one, never a part."""
        data = content.encode() if isinstance(content, str) else content
        target = self.path / name
        scratch = self.path / f".{name}.{os.getpid()}"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise MicError(
                f"cannot write {target}: {error.strerror}",
                hint="run as root, or point MIC_STATE_DIR to a directory you may write to",
            ) from error

    def read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error) from error
        except ValueError as error:
            raise MicError(
                f"cannot read {path}: {error}",
                hint=_MOVE_AWAY,
            ) from error


def _boot() -> str:
    """ "" where the kernel does not tell: times are then taken as those of another boot."""
    try:
        return boot_id()
    except OSError:
        return ""


def _written_by(data: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The boot that times were written down in, and the clocks' offset; None: it does not say."""
    clock = data.get("clock")
    if not isinstance(clock, Mapping):
        return None, None
    boot, offset = clock.get("boot_id"), clock.get("offset")
    if not isinstance(boot, str) or type(offset) is not float or not isfinite(offset):
        return None, None
    return boot, offset if boot else None


def _unreadable(path: Path, error: OSError) -> MicError:
    return MicError(
        f"cannot read {path}: {error.strerror}",
        hint="run as root: the state belongs to the user that converges",
    )
