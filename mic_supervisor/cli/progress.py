"""Tells a person what happens while it happens."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.words import gpu_names

if TYPE_CHECKING:
    from rich.live import Live

    from mic_supervisor.converge.events import Event

_QUIET = frozenset({Phase.PENDING, Phase.STOPPING})  # the change itself says it better
_GOOD = frozenset({Phase.STARTING, Phase.LOADING, Phase.READY, Phase.UNPROBED})


class Lines:
    """One line per event, for pipes and logs."""

    def __init__(self, indices: dict[str, int]) -> None:
        self._indices = indices
        self._began = time.monotonic()
        self._changed: set[str] = set()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        text = line_of(event, self._changed)
        if text is not None:
            place = place_of(event.gpus, self._indices)
            passed = time.monotonic() - self._began
            click.echo(f"{passed:6.1f} s  {place:<7}  {event.instance}: {text}")


class Table:
    """One row per instance, redrawn in place, for a terminal."""

    def __init__(self, indices: dict[str, int]) -> None:
        self._indices = indices
        self._changed: set[str] = set()
        self._rows: dict[str, tuple[str, str, str, float]] = {}
        self._live: Live | None = None

    def __enter__(self) -> Table:
        from rich.live import Live

        self._live = Live(get_renderable=self._draw, refresh_per_second=8, transient=True)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        text = line_of(event, self._changed)
        if text is None:
            return
        place = place_of(event.gpus, self._indices)
        phase = event.phase or "" if event.kind == "phase" else event.kind
        self._rows[event.instance] = (place, phase, text, time.monotonic())

    def _draw(self) -> Any:
        from rich.table import Table as RichTable

        table = RichTable(box=None, pad_edge=False, header_style="bold")
        for name in ("GPU", "INSTANCE", "", "FOR"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for instance, (place, _, text, at) in sorted(self._rows.items()):
            table.add_row(place, instance, text, f"{max(0.0, time.monotonic() - at):.0f} s")
        return table


class Silence:
    """Nothing, for who wants a document only."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, _event: Event) -> None:
        return None


def follow(indices: dict[str, int], *, quiet: bool) -> Lines | Table | Silence:
    """The right one for where the output goes."""
    if quiet:
        return Silence()
    return Table(indices) if sys.stdout.isatty() else Lines(indices)


def line_of(event: Event, changed: set[str]) -> str | None:
    """What there is to say about an event; None for what says nothing new.

    `changed` collects the instances that something was done for: that the others are found as they
    were is no news.
    """
    if event.kind == "begin":
        changed.add(event.instance)
    if event.kind == "phase":
        if event.phase == Phase.LOADING and not event.text:
            return None
        if event.phase in _QUIET or (event.phase in _GOOD and event.instance not in changed):
            return None
        if event.phase == Phase.PAUSED:
            return event.text
        return f"{event.phase}" + (f": {event.text}" if event.text else "")
    if event.kind == "begin":
        return f"{event.phase}: {event.text}"
    if event.kind == "progress":
        return event.text
    if event.kind == "failed":
        return f"failed: {event.text}"
    if event.kind == "done" and event.phase in ("remove", "stop"):
        return "removed" if event.phase == "remove" else "stopped"
    return None


def place_of(gpus: Iterable[str], indices: dict[str, int]) -> str:
    """ "GPU 3,4"; a GPU that is not there is named by its UUID."""
    gpus = tuple(gpus)
    return gpu_names(gpus, indices) if gpus else "-"


def outcome(row: Mapping[str, Any]) -> str:
    """The last line about an instance of an apply's document."""
    indices = {gpu["uuid"]: gpu["index"] for gpu in row["gpus"] if gpu["index"] is not None}
    place = place_of([gpu["uuid"] for gpu in row["gpus"]], indices)
    why = row["reason"] if row["reason"] and row["phase"] != Phase.READY else ""
    tail = "  ".join(part for part in (row["endpoints"].get("http", ""), why) if part)
    return f"{row['phase']:<9}  {row['id']}  {place}  {tail}".rstrip()
