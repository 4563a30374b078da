"""Strict YAML, as a tree of plain values: what could be read in two ways is an error, and every
value keeps its place.

PyYAML's scanner and parser deliver events; the tree is built here, so that a repeated key, an alias
or a bare `on` is reported instead of resolved, all of them in one pass, and so that depth and size
have bounds. The scalar rules take YAML 1.1 and 1.2 together: a text that either of them reads as
something else than text or a plain decimal number has to be quoted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from mic_supervisor.config.diagnostics import At, Report, dotted, show
from mic_supervisor.config.document import Location
from mic_supervisor.config.names import composed
from mic_supervisor.config.syntax import COLON_AND_BLANK, report_syntax_error, unspaced
from mic_supervisor.text import unseen

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class Entry:
    """One `key: value` of a mapping; `span` is the key's, as a node's is."""

    location: Location  # of the key
    node: Node
    span: tuple[int, int] = (0, 0)
    source: str = ""  # the key as it is spelt

    @property
    def path(self) -> str:
        return self.node.path


@dataclass(slots=True)
class Node:
    """A value and where it stands: its location in the file, its path in the document.

    `valid` False: an error was already reported for it, and what is wrong with its value is a
    consequence. `whole` False: an entry was left out of a map, since its key is none. `span` is
    where it stands in `text`, quotes included; of a map or a list, only its beginning counts.
    """

    location: Location
    path: str
    value: Scalar | list[Node] | dict[str | int, Entry]
    valid: bool = True
    whole: bool = True
    text: str = field(default="", repr=False)
    span: tuple[int, int] = (0, 0)

    @property
    def entries(self) -> dict[str | int, Entry]:
        """The entries of a mapping; empty for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def branching(self) -> bool:
        """Whether it is a map or a list."""
        return isinstance(self.value, (dict, list))

    @property
    def shown(self) -> str:
        """The value inside a message."""
        if self.branching:
            return "a map" if isinstance(self.value, dict) else "a list"
        return show(self.value)

    def below(self) -> Iterator[Node]:
        """The values of a map, the items of a list."""
        if isinstance(self.value, list):
            yield from self.value
        for entry in self.entries.values():
            yield entry.node

    def moved(self, path: str) -> Node:
        """The same, at another path of the document."""
        if not isinstance(self.value, dict):
            return replace(self, path=path)
        moved: dict[str | int, Entry] = {
            key: Entry(entry.location, entry.node.moved(dotted(path, str(key))))
            for key, entry in self.value.items()
        }
        return replace(self, path=path, value=moved)

    def plain(self) -> Any:
        """The value as plain data; whole numbers as keys become text, nulls stay."""
        if isinstance(self.value, dict):
            return {str(key): entry.node.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def locations_of(self, mark: str) -> list[Location]:
        """The location of each `mark` in a scalar's value, in order.

        All are the scalar's own location where escapes hide the text's own form.
        """
        count = self.value.count(mark) if isinstance(self.value, str) else 0
        start, end = self.span
        parts = self.text[start:end].split(mark)
        if len(parts) != count + 1:
            return [self.location] * count
        locations = []
        line, column = self.location.line, self.location.column
        for part in parts[:-1]:
            lines = part.count("\n")
            column = len(part) - part.rindex("\n") if lines else column + len(part)
            line += lines
            locations.append(Location(self.location.file, line, column))
            column += len(mark)
        return locations


# --- from text to a tree ------------------------------------------------------------------------

MAX_NODES = 10_000
MAX_DEPTH = 32
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # a NUL, and half a surrogate: both from escapes
MAX_SCALAR = 64 * 1024
"""Characters of one text; Linux takes no argument or variable above 128 KiB (MAX_ARG_STRLEN)."""


@dataclass(slots=True)
class Budget:
    """What is left to be read, over all files of a configuration."""

    nodes: int = MAX_NODES


class _Stop(Exception):
    """The file cannot be read any further; why has been reported."""


def parse(text: str, file: str, report: Report, budget: Budget) -> Node | None:
    """The document as a tree; None for an empty document, or after reporting what broke it.

    `report.lines` must hold the file's lines, and `budget` is used up. Takes well under a second
    for any text that `read_text` lets through.
    """
    loader: Any = yaml.SafeLoader(text)
    try:
        return _Builder(text, file, report, loader, budget).document()
    except _Stop:
        return None
    except yaml.MarkedYAMLError as error:
        opened = loader.marks[-1] if loader.flow_level and loader.marks else None
        report_syntax_error(error, opened, file, report)
        return None
    except (ValueError, OverflowError):
        # PyYAML lets chr() and int() fail on escapes and directives out of their range.
        location = Location(file, loader.line + 1, loader.column + 1)
        report.add(At(location), "an escape or a directive holds a number that is out of range")
        return None
    finally:
        loader.dispose()


class _Builder:
    """Builds the tree of one document."""

    def __init__(self, text: str, file: str, report: Report, loader: Any, budget: Budget) -> None:
        self._text = text
        self._file = file
        self._report = report
        self._loader = loader
        self._budget = budget

    def document(self) -> Node | None:
        root = None
        documents = 0
        while self._loader.check_event():
            event = self._loader.get_event()
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._stop(event, "a second document begins here: one file holds one document")
            elif isinstance(event, (AliasEvent, ScalarEvent, CollectionStartEvent)):
                root = self._node(event, "", 1)
        if root is not None and root.value is None and root.span[0] == root.span[1]:
            return None  # "---" and nothing else
        return root

    def _location(self, event: Any) -> Location:
        mark = event.start_mark
        return Location(self._file, mark.line + 1, mark.column + 1)

    def _add(self, event: Any, path: str, message: str, hint: str | None = None) -> None:
        self._report.add(At(self._location(event), path), message, hint=hint)

    def _stop(self, event: Any, message: str) -> NoReturn:
        self._add(event, "", message)
        raise _Stop

    def _node(self, event: Any, path: str, depth: int) -> Node:
        self._budget.nodes -= 1
        if self._budget.nodes < 0:
            self._stop(event, f"cannot read on: more than {MAX_NODES} keys and values")
        if depth > MAX_DEPTH:
            self._stop(event, f"cannot read on: nested more than {MAX_DEPTH} deep")
        node = Node(self._location(event), path, None, self._check_properties(event, path))
        node.span = _span(event)
        if isinstance(event, ScalarEvent):
            self._scalar(event, node)
        elif isinstance(event, MappingStartEvent):
            node.value = self._mapping(node, depth)
        elif isinstance(event, SequenceStartEvent):
            node.value = self._sequence(path, depth)
            for item in node.value if event.flow_style else ():
                self._check_commas(item)
        return node

    def _check_properties(self, event: Any, path: str) -> bool:
        if isinstance(event, AliasEvent):
            self._add(event, path, f"*{event.anchor}: aliases are not used here", "write it out")
            return False
        if event.anchor is not None:
            self._add(event, path, f"&{event.anchor}: anchors are not used here", "remove it")
        if event.tag is not None:
            short = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._add(event, path, f"{short}: tags are not used here", "remove it")
        return event.tag is None

    def _scalar(self, event: Any, node: Node) -> None:
        node.value, node.text = event.value, self._text
        problem = hint = None
        if len(event.value) > MAX_SCALAR:
            node.value, problem = "", f"the text is longer than {MAX_SCALAR} characters"
        elif (there := unseen(self._text[slice(*node.span)])) is not None:
            problem = f"the text holds {there}, which nobody sees"
            code = int(there.split()[0][2:], 16)
            escape = f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
            hint = f'remove it; if it is meant, write it as "{escape}" between double quotes'
        elif event.style is None:
            node.value, surprise = resolve(event.value)
            if surprise is not None and node.valid:
                problem, hint = surprise, "quote it if a text is meant"
                if "a truth value" in surprise:
                    hint += "; if not, write true or false"
            elif _QUOTED.fullmatch(event.value):
                what = "these quotes are not YAML's, and so they are part of the text"
                plain = inline(event.value[1:-1])
                self._report.warn(At(node.location, node.path), what, hint=f"write `{plain}`")
        elif _UNUSABLE.search(event.value):
            node.value, problem = "", "the text holds a character that no program takes"
        if problem is not None:
            self._add(event, node.path, problem, hint)
            node.valid = False

    def _check_commas(self, item: Node) -> None:
        """`[a，b]` is a list of one text."""
        text = self._text[slice(*item.span)]
        if "，" in text and text[0] not in "\"'" and isinstance(item.value, str):
            parts = ", ".join(part.strip() for part in text.split("，"))
            self._report.warn(
                At(item.location, item.path),
                "a full-width comma parts no items: this is one text",
                hint=f"write `{parts}`, or `{inline(item.value)}` where one text is meant",
            )

    def _sequence(self, path: str, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := self._loader.get_event(), SequenceEndEvent):
            items.append(self._node(event, dotted(path, len(items)), depth + 1))
        return items

    def _mapping(self, mapping: Node, depth: int) -> dict[str | int, Entry]:
        entries: dict[str | int, Entry] = {}
        while not isinstance(event := self._loader.get_event(), MappingEndEvent):
            if self._check_unspaced(event, mapping):
                continue
            key = self._key(event, mapping.path, depth)
            mapping.whole = mapping.whole and key is not None
            # Where a key is a map or a list, no map was meant: "{{ template }}".
            mapping.valid = mapping.valid and isinstance(event, ScalarEvent)
            path = dotted(mapping.path, "?" if key is None else str(key))
            node = self._node(self._loader.get_event(), path, depth + 1)
            if key in entries:
                first = entries[key].location.line
                self._add(event, path, f"stands here twice, first in line {first}")
            elif key is not None:
                source = self._text[slice(*_span(event))]
                entries[key] = Entry(self._location(event), node, _span(event), source)
        return entries

    def _check_unspaced(self, event: Any, mapping: Node) -> bool:
        """Whether the key is a whole `0:MAM`, as between braces; reports it, and skips its value,
        which is empty."""
        if not isinstance(event, ScalarEvent) or event.style is not None:
            return False
        pair = unspaced(event.value)
        if pair is None or self._text[_span(event)[1] :].lstrip().startswith(":"):
            return False
        self._add(event, mapping.path, COLON_AND_BLANK, f"write `{pair}`")
        mapping.whole = False
        self._loader.get_event()
        return True

    def _key(self, event: Any, path: str, depth: int) -> str | int | None:
        """The key, or None after reporting that it is none."""
        if isinstance(event, ScalarEvent) and event.style is None and event.value == "<<":
            self._add(event, path, "<<: merge keys are not used here", "write the keys out")
            return None
        node = self._node(event, path, depth + 1)
        value = node.value
        if isinstance(value, (dict, list)):
            hint = None
            if self._text.startswith("{{", max(0, event.start_mark.index - 1)):
                hint = "quote a text that begins with a brace; there are no templates here"
            self._add(event, path, "a key must be a text, not a map or a list", hint)
        elif not node.valid:
            pass  # it has been said
        elif value is None:
            self._add(event, path, "a key is missing before the ':'")
        elif isinstance(value, (bool, float)):
            self._add(event, path, f"the key {show(value)} must be a text", "quote it")
        else:
            return composed(value) if isinstance(value, str) else value
        return None


def _span(event: Any) -> tuple[int, int]:
    return event.start_mark.index, event.end_mark.index


# --- which unquoted texts surprise ----------------------------------------------------------------

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_QUOTED = re.compile("[“‘].*[”’]", re.DOTALL)
_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]{0,17})\.[0-9]{1,17}")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False}
_BOOLEANS["FALSE"] = False

