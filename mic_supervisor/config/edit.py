"""Changes one entry under `gpus:`, and leaves every other byte of the file as it is.

Nothing is written by a YAML library, which would lay the file out anew: the places of keys and
values come from PyYAML's parser, and the text between them is copied. What comes out is read again
and must say what was meant, or nothing is done: a layout that is not understood is left to people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mic_supervisor.config.diagnostics import Report
from mic_supervisor.config.document import GpuKey
from mic_supervisor.config.gpu_keys import parse_gpu_key
from mic_supervisor.config.merge import NONE
from mic_supervisor.config.scalars import resolve
from mic_supervisor.config.yaml_reader import Budget, parse
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.config.document import GpuEntry

_INDENT = "  "  # below a `gpus:` that has no entry yet


@dataclass(frozen=True, slots=True)
class _Item:
    """One `key: value` below `gpus:`; offsets into the text, ends exclusive."""

    name: str  # what the key says, whatever its quotes
    key: tuple[int, int]
    value: tuple[int, int]
    line: int
    column: int


@dataclass(slots=True)
class _Section:
    """Where `gpus:` stands. `start` is where its value begins, or the end of a key without one."""

    kind: Literal["missing", "empty", "block", "flow"] = "missing"
    start: int = 0
    items: list[_Item] = field(default_factory=list)


def assign(text: str, entry: GpuEntry | None, keys: tuple[GpuKey, ...], model: str | None) -> str:
    """`text` with `model` on the GPUs `keys`; None keeps them empty.

    `entry` is an entry of this file that has any of these GPUs, as it was loaded from this very
    text; None: it has none yet. One GPU may be taken out of a range. The text must be valid. What
    changes gets a line end at its end: without one, the file may have been cut. Raises MicError for
    a part of a group, and where the layout defeats this.
    """
    value = NONE if model is None else model
    after = _splice(text, entry, keys, value)
    if after is not None and after != text and not after.endswith("\n"):
        after += _line_end_of(after)
    if after is None or _meaning(after) != {**_meaning(text), frozenset(keys): value}:
        raise MicError(
            "cannot edit the file: the way its `gpus:` is laid out is not understood",
            hint=f"edit it by hand: under gpus:, set {_shown(keys)} to {value}",
        )
    return after


def _shown(keys: tuple[GpuKey, ...]) -> str:
    return ", ".join(map(str, keys))


def _splice(text: str, entry: GpuEntry | None, keys: tuple[GpuKey, ...], value: str) -> str | None:
    section = _locate(text)
    if entry is None:
        return _added(text, section, keys, value)
    for item in section.items:
        if (item.line, item.column) == (entry.place.line, entry.place.column):
            break
    else:
        return None
    selection = parse_gpu_key(item.name)
    if set(selection.keys) == set(keys) and (not selection.each or len(keys) == 1):
        return _replaced(text, item.value, _like(text, item.value, value))
    if not selection.each or len(keys) > 1:
        raise MicError(
            f'cannot change {_shown(keys)}: the file has "{item.name}" in one entry',
            hint=f"edit it by hand, in line {item.line}",
        )
    return _split(text, section, item, int(keys[0].value), value)


def _split(text: str, section: _Section, item: _Item, index: int, value: str) -> str | None:
    """A range becomes what is before the index, the index, and what is after it."""
    first, last = (int(part) for part in item.name.split("-"))
    flow = section.kind == "flow"
    between, old = text[item.key[1] : item.value[0]], _slice(text, item.value)
    ours = _like(text, item.value, value)
    parts = [
        (_range_like(text, item.key, start, end, flow), ours if start == index else old)
        for start, end in ((first, index - 1), (index, index), (index + 1, last))
        if start <= end
    ]
    if flow:
        joined = ", ".join(f"{key}{between}{name}" for key, name in parts)
        return _replaced(text, (item.key[0], item.value[1]), joined)
    (key, name), *rest = parts
    head = _replaced(text, (item.key[0], item.value[1]), f"{key}{between}{name}")
    grown = len(head) - len(text)
    return _with_lines(
        head, item.key[0], item.value[1] + grown, [f"{key}: {name}" for key, name in rest]
    )


def _added(text: str, section: _Section, keys: tuple[GpuKey, ...], value: str) -> str | None:
    name = ",".join(key.value for key in keys)
    plain = len(keys) == 1 and keys[0].kind != "pci"
    key = name if plain else f'"{name}"'
    pair = f"{key}: {_plain_or_quoted(value)}"
    if section.kind == "missing":
        end = _line_end_of(text)
        gap = "" if not text or text.endswith("\n") else end
        return f"{text}{gap}gpus:{end}{_INDENT}{pair}{end}"
    if section.kind == "empty":
        line_start = text.rfind("\n", 0, section.start) + 1
        return _with_lines(text, line_start, section.start, [f"{_INDENT}{pair}"])
    if not section.items:
        return _replaced(text, (section.start + 1, section.start + 1), pair)
    last = section.items[-1]
    if section.kind == "block":
        return _with_lines(text, last.key[0], last.value[1], [pair])
    if text[last.key[0]] == '"':
        key = f'"{name}"'
    pair = f"{key}: {_like(text, last.value, value)}"
    return _replaced(text, (last.value[1], last.value[1]), f", {pair}")


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


def _slice(text: str, span: tuple[int, int]) -> str:
    return text[span[0] : span[1]]


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


# --- places -------------------------------------------------------------------------------------


def _locate(text: str) -> _Section:
    """Where the entries of `gpus:` stand. The text is known to be valid."""
    import yaml
    from yaml.events import MappingEndEvent, MappingStartEvent, ScalarEvent

    events: Any = yaml.parse(text, Loader=yaml.SafeLoader)
    key: Any
    value: Any
    for event in events:
        if isinstance(event, MappingStartEvent):
            break
    while True:
        key = next(events, None)
        if key is None or isinstance(key, MappingEndEvent):
            return _Section()
        end = key.end_mark.index
        value = next(events)
        if isinstance(key, ScalarEvent) and key.value == "gpus":
            break
        _skip(value, events)
    if isinstance(value, ScalarEvent):
        return _Section("empty", end)
    section = _Section("flow" if value.flow_style else "block", value.start_mark.index)
    while not isinstance(key := next(events), MappingEndEvent):
        value = next(events)
        start, end = key.start_mark, key.end_mark
        section.items.append(
            _Item(
                key.value,
                (start.index, end.index),
                (value.start_mark.index, value.end_mark.index),
                start.line + 1,
                start.column + 1,
            )
        )
    return section


def _skip(event: Any, events: Any) -> None:
    """The rest of the value that begins with `event`."""
    from yaml.events import CollectionEndEvent, CollectionStartEvent

    depth = int(isinstance(event, CollectionStartEvent))
    while depth:
        event = next(events)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)


def _meaning(text: str) -> Mapping[frozenset[GpuKey], Any]:
    """What `gpus:` says, ranges expanded; empty where it cannot be read."""
    report = Report("load gpus.yaml")
    report.lines["gpus.yaml"] = text.split("\n")
    root = parse(text, "gpus.yaml", report, Budget())
    found: dict[frozenset[GpuKey], Any] = {}
    entry = root.entries.get("gpus") if root is not None and not report else None
    for key, item in entry.node.entries.items() if entry is not None else ():
        for keys in parse_gpu_key(key).expand():
            found[frozenset(keys)] = item.node.value
    return found
