"""What a YAML file holds: a tree of plain values, each with its place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mic_supervisor.config.document import Place

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class Entry:
    """One `key: value` of a mapping."""

    place: Place  # of the key
    node: Node


@dataclass(slots=True)
class Node:
    """A value and where it stands.

    `sound` False: an error was already reported for it, and what is wrong with its value is a
    consequence. `span` is where a scalar stands in `text`, quotes included.
    """

    place: Place
    value: Scalar | list[Node] | dict[str | int, Entry]
    sound: bool = True
    text: str = field(default="", repr=False)
    span: tuple[int, int] = (0, 0)

    @property
    def entries(self) -> dict[str | int, Entry]:
        """The entries of a mapping; empty for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    def plain(self) -> Any:
        """The value as plain data; whole numbers as keys become text, nulls stay."""
        if isinstance(self.value, dict):
            return {str(key): entry.node.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def column_of(self, number: int) -> Place:
        """The place of the `number`-th "${" (from 0) in a scalar.

        Falls back to the scalar's own place where escapes hide the text's own form.
        """
        start, end = self.span
        raw = self.text[start:end]
        found = [match.start() for match in re.finditer(r"\$\{", raw)]
        if not isinstance(self.value, str) or len(found) != self.value.count("${"):
            return self.place
        before = raw[: found[number]]
        lines = before.count("\n")
        if lines == 0:
            return Place(self.place.file, self.place.line, self.place.column + len(before))
        column = len(before) - before.rindex("\n")
        return Place(self.place.file, self.place.line + lines, column)