# Each is read as something else than text by YAML 1.1 or 1.2; the words say what as.
# Sources: yaml.org/type (bool, int, float, timestamp, value), YAML 1.2.2 chapter 10.3.
_SURPRISES = [
    (re.compile(pattern), what)
    for pattern, what in (
        (r"y|Y|yes|Yes|YES|n|N|no|No|NO|on|On|ON|off|Off|OFF", "a truth value"),
        (r"[-+]?0[0-9_]+|[-+]?0o[0-7_]+", "an octal number"),
        (r"[-+]?0x[0-9a-fA-F_]+", "a hexadecimal number"),
        (r"[-+]?0b[01_]+", "a binary number"),
        (r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?", "a number to base 60"),
        (r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "a number that is none"),
        (
            r"[0-9]{4}-[0-9][0-9]?-[0-9][0-9]?"
            r"(?:(?:[Tt]|[ \t]+)[0-9][0-9]?:[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?"
            r"(?:[ \t]*(?:Z|[-+][0-9][0-9]?(?::?[0-9]{2})?))?)?",
            "a date",
        ),
        (r"=", "a default value"),
        (r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?", "a number"),
    )
]


def resolve(text: str) -> tuple[str | int | float | bool | None, str | None]:
    """The value of an unquoted scalar, and what is surprising about it, None if nothing is.

    An empty text is None, and so is what every YAML reader takes for no value. A surprising one
    keeps its text as its value.
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None, None
    if text in _BOOLEANS:
        return _BOOLEANS[text], None
    if len(text) > 64:  # nothing that long is read as anything but text, and the rules stay cheap
        return text, None
    if _INTEGER.fullmatch(text):
        return int(text), None
    if _DECIMAL.fullmatch(text):
        return float(text), None
    for pattern, what in _SURPRISES:
        if pattern.fullmatch(text):
            return text, f"{text} is read as {what} by some YAML readers"
    return text, None


# --- from plain data to text ----------------------------------------------------------------------

# What every YAML reader takes for this very text. Whatever else there is goes into quotes.
_PLAIN = re.compile(
    r"-{0,2}[A-Za-z_/][A-Za-z0-9_./@+-]*(:[A-Za-z0-9_./@+-]+)*|[1-9][0-9]*[A-Za-z]{1,3}"
)
_NEVER_PLAIN = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "none"))


def inline(value: Any) -> str:
    """A value on one line, as a file may have it between brackets as well."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(k)}: {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    """As `inline`, for what is neither a map nor a list."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _NEVER_PLAIN:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    number = ord(char)
    if number <= 0xFF:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"
