"""Writes a first gpus.yaml: the text of a file that a person goes on with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

_WIDTH = 96
# What every YAML reader takes for this very text. Whatever else there is goes into quotes.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@+-]*(:[A-Za-z0-9_./@+-]+)*")
_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "none"))


@dataclass(frozen=True, slots=True)
class DraftModel:
    """`notes` become comments. `commented`: the entry itself, too, for that reason."""

    name: str
    entry: Mapping[str, Any]
    notes: Sequence[str] = ()
    commented: str | None = None


@dataclass(frozen=True, slots=True)
class DraftGpu:
    """One line under `gpus:`. `key` is an index, or several set off by commas."""

    key: str
    model: str | None
    notes: Sequence[str] = ()
    commented: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """`examples` is YAML that is written as comments."""

    title: str
    gpus: Sequence[DraftGpu]
    models: Sequence[DraftModel] = ()
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    examples: str = ""


def render(draft: Draft) -> str:
    """The whole file. What is not commented out is read as it was meant, or refused by `check`."""
    out = [
        "# yaml-language-server: $schema=/usr/share/mic/gpus.schema.json",
        "#",
        *(f"# {line}".rstrip() for line in draft.title.splitlines()),
        "",
        "version: 1",
        "",
    ]
    if draft.backends:
        out += ["backends:                       # settings of a backend on this host"]
        for name, settings in draft.backends.items():
            out += [f"  {name}:", *_entries(settings, 4)]
        out.append("")
    live = [model for model in draft.models if model.commented is None]
    title = "models:                         # what may run: name -> backend and its options"
    if draft.models:
        out.append(title if live else f"# {title}")
    for model in draft.models:
        out += _comments(model.notes)
        mark = "  " if model.commented is None else "  # "
        if model.commented is not None:
            out += _comments([f"Not usable as it is: {model.commented}"])
        out.append(f"{mark}{scalar(model.name)}:")
        out += [mark + line[2:] for line in _entries(model.entry, 4)]
        out.append("")
    if draft.examples:
        out += ["", "# --- Examples. Take away the first two characters of what you need.", "#"]
        out += [f"# {line}".rstrip() for line in draft.examples.splitlines()]
    out += [
        "",
        "# What should run where, by index, UUID or PCI bus id. `none` keeps a GPU empty: nothing",
        "# is started there, and no stranger is stopped. A GPU that is not listed is left alone.",
        "gpus:",
    ]
    for gpu in draft.gpus:
        out += _comments(gpu.notes)
        key = gpu.key if gpu.key.isdigit() else json.dumps(gpu.key)
        mark = "  # " if gpu.commented else "  "
        out.append(f"{mark}{key}: {'none' if gpu.model is None else scalar(gpu.model)}")
    return "\n".join(out) + "\n"


def _comments(notes: Sequence[str]) -> list[str]:
    return [
        f"  # {line}"
        for note in notes
        for line in wrap(note, _WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    ]


def _entries(values: Mapping[str, Any], indent: int) -> list[str]:
    out = []
    for key, value in values.items():
        head = f"{' ' * indent}{key}: "
        short = head + inline(value)
        if len(short) <= _WIDTH or not isinstance(value, list | tuple):
            out.append(short)
            continue
        out.append(f"{' ' * indent}{key}:")
        out += [f"{' ' * indent}  - {inline(item)}" for item in value]
    return out


def inline(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(k)}: {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
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
