"""Which configuration runs: read, validated and swapped whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mic_supervisor import codec
from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.document import Config, doubt, unapplied
from mic_supervisor.config.load import load
from mic_supervisor.config.merge import MAX_BYTES
from mic_supervisor.config.settings import Settings
from mic_supervisor.converge.snapshot import Reloaded
from mic_supervisor.converge.state import StateDir
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.host.files import read_file

_KEPT = "last-good"
_RECORD = "generation.json"


@dataclass(frozen=True, slots=True)
class _Record:
    """The document that was accepted last, by its hash, and the one that a person confirmed."""

    generation: int = 0
    hash: str = ""
    confirmed: str = ""


class Generations:
    """The accepted configuration, the one before a restart, and what is wrong with the file now.

    The last good files are kept in the state directory, and run after a start with a broken file.
    With `plan_first` (MIC_WATCH=plan) every other document waits until a person asks for it.
    """

    def __init__(
        self,
        path: Path,
        registry: Registry,
        environ: Mapping[str, str],
        state: StateDir,
        *,
        prune_on_watch: bool,
        plan_first: bool = False,
    ) -> None:
        self.path = path
        self.config: Config | None = None
        self.number = 0
        self.loaded_at: float | None = None  # steady, as `error_at` is
        self.error: str | None = None
        self.error_at: float | None = None
        self.unconfirmed: str | None = None  # why the file as it is now waits for a person's word
        self.waiting: Config | None = None  # what it says, as long as it does
        self._confirmed_hash = ""
        self._registry = registry
        self._environ = environ
        self._state = state
        self._prune_on_watch = prune_on_watch
        self._plan_first = plan_first
        self._seen = ""
        self._kept_hash = ""
        self._accepted: Config | None = None  # that runs, or ran before a restart
        self._accepted_hash = ""  # of the same, also where the document itself is not known

    def confirms(self, config_hash: str) -> bool:
        """Whether what the document of this hash no longer names may be removed.

        Somebody asked for exactly this document, with `reload` or `apply`, and nothing else was
        accepted since. "" is no document.
        """
        if not config_hash:
            return False
        return self._prune_on_watch or config_hash == self._confirmed_hash

    def start(self, now: float) -> Reloaded:
        """The file, or else what ran before. Never raises for what is in either."""
        before = _recorded(self._state)
        self.number, self._kept_hash = before.generation, before.hash
        self._confirmed_hash = before.confirmed
        unusable = ""
        try:
            self._accepted = last_good(self._state, self._registry, self._environ)
        except ConfigError as error:
            unusable = f"\nand the configuration that ran before cannot be used: {error.outline}"
        self._accepted_hash = before.hash or _hash(self._accepted)
        if self._plan_first and _hash(self._accepted) != self._accepted_hash:
            # An older one would take back what was applied since, and nobody asked for that.
            self._accepted = None
        outcome = self.reload(now, confirm=False)
        if self.config is not None:
            return outcome
        if self.error is not None:
            self.error += unusable
        if self._accepted is not None:
            self.config, self.loaded_at = self._accepted, now
        return outcome

    def reload(self, now: float, *, confirm: bool, written: str = "") -> Reloaded:
        """Read the file, and run it if it is valid and waits for nobody.

        `written` is the hash of a document that a command has just written, as a person asked it
        to: that one waits for nobody, and removes nothing unconfirmed.
        """
        seen = self.fingerprint()
        try:
            config = load(self.path, self._registry, environ=self._environ)
        except ConfigError as error:
            self._seen, self.unconfirmed, self.waiting = seen, None, None
            self.error = error.outline or error.message
            self.error_at = now
            return Reloaded(False, self.number, self.error)
        # Who asks while it is loaded is told what was known before.
        self._seen, self.unconfirmed, self.waiting = seen, None, None
        self.error = self.error_at = None
        if not confirm and config.hash not in (self._confirmed_hash, written):
            self.unconfirmed = _why_it_waits(
                self._accepted,
                self._accepted_hash,
                config,
                prune=self._prune_on_watch,
                plan_first=self._plan_first,
            )
            if self.unconfirmed is not None:
                self.waiting = config
                return Reloaded(False, self.number, unconfirmed=self.unconfirmed)
        changed = self.config is None or config.hash != self.config.hash
        if changed and (self.config is not None or config.hash != self._kept_hash):
            self.number += 1
        if changed:
            self.loaded_at = now
        confirmed = confirm and config.hash != self._confirmed_hash
        if confirm:
            self._confirmed_hash = config.hash
        elif config.hash != self._confirmed_hash:
            # What comes back later may be this one cut short, whatever it is equal to.
            self._confirmed_hash = ""
        # Even an equal document may stand elsewhere now: diagnostics name its lines.
        self.config = self._accepted = config
        self._accepted_hash = config.hash
        if not (changed or confirm or config.hash != self._kept_hash):
            return Reloaded(changed, self.number)
        try:
            # First: what may be removed is never said by an older record than the files.
            _write_record(self._state, _Record(self.number, config.hash, self._confirmed_hash))
            _keep(self._state, config)
            self._kept_hash = config.hash
        except MicError as error:
            # A disk that is full must not end the supervision, nor hold up a change.
            return Reloaded(changed, self.number, warning=error.message, confirmed=confirmed)
        return Reloaded(changed, self.number, confirmed=confirmed)

    def current(self) -> str | None:
        """The hash of what the files say now, whether it runs or waits; None: it is not known."""
        if self.error is not None or self.differs():
            return None
        return _hash(self.waiting or self.config)

    def differs(self) -> bool:
        """Whether the files are not as they were when they were last read. Cheap."""
        return self.fingerprint() != self._seen

    def fingerprint(self) -> str:
        """What the files hold now, as a digest. Never raises."""
        digest = hashlib.sha256()
        directory = self.path.with_name(self.path.name + ".d")
        try:
            parts = sorted(directory.glob("*.yaml"))
        except OSError:
            parts = []
        for path in (self.path, *parts):
            try:
                content = read_file(path, MAX_BYTES)
            except OSError as error:
                content = f"\0{error.errno}".encode()
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()


def _hash(config: Config | None) -> str:
    return "" if config is None else config.hash


def _why_it_waits(
    accepted: Config | None, accepted_hash: str, found: Config, *, prune: bool, plan_first: bool
) -> str | None:
    why = doubt(accepted, found, prune=prune)
    if why is None and plan_first and found.hash != accepted_hash:
        return unapplied(found.path)
    return why


def last_good(state: StateDir, registry: Registry, environ: Mapping[str, str]) -> Config | None:
    """What a daemon accepted last; None where there was none. Raises ConfigError."""
    # A crash between two renames leaves the one before under its other name.
    candidates = [state.path / name / "gpus.yaml" for name in (_KEPT, f".{_KEPT}.old")]
    kept = next((path for path in candidates if path.exists()), None)
    if kept is None:
        return None
    # It was valid: a plug-in that is broken since, or gone, blocks its own models alone.
    return load(kept, registry, environ=environ, tolerant=True)


def waits_for_word(state: StateDir, settings: Settings) -> bool:
    """Whether a command, too, leaves alone what `unconfirmed` speaks against.

    A first file has nothing to lose; with MIC_WATCH=plan it waits as any other does.
    """
    kept = (state.path / _KEPT).exists()
    return kept or _recorded(state).hash != "" or settings.watch == "plan"


def unconfirmed(
    state: StateDir, config: Config, registry: Registry, settings: Settings, *, written: str = ""
) -> str | None:
    """Why a daemon does not follow `config` before a person confirms it; None: it does.

    `written` is as for `Generations.reload`.
    """
    before = _recorded(state)
    if config.hash in (before.confirmed, written):
        return None
    try:
        accepted = last_good(state, registry, settings.environ)
    except ConfigError:
        accepted = None  # then nothing can be compared with it
    return _why_it_waits(
        accepted,
        before.hash or _hash(accepted),
        config,
        prune=settings.prune_on_watch,
        plan_first=settings.watch == "plan",
    )


def accept(state: StateDir, config: Config, *, confirmed: bool) -> None:
    """Note what a command runs while no daemon does: the next daemon goes by it.

    A confirmation ends with another document here as well. Raises MicError.
    """
    before = _recorded(state)
    number = before.generation + (before.hash != config.hash)
    word = config.hash if confirmed or config.hash == before.confirmed else ""
    if (record := _Record(number, config.hash, word)) != before:
        _write_record(state, record)
        _keep(state, config)


def number_of(state: StateDir, config_hash: str) -> int | None:
    """The generation as which this document was accepted last; None: another one was, or none."""
    found = _recorded(state)
    return found.generation if found.hash == config_hash else None


def _write_record(state: StateDir, record: _Record) -> None:
    """One that cannot be renewed goes: an old one would confirm what nobody asked for."""
    try:
        state.write(_RECORD, json.dumps(codec.encode(record)))
    except MicError:
        with suppress(OSError):
            (state.path / _RECORD).unlink(missing_ok=True)
        raise


def _recorded(state: StateDir) -> _Record:
    """Without a record, counting starts anew."""
    try:
        return codec.decode(_Record, state.read(_RECORD))
    except (MicError, codec.BadDocument):
        return _Record()  # a removal has to be confirmed again


def _keep(state: StateDir, config: Config) -> None:
    """Write down what `config` was read from, and let the copy take its place at once."""
    scratch = state.path / f".{_KEPT}.new"
    old = state.path / f".{_KEPT}.old"
    target = state.path / _KEPT
    try:
        state.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        (scratch / "gpus.yaml.d").mkdir(mode=0o700)
        for index, (path, text) in enumerate(zip(config.files, config.texts, strict=True)):
            name = "gpus.yaml" if index == 0 else f"gpus.yaml.d/{path.name}"
            _write(scratch / name, text.encode())
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


def _write(path: Path, content: bytes) -> None:
    """Readable by us alone, and on the disk when this returns."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
