"""Strict YAML: what could be read in two ways is an error, and every value keeps its place.

PyYAML's scanner and parser deliver events; the tree is built here, so that a repeated key, an alias
or a bare `on` is reported instead of resolved, all of them in one pass, and so that depth and size
have bounds. The scalar rules take YAML 1.1 and 1.2 together: a text that either of them reads as
something else than text or a plain decimal number has to be quoted.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from mic_supervisor.config.diagnostics import Report, dotted, show
from mic_supervisor.config.document import Place
from mic_supervisor.config.yaml import Entry, Node, Scalar
from mic_supervisor.config.yaml.words import report_syntax_error, resolve

MAX_NODES = 10_000
MAX_DEPTH = 32
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
        place = Place(file, loader.line + 1, loader.column + 1)
        report.add(place, "", "an escape or a directive holds a number that is out of range")
        return None
    finally:
        loader.dispose()


class _Builder:
    """Builds the tree of one document. `_path` holds the keys on the way to the current value."""

    def __init__(self, text: str, file: str, report: Report, loader: Any, budget: Budget) -> None:
        self._text = text
        self._file = file
        self._report = report
        self._loader = loader
        self._budget = budget
        self._path: list[str | int] = []

    def document(self) -> Node | None:
        root = None
        documents = 0
        while self._loader.check_event():
            event = self._loader.get_event()
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._add(event, "a second document begins here: one file holds one document")
                    raise _Stop
            elif isinstance(event, (AliasEvent, ScalarEvent, CollectionStartEvent)):
                root = self._node(event, 1)
        if root is not None and root.value is None and root.span[0] == root.span[1]:
            return None  # "---" and nothing else
        return root

    def _place(self, event: Any) -> Place:
        mark = event.start_mark
        return Place(self._file, mark.line + 1, mark.column + 1)

    def _add(self, event: Any, message: str, *, hint: str | None = None) -> None:
        path = ""
        for key in self._path:
            path = dotted(path, key)
        self._report.add(self._place(event), path, message, hint=hint)

    def _node(self, event: Any, depth: int) -> Node:
        self._budget.nodes -= 1
        if self._budget.nodes < 0:
            self._path.clear()
            self._add(event, f"cannot read on: more than {MAX_NODES} keys and values")
            raise _Stop
        if depth > MAX_DEPTH:
            self._path.clear()
            self._add(event, f"cannot read on: nested more than {MAX_DEPTH} deep")
            raise _Stop
        sound = self._check_properties(event)
        if isinstance(event, ScalarEvent):
            return self._scalar(event, sound)
        node = Node(self._place(event), None, sound)
        if isinstance(event, MappingStartEvent):
            node.value = self._mapping(node, depth)
        elif isinstance(event, SequenceStartEvent):
            node.value = self._sequence(depth)
        return node

    def _check_properties(self, event: Any) -> bool:
        if isinstance(event, AliasEvent):
            self._add(event, f"*{event.anchor}: aliases are not used here", hint="write it out")
            return False
        if event.anchor is not None:
            self._add(event, f"&{event.anchor}: anchors are not used here", hint="remove it")
        if event.tag is not None:
            short = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._add(event, f"{short}: tags are not used here", hint="remove it")
            return False
        return True

    def _scalar(self, event: Any, sound: bool) -> Node:
        value: Scalar = event.value
        if len(event.value) > MAX_SCALAR:
            self._add(event, f"the text is longer than {MAX_SCALAR} characters")
            value, sound = "", False
        elif event.style is None:
            value, problem = resolve(event.value)
            if problem is not None and sound:
                self._add(event, problem, hint="quote it if a text is meant")
                sound = False
        elif "\0" in event.value or not _encodable(event.value):
            self._add(event, "the text holds a character that no program takes")
            value, sound = "", False
        span = (event.start_mark.index, event.end_mark.index)
        return Node(self._place(event), value, sound, text=self._text, span=span)

    def _sequence(self, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := self._loader.get_event(), SequenceEndEvent):
            self._path.append(len(items))
            items.append(self._node(event, depth + 1))
            self._path.pop()
        return items

    def _mapping(self, mapping: Node, depth: int) -> dict[str | int, Entry]:
        entries: dict[str | int, Entry] = {}
        while not isinstance(event := self._loader.get_event(), MappingEndEvent):
            key = self._key(event, depth)
            mapping.whole = mapping.whole and key is not None
            # Where a key is a map or a list, no map was meant: "{{ template }}".
            mapping.sound = mapping.sound and isinstance(event, ScalarEvent)
            self._path.append("?" if key is None else str(key))
            node = self._node(self._loader.get_event(), depth + 1)
            if key in entries:
                first = entries[key].place.line
                self._add(event, f"stands here twice, first in line {first}")
            elif key is not None:
                entries[key] = Entry(self._place(event), node)
            self._path.pop()
        return entries

    def _key(self, event: Any, depth: int) -> str | int | None:
        """The key, or None after reporting that it is none."""
        if isinstance(event, ScalarEvent) and event.style is None and event.value == "<<":
            self._add(event, "<<: merge keys are not used here", hint="write the keys out")
            return None
        node = self._node(event, depth + 1)
        value = node.value
        if isinstance(value, (dict, list)):
            hint = None
            if self._text.startswith("{{", max(0, event.start_mark.index - 1)):
                hint = "quote a text that begins with a brace; there are no templates here"
            self._add(event, "a key must be a text, not a map or a list", hint=hint)
            return None
        if not node.sound:
            return None
        if value is None:
            self._add(event, "a key is missing before the ':'")
            return None
        if isinstance(value, (bool, float)):
            self._add(event, f"the key {show(value)} must be a text", hint="quote it")
            return None
        if isinstance(value, str) and not value.isascii():
            from unicodedata import normalize

            return normalize("NFC", value)
        return value


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, from an escape
        return False
    return True


MAX_BYTES = 256 * 1024

# What YAML calls printable, less what it counts as the end of a line and no editor does (NEL, LS,
# PS, a lone CR): places would be wrong after it.
_UNFIT = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd"
    "\U00010000-\U0010ffff]|\r(?!\n)"
)


def read_text(path: Path, report: Report) -> str | None:
    """The text of a regular file, or None after reporting why not. Never blocks on a FIFO."""
    file = str(path)
    report.lines.setdefault(file, [])
    whole = Place(file, 0, 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                what = "it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file"
                report.add(whole, "", f"cannot read the file: {what}")
                return None
            data = b""
            while len(data) <= MAX_BYTES and (part := os.read(descriptor, MAX_BYTES + 1)):
                data += part
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        report.add(whole, "", f"cannot read the file: {cause_of(error)}")
        return None
    return text_of(data, path, report)


def text_of(data: bytes, path: Path, report: Report) -> str | None:
    """The text of a file that holds `data`, or None after reporting why it has none."""
    file = str(path)
    report.lines.setdefault(file, [])
    if len(data) > MAX_BYTES:
        message = f"cannot read the file: it is larger than {MAX_BYTES // 1024} KiB"
        report.add(Place(file, 0, 0), "", message)
        return None
    return _decode(data, file, report)


def cause_of(error: OSError | ValueError) -> str:
    """What the system says, as the end of a sentence."""
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return cause[:1].lower() + cause[1:]


def _decode(data: bytes, file: str, report: Report) -> str | None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        report.add(
            Place(file, 1, 1), "", "cannot read the file: it is UTF-16", hint="save it as UTF-8"
        )
        return None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        line = data.count(b"\n", 0, error.start) + 1
        before = data[line_start : error.start].decode("utf-8")
        report.lines[file] = data.decode("utf-8", "replace").split("\n")
        report.add(
            Place(file, line, len(before) + 1),
            "",
            f"the byte 0x{data[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        )
        return None
    report.lines[file] = [line.removesuffix("\r") for line in text.split("\n")]
    bad = _UNFIT.search(text)
    if bad is not None:
        line = text.count("\n", 0, bad.start()) + 1
        column = bad.start() - text.rfind("\n", 0, bad.start())
        report.add(
            Place(file, line, column),
            "",
            f"the character U+{ord(bad[0]):04X} cannot stand here",
            hint=f'inside double quotes it can be written as "\\u{ord(bad[0]):04x}"'
            if 0 < ord(bad[0]) < 0x10000
            else None,
        )
        return None
    return text
