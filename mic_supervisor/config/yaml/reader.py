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
from mic_supervisor.config.document import Place
from mic_supervisor.config.names import composed
from mic_supervisor.config.yaml import Entry, Node
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
        report.add(At(place), "an escape or a directive holds a number that is out of range")
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

    def _place(self, event: Any) -> Place:
        mark = event.start_mark
        return Place(self._file, mark.line + 1, mark.column + 1)

    def _add(self, event: Any, path: str, message: str, hint: str | None = None) -> None:
        self._report.add(At(self._place(event), path), message, hint=hint)

    def _stop(self, event: Any, message: str) -> NoReturn:
        self._add(event, "", message)
        raise _Stop

    def _node(self, event: Any, path: str, depth: int) -> Node:
        self._budget.nodes -= 1
        if self._budget.nodes < 0:
            self._stop(event, f"cannot read on: more than {MAX_NODES} keys and values")
        if depth > MAX_DEPTH:
            self._stop(event, f"cannot read on: nested more than {MAX_DEPTH} deep")
        node = Node(self._place(event), path, None, self._check_properties(event, path))
        node.span = _span(event)
        if isinstance(event, ScalarEvent):
            self._scalar(event, node)
        elif isinstance(event, MappingStartEvent):
            node.value = self._mapping(node, depth)
        elif isinstance(event, SequenceStartEvent):
            node.value = self._sequence(path, depth)
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
        elif event.style is None:
            node.value, surprise = resolve(event.value)
            if surprise is not None and node.sound:
                problem, hint = surprise, "quote it if a text is meant"
        elif "\0" in event.value or not _encodable(event.value):
            node.value, problem = "", "the text holds a character that no program takes"
        if problem is not None:
            self._add(event, node.path, problem, hint)
            node.sound = False

    def _sequence(self, path: str, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := self._loader.get_event(), SequenceEndEvent):
            items.append(self._node(event, dotted(path, len(items)), depth + 1))
        return items

    def _mapping(self, mapping: Node, depth: int) -> dict[str | int, Entry]:
        entries: dict[str | int, Entry] = {}
        while not isinstance(event := self._loader.get_event(), MappingEndEvent):
            key = self._key(event, mapping.path, depth)
            mapping.whole = mapping.whole and key is not None
            # Where a key is a map or a list, no map was meant: "{{ template }}".
            mapping.sound = mapping.sound and isinstance(event, ScalarEvent)
            path = dotted(mapping.path, "?" if key is None else str(key))
            node = self._node(self._loader.get_event(), path, depth + 1)
            if key in entries:
                first = entries[key].place.line
                self._add(event, path, f"stands here twice, first in line {first}")
            elif key is not None:
                entries[key] = Entry(self._place(event), node, _span(event))
        return entries

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
        elif not node.sound:
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


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, from an escape
        return False
    return True


# --- The text of a file -------------------------------------------------------------------------

MAX_BYTES = 256 * 1024

# What YAML calls printable, less what it counts as the end of a line and no editor does (NEL, LS,
# PS, a lone CR): places would be wrong after it.
_UNFIT = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd"
    "\U00010000-\U0010ffff]|\r(?!\n)"
)


def read_text(path: Path, report: Report) -> str | None:
    """The text of a regular file, or None after reporting why not. Never blocks on a FIFO."""
    report.lines.setdefault(str(path), [])
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return text_of(file.read(MAX_BYTES + 1), path, report)
            problem = "it is not a regular file"
    except IsADirectoryError:
        problem = "it is a directory"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problem = cause_of(error)
    report.add(At(Place(str(path))), f"cannot read the file: {problem}")
    return None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def text_of(data: bytes, path: Path, report: Report) -> str | None:
    """The text of a file that holds `data`, or None after reporting why it has none."""
    file = str(path)
    report.lines.setdefault(file, [])
    if len(data) > MAX_BYTES:
        problem = f"cannot read the file: it is larger than {MAX_BYTES // 1024} KiB"
        report.add(At(Place(file)), problem)
        return None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        problem = "cannot read the file: it is UTF-16"
        report.add(At(Place(file, 1, 1)), problem, hint="save it as UTF-8")
        return None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        report.lines[file] = data.decode("utf-8", "replace").split("\n")
        place = _place_of(file, data[: error.start].decode("utf-8"))
        problem = f"the byte 0x{data[error.start]:02x} is not UTF-8"
        report.add(At(place), problem, hint="save the file as UTF-8")
        return None
    report.lines[file] = [line.removesuffix("\r") for line in text.split("\n")]
    bad = _UNFIT.search(text)
    if bad is not None:
        number = ord(bad[0])
        hint = f'inside double quotes it can be written as "\\u{number:04x}"'
        report.add(
            At(_place_of(file, text[: bad.start()])),
            f"the character U+{number:04X} cannot stand here",
            hint=hint if 0 < number < 0x10000 else None,
        )
        return None
    return text


def _place_of(file: str, before: str) -> Place:
    """The place after the text `before`."""
    return Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))


def cause_of(error: OSError | ValueError) -> str:
    """What the system says, as the end of a sentence."""
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return cause[:1].lower() + cause[1:]
