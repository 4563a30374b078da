"""Which configuration runs: read, validated and swapped whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mic_supervisor.config.load import load
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.records import dataclass

if TYPE_CHECKING:
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.document import Config
    from mic_supervisor.converge.state import StateDir

_KEPT = "last-good"
_RECORD = "generation.json"


@dataclass(frozen=True, slots=True)
class Reloaded:
    """`error` is the whole report; then nothing was swapped. `changed`: another document runs.

    `warning`: it runs, and may not run again after a restart with a broken file.
    """

    changed: bool
    generation: int
    error: str | None = None
    warning: str | None = None


class Generations:
    """The accepted configuration, the one before a restart, and what is wrong with the file now.

    The last good files are kept in the state directory, and run after a start with a broken file.
    """

    def __init__(
        self,
        path: Path,
        registry: Registry,
        environ: Mapping[str, str],
        state: StateDir,
        *,
        prune_on_watch: bool,
    ) -> None:
        self.path = path
        self.config: Config | None = None
        self.number = 0
        self.loaded_at: float | None = None
        self.error: str | None = None
        self.error_at: float | None = None
        self._confirmed_hash = ""
        self._registry = registry
        self._environ = environ
        self._state = state
        self._prune_on_watch = prune_on_watch
        self._seen = ""
        self._kept_hash = ""

    def confirms(self, config_hash: str) -> bool:
        """Whether what the document of this hash no longer names may be removed.

        Somebody asked for exactly this document, with `reload` or `apply`. "" is no document.
        """
        if not config_hash:
            return False
        return self._prune_on_watch or config_hash == self._confirmed_hash

    def start(self, now: float) -> Reloaded:
        """The file, or else what ran before. Never raises for what is in either."""
        self._read_record()
        outcome = self.reload(now, confirm=False)
        if outcome.error is None:
            return outcome
        # A crash between two renames leaves the one before under its other name.
        places = [self._state.path / name / "gpus.yaml" for name in (_KEPT, f".{_KEPT}.old")]
        kept = next((path for path in places if path.exists()), None)
        if kept is None:
            return outcome
        try:
            # It was valid: a plug-in that is broken since, or gone, blocks its own models alone.
            self.config = load(kept, self._registry, environ=self._environ, tolerant=True)
        except ConfigError as error:
            self.error = f"{self.error}\nand what ran before cannot be used: {error.rendered}"
            return outcome
        self.loaded_at = now
        return outcome

    def _read_record(self) -> None:
        try:
            record = self._state.read_json(_RECORD)
            if isinstance(record, dict):
                self.number = int(record.get("generation", 0))
                self._kept_hash = str(record.get("hash", ""))
                self._confirmed_hash = str(record.get("confirmed", ""))
        except (MicError, TypeError, ValueError):
            return  # counting starts anew, and a removal has to be confirmed again

    def reload(self, now: float, *, confirm: bool) -> Reloaded:
        """Read the file, and run it if it is valid."""
        self._seen = self._fingerprint()
        try:
            config = load(self.path, self._registry, environ=self._environ)
        except ConfigError as error:
            self.error = error.rendered or error.message
            self.error_at = now
            return Reloaded(False, self.number, self.error)
        self.error = self.error_at = None
        changed = self.config is None or config.hash != self.config.hash
        if changed and (self.config is not None or config.hash != self._kept_hash):
            self.number += 1
        if changed:
            self.loaded_at = now
        if confirm:
            self._confirmed_hash = config.hash
        # Even an equal document may stand elsewhere now: diagnostics name its lines.
        self.config = config
        if not (changed or confirm or config.hash != self._kept_hash):
            return Reloaded(changed, self.number)
        try:
            self._keep(config)
        except MicError as error:
            # A disk that is full must not end the supervision, nor hold up a change.
            return Reloaded(changed, self.number, warning=error.message)
        return Reloaded(changed, self.number)

    def differs(self) -> bool:
        """Whether the files are not as they were when they were last read. Cheap."""
        return self._fingerprint() != self._seen

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        directory = self.path.with_name(self.path.name + ".d")
        try:
            parts = sorted(directory.glob("*.yaml"))
        except OSError:
            parts = []
        for path in (self.path, *parts):
            try:
                content = path.read_bytes()
            except OSError as error:
                content = f"\0{error.errno}".encode()
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def _keep(self, config: Config) -> None:
        """Copy the files beside each other, and let the copy take its place at once.

        Files that changed since they were read are not the good ones: they are about to be read
        again.
        """
        scratch = self._state.path / f".{_KEPT}.new"
        old = self._state.path / f".{_KEPT}.old"
        target = self._state.path / _KEPT
        try:
            self._state.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(mode=0o700)
            (scratch / "gpus.yaml.d").mkdir(mode=0o700)
            for index, path in enumerate(config.files):
                name = "gpus.yaml" if index == 0 else f"gpus.yaml.d/{path.name}"
                _write(scratch / name, path.read_bytes())
            if self.differs():
                shutil.rmtree(scratch)
                return
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            scratch.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise MicError(
                f"cannot keep the configuration in {target}: {error.strerror}",
                hint="make room, or point MIC_STATE_DIR to a directory that can be written",
            ) from error
        record = {
            "generation": self.number,
            "hash": config.hash,
            "confirmed": self._confirmed_hash,
        }
        self._state.write(_RECORD, json.dumps(record))
        self._kept_hash = config.hash


def _write(path: Path, content: bytes) -> None:
    """Readable by us alone, and on the disk when this returns."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
