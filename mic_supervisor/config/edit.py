"""Changes one entry under a `gpus:`, or the key `profile`, and no other byte of the file.

Nothing is written by a YAML library, which would lay the file out anew: the locations of keys and
values come from PyYAML's parser, and the text between them is copied. What comes out is read again
and must say what was meant, or nothing is done: a layout that is not understood is left to people.
The file is replaced as a whole, for one writer at a time.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mic_supervisor.config.diagnostics import Report
from mic_supervisor.config.document import NONE, GpuEntry, GpuKey, parse_gpu_key
from mic_supervisor.config.merge import MAX_BYTES, NO_FILE, cause_of
from mic_supervisor.config.yaml import Budget, Entry, Node, parse, resolve
from mic_supervisor.errors import LockHeld, MicError
from mic_supervisor.host.files import hint_to_replace

_INDENT = "  "  # below a `gpus:` that has no entry yet


def assign(text: str, entry: GpuEntry | None, keys: tuple[GpuKey, ...], model: str | None) -> str:
    """`text` with `model` on the GPUs `keys`; None keeps them empty.

    `entry` is an entry of this file that has any of these GPUs, as it was loaded from this very
    text, and may stand in a profile; None: it has none yet. One GPU may be taken out of a range.
    The text must be valid. What changes gets a line end at its end: without one, the file may have
    been cut. Raises MicError for a part of a group, and where the layout defeats this.
    """
    value = NONE if model is None else model
    profile = entry.profile if entry is not None else None
    after = _splice(text, entry, keys, value)
    wanted = {**_meaning(text, profile), frozenset(keys): value}
    if after is None or _meaning(after, profile) != wanted:
        where = "gpus:" if profile is None else f"profiles.{profile}.gpus"
        raise MicError(
            "cannot edit the file: the way its `gpus:` is laid out is not understood",
            hint=f"edit it by hand: under {where}, set {_shown(keys)} to {value}",
        )
    return _ended(text, after)


def put_profile(text: str, name: str) -> str:
    """`text` with `name` as the profile that is on. The text must be valid.

    A key `profile` that is not there yet comes before `profiles:`, else at the end of the file.
    Raises MicError where the layout defeats this.
    """
    root = _root(text)
    entries = root.entries if root is not None else {}
    known, profiles = entries.get("profile"), entries.get("profiles")
    if known is not None:
        after = _replaced(text, known.node.span, _like(text, known.node.span, name))
    elif root is not None and text[root.span[0]] == "{":
        at = root.span[0] + 1
        after = _replaced(text, (at, at), f'"profile": "{name}", ')
    else:
        before = len(text) if profiles is None else text.rfind("\n", 0, profiles.span[0]) + 1
        head, end = text[:before], _line_end_of(text)
        gap = "" if not head or head.endswith("\n") else end
        after = f"{head}{gap}profile: {_plain_or_quoted(name)}{end}{text[before:]}"
    after = _ended(text, after)
    found = _root(after)
    if root is None or found is None or found.plain() != {**root.plain(), "profile": name}:
        raise MicError(
            "cannot edit the file: the way it is laid out is not understood",
            hint=f"edit it by hand: write `profile: {_plain_or_quoted(name)}`",
        )
    return after


def _ended(text: str, after: str) -> str:
    """`after` with a line end at its end, if it is not `text`."""
    return after if after == text or after.endswith("\n") else after + _line_end_of(after)


def _shown(keys: tuple[GpuKey, ...]) -> str:
    return ", ".join(map(str, keys))


def _splice(text: str, entry: GpuEntry | None, keys: tuple[GpuKey, ...], value: str) -> str | None:
    section = _gpus(text, entry.profile if entry is not None else None)
    if entry is None:
        return _added(text, section, keys, value)
    where = entry.location.line, entry.location.column
    items = section.node.entries.items() if section is not None else ()
    found = [one for one in items if (one[1].location.line, one[1].location.column) == where]
    if section is None or not found:
        return None
    key, item = found[0]
    selection = parse_gpu_key(key)
    if set(selection.keys) == set(keys) and (not selection.each or len(keys) == 1):
        return _replaced(text, item.node.span, _like(text, item.node.span, value))
    if not selection.each or len(keys) > 1:
        raise MicError(
            f'cannot change {_shown(keys)}: the file has "{key}" in one entry',
            hint=f"edit it by hand, in line {item.location.line}",
        )
    return _split(text, _is_flow(text, section), str(key), item, keys[0], value)


def _split(text: str, flow: bool, name: str, item: Entry, gpu: GpuKey, value: str) -> str | None:
    """A range becomes what is before the GPU, the GPU, and what is after it."""
    first, last = (int(part) for part in name.split("-"))
    index, key_span, span = int(gpu.value), item.span, item.node.span
    whole = key_span[0], span[1]
    between, old = text[key_span[1] : span[0]], text[span[0] : span[1]]
    ours = _like(text, span, value)
    parts = [
        (_range_like(text, key_span, start, end, flow), ours if start == index else old)
        for start, end in ((first, index - 1), (index, index), (index + 1, last))
        if start <= end
    ]
    if flow:
        return _replaced(text, whole, ", ".join(f"{key}{between}{one}" for key, one in parts))
    (key, one), *rest = parts
    head = _replaced(text, whole, f"{key}{between}{one}")
    end = span[1] + len(head) - len(text)
    return _with_lines(head, whole[0], end, [f"{key}: {one}" for key, one in rest])


def _added(text: str, section: Entry | None, keys: tuple[GpuKey, ...], value: str) -> str | None:
    name = ",".join(key.value for key in keys)
    plain = len(keys) == 1 and keys[0].kind != "pci"
    key = name if plain else f'"{name}"'
    pair = f"{key}: {_plain_or_quoted(value)}"
    if section is None:
        end = _line_end_of(text)
        gap = "" if not text or text.endswith("\n") else end
        return f"{text}{gap}gpus:{end}{_INDENT}{pair}{end}"
    if section.node.value is None:
        line_start = text.rfind("\n", 0, section.span[1]) + 1
        return _with_lines(text, line_start, section.span[1], [f"{_INDENT}{pair}"])
    if not section.node.entries:
        start = section.node.span[0] + 1
        return _replaced(text, (start, start), pair)
    last = list(section.node.entries.values())[-1]
    start, end_of_last = last.span[0], last.node.span[1]
    if not _is_flow(text, section):
        return _with_lines(text, start, end_of_last, [pair])
    if text[start] == '"':
        key = f'"{name}"'
    pair = f"{key}: {_like(text, last.node.span, value)}"
    return _replaced(text, (end_of_last, end_of_last), f", {pair}")


# --- texts --------------------------------------------------------------------------------------


def _with_lines(text: str, start: int, end: int, lines: list[str]) -> str | None:
    """`lines` below the one in which the offset `end` is, indented as the offset `start` is.

    None where something else stands before `start` in its line.
    """
    indent = text[text.rfind("\n", 0, start) + 1 : start]
    if indent.strip(" "):
        return None
    at = text.find("\n", end)
    at = len(text) if at < 0 else at
    if text[at - 1 : at] == "\r":
        at -= 1
    new = _line_end_of(text)
    return text[:at] + "".join(f"{new}{indent}{line}" for line in lines) + text[at:]


def _line_end_of(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _replaced(text: str, span: tuple[int, int], new: str) -> str:
    return text[: span[0]] + new + text[span[1] :]


def _like(text: str, span: tuple[int, int], value: str) -> str:
    """`value` as it would stand in the place of another: a file that is JSON stays it."""
    quote = text[span[0]]
    return f"{quote}{value}{quote}" if quote in "\"'" else _plain_or_quoted(value)


def _range_like(text: str, span: tuple[int, int], first: int, last: int, flow: bool) -> str:
    name = f"{first}-{last}" if last > first else str(first)
    quote = text[span[0]]
    # An index needs no quotes, but JSON does.
    if quote in "\"'" and (last > first or (flow and quote == '"')):
        return f"{quote}{name}{quote}"
    return name


def _plain_or_quoted(value: str) -> str:
    return value if resolve(value) == (value, None) else f'"{value}"'


def _gpus(text: str, profile: str | None = None) -> Entry | None:
    """The entry `gpus:`, of a profile or of the file; None where there is none, or the text is not
    valid."""
    node = _root(text)
    for key in () if profile is None else ("profiles", profile):
        entry = node.entries.get(key) if node is not None else None
        node = entry.node if entry is not None else None
    return node.entries.get("gpus") if node is not None else None


def _root(text: str) -> Node | None:
    """The document; None where it is empty, or not valid."""
    report = Report("load gpus.yaml")
    report.lines["gpus.yaml"] = text.split("\n")
    root = parse(text, "gpus.yaml", report, Budget())
    return root if not report else None


def _is_flow(text: str, section: Entry) -> bool:
    return text[section.node.span[0]] == "{"


def _meaning(text: str, profile: str | None) -> Mapping[frozenset[GpuKey], Any]:
    """What `gpus:` says, of a profile or of the file, ranges expanded; empty where it cannot be
    read."""
    section = _gpus(text, profile)
    return {
        frozenset(keys): item.node.value
        for key, item in (section.node.entries.items() if section is not None else ())
        for keys in parse_gpu_key(key).expand()
    }


LOCK_TIMEOUT = 10.0  # seconds for another edit to be over
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
        hint = hint_to_replace(self._path, error) or _hint(error)
        return MicError(f"cannot write {self._path}: {cause_of(error)}", hint=hint)


@contextmanager
def locked(path: Path, timeout: float = LOCK_TIMEOUT) -> Iterator[LockedFile]:
    """The file that `path` is, or leads to, for as long as nobody else may edit it.

    Raises MicError, and LockHeld after `timeout` seconds.
    """
    real, handle = _open(path, time.monotonic() + timeout)
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
    if isinstance(error, FileNotFoundError):
        return NO_FILE
    if isinstance(error, PermissionError):
        return "run as root, or as the user that the file belongs to"
    return None
