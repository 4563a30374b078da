"""What is wrong with a configuration, all of it in one pass, in words and with its location."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, NoReturn, Protocol
from unicodedata import combining, east_asian_width

from mic_supervisor.config.document import Location
from mic_supervisor.errors import ConfigError
from mic_supervisor.text import printable

MAX_SHOWN = 100
"""Diagnostics that are rendered; the rest is counted. A broken file may hold thousands."""

_MAX_SUGGESTIONS = 20  # difflib is slow, and a file with more misspellings than this is no file
_MAX_CANDIDATES = 200
_MAX_WORD = 64
_MAX_MESSAGE = 400
_MAX_HINT = 2400  # what it says to write is to be copied whole
_WINDOW = 100  # columns of a source line that are shown
_PLAIN_PATH = re.compile(r"[\w.\[\]-]+")  # keys that look like keys: another text may be a secret


class Located(Protocol):
    """What stands somewhere in a file. `path` names it in the document, "models.MAM.port"; empty
    for the document itself."""

    @property
    def location(self) -> Location: ...

    @property
    def path(self) -> str: ...


class At(NamedTuple):
    """Somewhere in a file, where nothing that has a location of its own stands."""

    location: Location
    path: str = ""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One error, or one warning of a file that is valid. `location.line` 0: it concerns the file as
    a whole.

    `source` is the whole line that `location` points into, None where there is none to show.
    """

    location: Location
    path: str
    message: str
    source: str | None = None
    hint: str | None = None
    level: Literal["error", "warning"] = "error"

    @property
    def headline(self) -> str:
        """One line: "gpus.yaml:7:3: error: models.MAM: unknown backend 'tritn'"."""
        path = f"{self.path}: " if self.path else ""
        return f"{self.location}: {self.level}: {path}{self.message}"

    @property
    def outline(self) -> str:
        """One line for those who may not read the file: where it is, and not what stands there.

        The path may be a link to any file. So not even a key is shown that looks like none.
        """
        if not self.location.line and not self.path:
            return self.headline  # that it cannot be read, and why
        path = f"{self.path}: " if _PLAIN_PATH.fullmatch(self.path) else ""
        return f"{self.location}: error: {path}is not valid; `mic-supervisor check` says why"

    def render(self) -> str:
        lines = [self.headline]
        if self.source is not None and self.source.strip():
            lines += _excerpt(self.source, self.location.column)
        if self.hint is not None:
            lines.append(f"    {self.hint}")
        return "\n".join(lines)


class InvalidConfig(ConfigError):
    """A ConfigError that keeps its diagnostics, sorted by file, line and column."""

    def __init__(self, message: str, *, diagnostics: tuple[Diagnostic, ...]) -> None:
        super().__init__(
            message,
            rendered=_report(diagnostics, Diagnostic.render),
            outline=_report(diagnostics, lambda one: one.outline),
        )
        self.diagnostics = diagnostics


@dataclass(slots=True)
class Report:
    """Collects diagnostics. `purpose` is what cannot be done, "load gpus.yaml". `lines` holds the
    source of every file read, in the order of reading, which is also the order in which files are
    reported."""

    purpose: str
    lines: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[Diagnostic] = field(default_factory=list)
    _found: dict[tuple[Location, str, str], Diagnostic] = field(default_factory=dict)
    _suggestions: int = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(
        self,
        at: Located,
        message: str,
        *,
        hint: str | None = None,
        like: tuple[str, Iterable[str]] | None = None,
    ) -> None:
        """Record an error. `like` is a word and the names it might have meant; `hint` stands in
        where it resembles none of them."""
        if like is not None and self._suggestions < _MAX_SUGGESTIONS:
            self._suggestions += 1
            meant = closest(*like)
            hint = f"did you mean {meant}?" if meant is not None else hint
        made = self._made(at, message, hint)
        self._found.setdefault((made.location, made.path, made.message), made)

    def warn(self, at: Located, message: str, *, hint: str | None = None) -> None:
        """Record what `check` warns of: the file can be used all the same."""
        self.warnings.append(replace(self._made(at, message, hint), level="warning"))

    def _made(self, at: Located, message: str, hint: str | None) -> Diagnostic:
        location = at.location
        lines = self.lines.get(location.file, [])
        source = lines[location.line - 1] if 0 < location.line <= len(lines) else None
        message = _clip(printable(message), _MAX_MESSAGE)
        hint = _clip(printable(hint), _MAX_HINT) if hint is not None else None
        return Diagnostic(location, at.path, message, source, hint)

    def replace(self, file: str, at: Located, message: str, *, hint: str) -> None:
        """This one error of a file instead of all that were found in it."""
        self._found = {key: one for key, one in self._found.items() if key[0].file != file}
        self.add(at, message, hint=hint)

    def sorted(self) -> tuple[Diagnostic, ...]:
        order = {file: number for number, file in enumerate(self.lines)}
        return tuple(
            sorted(
                self._found.values(),
                key=lambda d: (order.get(d.location.file, -1), d.location, d.path, d.message),
            )
        )

    def fail(self) -> NoReturn:
        found = self.sorted()
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        first = found[0].headline.replace(": error: ", ": ", 1)
        raise InvalidConfig(f"cannot {self.purpose}: {first}{more}", diagnostics=found)


def _report(found: tuple[Diagnostic, ...], block: Callable[[Diagnostic], str]) -> str:
    blocks = [block(one) for one in found[:MAX_SHOWN]]
    if (more := len(found) - MAX_SHOWN) > 0:
        blocks.append(f"… and {more} more errors")
    return "\n".join(blocks) + "\n"


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that was probably meant, or None."""
    word = word[:_MAX_WORD]
    near = [name for name in candidates if abs(len(name) - len(word)) <= 5][:_MAX_CANDIDATES]
    for name in near:
        if name.casefold() == word.casefold() and name != word:
            return name
    matches = difflib.get_close_matches(word, near, n=1, cutoff=0.6)
    return matches[0] if matches else None


def dotted(path: str, key: str | int) -> str:
    """`path` extended by a key (text) or a list's index (int): models."a.b".command[2]."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    text = _clip(printable(key), _MAX_WORD)
    if not text or any(char in text for char in " .,:[]\"'"):
        text = f'"{text}"'
    return f"{path}.{text}" if path else text


def show(value: object) -> str:
    """A value inside a message: quoted if it is text, short, and harmless to a terminal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str) else str(value)
    return _clip(printable(text), _MAX_WORD)


def _clip(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}…{text[-half:]}"


def _excerpt(source: str, column: int) -> list[str]:
    """The line, or the part of a long one around `column`, and a caret below it."""
    start = max(0, column - 1 - _WINDOW * 2 // 3) if len(source) > _WINDOW else 0
    shown = source[start : start + _WINDOW].rstrip().replace("\t", " ")
    before = printable(source[start : column - 1].replace("\t", " "))
    lead, tail = "…" if start else "", "…" if start + _WINDOW < len(source) else ""
    pad = " " * (len(lead) + width(before))
    return [f"    {lead}{printable(shown)}{tail}", f"    {pad}^"]


def width(text: str) -> int:
    """Columns that `text` takes in a terminal: names may be in any script."""
    if text.isascii():
        return len(text)
    return sum(
        0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text
    )


def padded(text: str, columns: int) -> str:
    """`text` and blanks up to `columns`."""
    return text + " " * (columns - width(text))
