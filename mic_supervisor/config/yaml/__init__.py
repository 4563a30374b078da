"""What a YAML file holds: a tree of plain values, each with its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mic_supervisor.config.diagnostics import dotted
from mic_supervisor.config.document import Place

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class Entry:
    """One `key: value` of a mapping; `span` is the key's, as a node's is."""

    place: Place  # of the key
    node: Node
    span: tuple[int, int] = (0, 0)

    @property
    def path(self) -> str:
        return self.node.path


@dataclass(slots=True)
class Node:
    """A value and where it stands: its place in the file, its path in the document.

    `sound` False: an error was already reported for it, and what is wrong with its value is a
    consequence. `whole` False: an entry was left out of a map, since its key is none. `span` is
    where it stands in `text`, quotes included; of a map or a list, only its beginning counts.
    """

    place: Place
    path: str
    value: Scalar | list[Node] | dict[str | int, Entry]
    sound: bool = True
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
            key: Entry(entry.place, entry.node.moved(dotted(path, str(key))))
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

    def places_of(self, mark: str) -> list[Place]:
        """The place of each `mark` in a scalar's value, in order.

        All are the scalar's own place where escapes hide the text's own form.
        """
        count = self.value.count(mark) if isinstance(self.value, str) else 0
        start, end = self.span
        parts = self.text[start:end].split(mark)
        if len(parts) != count + 1:
            return [self.place] * count
        places = []
        line, column = self.place.line, self.place.column
        for part in parts[:-1]:
            lines = part.count("\n")
            column = len(part) - part.rindex("\n") if lines else column + len(part)
            line += lines
            places.append(Place(self.place.file, line, column))
            column += len(mark)
        return places
