"""What a measurement gives: tables with ratios, targets, and their text. Pure.

Less is better in every table: seconds, percent of a core, MiB. The first row of a table is ours,
and a ratio is how many times as much of that the row took: 2 is twice ours, and whoever has less
than 1 is ahead of us.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Unit = Literal["s", "ms", "%", "MiB", "threads"]

WIDTH = 100  # characters of a line of prose


class Cell(NamedTuple):
    """What the tries of one contender gave, in `unit`; there is at least one."""

    values: tuple[float, ...]
    unit: Unit

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        shown = amount(self.median, self.unit)
        if len(self.values) == 1:
            return shown
        least, most = (amount(one, self.unit) for one in (min(self.values), max(self.values)))
        return f"{shown} ({len(self.values)}: {least} to {most})"


def amount(value: float, unit: Unit) -> str:
    """With the digits that are of use: 12 ms, 0.124 s, 0.04 %, 65 MiB, 6 threads."""
    if unit in ("MiB", "threads"):
        return f"{value:.0f} {unit}"
    if unit == "%":
        return f"{value:.2f} %"
    before = len(str(int(value))) if value >= 1 else 0
    return f"{value:.{max(0, (3 if unit == 's' else 2) - before)}f} {unit}"


class Row(NamedTuple):
    """One contender; a cell is None where it has nothing of the kind.

    `why` says why it is ahead of us, in case it is. `ours`: it is another way of ours.
    """

    name: str
    cells: tuple[Cell | None, ...]
    why: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Sheet:
    """One table. `section` is where it goes on the page; the first row is ours.

    One of ours alone compares nothing: it has no ratios.
    """

    section: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    compares: bool = True

    def ratio(self, row: Row, column: int) -> float | None:
        """None: there is nothing to be compared."""
        if not self.compares:
            return None
        ours, its = self.rows[0].cells[column], row.cells[column]
        if ours is None or its is None or ours.median == 0:
            return None
        return its.median / ours.median

    def ahead(self) -> list[tuple[Row, list[str]]]:
        """Who needs less than we do, as the table shows it, with the columns in which it does."""
        found = []
        for row in (row for row in self.rows[1:] if not row.ours):
            columns = [
                name
                for at, name in enumerate(self.columns)
                if (ratio := self.ratio(row, at)) is not None and round(ratio, 2) < 1
            ]
            if columns:
                found.append((row, columns))
        return found

    def lines(self) -> list[str]:
        """Markdown: the table, and a sentence for each row that is ahead of ours."""
        beside = ["ratio"] if self.compares else []
        head = [cell for name in self.columns for cell in (name, *beside)]
        out = [f"**{self.title}**", "", _line(["", *head]), _line(["---", *("---" for _ in head)])]
        for row in self.rows:
            cells = [row.name]
            for at, cell in enumerate(row.cells):
                ratio = self.ratio(row, at)
                shown = "" if ratio is None else f"{ratio:.2f}"
                cells += [str(cell or ""), *(shown for _ in beside)]
            out.append(_line(cells))
        said = _points(
            f"{row.name} is ahead in: {', '.join(columns)}. "
            f"{row.why or 'The reason is not known yet.'}"
            for row, columns in self.ahead()
        )
        return [*out, "", *said]


def _points(texts: Iterable[str]) -> list[str]:
    """A list of these, and an empty line after it; none, nothing."""
    found = [
        line
        for text in texts
        for line in textwrap.wrap(
            text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
        )
    ]
    return [*found, ""] if found else []


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


class Target(NamedTuple):
    """`name` may be `most` at most; both are in `unit`."""

    section: str
    name: str
    value: float
    most: float
    unit: str = ""

    @property
    def missed(self) -> bool:
        return self.value > self.most

    def __str__(self) -> str:
        word = "missed" if self.missed else "met"
        return f"{self.name}: {self.value:.3g}{self.unit}, at most {self.most:g}{self.unit}: {word}"


@dataclass
class Outcome:
    """What one run of a measurement gave; `left_out` names who could not take part, and why."""

    sheets: list[Sheet] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    left_out: dict[str, None] = field(default_factory=dict)

    def sections(self) -> list[str]:
        named = [one.section for one in self.sheets] + [one.section for one in self.targets]
        return [*dict.fromkeys(named)]

    def lines(self, section: str) -> list[str]:
        """Markdown of one section: tables, targets, who is left out."""
        out = [line for one in self.sheets if one.section == section for line in one.lines()]
        out += _points(f"Target: {one}." for one in self.targets if one.section == section)
        out += _points(f"Left out: {one}." for one in self.left_out)
        return out[:-1]
