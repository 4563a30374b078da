"""Tells a person what happens while it happens, and how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.config.document import composed
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.memory import memory_key
from mic_supervisor.plan.words import gpu_names, left_out_line

if TYPE_CHECKING:
    from rich.table import Table

    from mic_supervisor.converge.events import Event

_QUIET = frozenset({Phase.PENDING, Phase.STOPPING})  # the change itself says it better
_GOOD = frozenset({Phase.STARTING, Phase.LOADING, Phase.READY, Phase.UNPROBED})


@contextmanager
def follow(indices: dict[str, int], *, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """What to tell of each event: a table on a terminal, lines in a pipe, nothing if `quiet`."""
    began, changed = time.monotonic(), set[str]()
    rows: dict[str, tuple[str, str, float]] = {}

    def line(event: Event) -> None:
        if (text := line_of(event, changed)) is not None:
            passed = time.monotonic() - began
            label = gpu_label(event.gpus, indices)
            click.echo(f"{passed:6.1f} s  {label:<7}  {event.instance}: {text}")

    def row(event: Event) -> None:
        if (text := line_of(event, changed)) is not None:
            rows[event.instance] = (gpu_label(event.gpus, indices), text, time.monotonic())

    def draw() -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("GPU", "INSTANCE", "", "FOR"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for instance, (label, text, at) in sorted(rows.items()):
            table.add_row(label, instance, text, f"{max(0.0, time.monotonic() - at):.0f} s")
        return table

    if quiet:
        yield lambda _event: None
    elif not sys.stdout.isatty():
        yield line
    else:
        from rich.live import Live

        with Live(get_renderable=draw, refresh_per_second=8, transient=True):
            yield row


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
        text = event.text.removeprefix(f"{event.phase}: ")  # as that of a backoff begins
        return f"{event.phase}" + (f": {text}" if text else "")
    if event.kind == "begin":
        return f"{event.phase}: {event.text}"
    if event.kind == "progress":
        return event.text
    if event.kind == "failed":
        return f"failed: {event.text}"
    if event.kind == "done" and event.phase in ("remove", "stop"):
        return "removed" if event.phase == "remove" else "stopped"
    return None


def gpu_label(gpus: Iterable[str], indices: dict[str, int]) -> str:
    """ "GPU 3,4"; a GPU that is not there is named by its UUID."""
    gpus = tuple(gpus)
    return gpu_names(gpus, indices) if gpus else "-"


def outcome(row: Mapping[str, Any]) -> str:
    """The last line about an instance of an apply's document."""
    indices = {gpu["uuid"]: gpu["index"] for gpu in row["gpus"] if gpu["index"] is not None}
    label = gpu_label([gpu["uuid"] for gpu in row["gpus"]], indices)
    why = row["reason"] if row["reason"] and row["phase"] != Phase.READY else ""
    tail = "  ".join(part for part in (row["endpoints"].get("http", ""), why) if part)
    return f"{row['phase']:<9}  {row['id']}  {label}  {tail}".rstrip()


def on(document: dict[str, Any], uuids: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a document that have any of these GPUs."""
    return [
        row for row in document["instances"] if {gpu["uuid"] for gpu in row["gpus"]} & set(uuids)
    ]


def named(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of an instance, or of a model; of one in a server of several, what is said of it."""
    rows, wanted = document["instances"], composed(name)
    return [row for row in rows if wanted in (row["id"], row["model"])] or [
        {
            **row,
            **one,
            "id": memory_key(row["id"], wanted),
            "as_desired": one["phase"] == Phase.READY,
        }
        for row in rows
        for one in row["models"]
        if one["model"] == wanted
    ]


def show(rows: list[dict[str, Any]], document: dict[str, Any]) -> int:
    """Print how these ended, with what went wrong and the way out.

    The exit status: 0 all are as desired, 3 some are, 1 none is.
    """
    failures = {item["instance"]: item for item in document["failures"]}
    hints = {item["instance"]: item["hint"] for item in document["remaining"]["blocked"]}
    for row in rows:
        click.echo(outcome(row))
        failure = failures.get(row["id"], {"reason": "", "hint": None, "told": True})
        if row["as_desired"]:
            continue
        if not failure.get("told"):  # an earlier daemon does not say
            click.echo(f"    {failure['reason']}")
        hint = failure["hint"] or hints.get(row["id"])
        if hint:
            click.echo(f"    hint: {hint}")
    good = [row["as_desired"] for row in rows]
    return 0 if good and all(good) else 3 if any(good) else 1


def print_left_out(document: dict[str, Any]) -> None:
    """What else the file asks for; a daemon sees to that by itself."""
    for item in document["left_out"]:
        click.echo(left_out_line(item["instance"], item["action"], item["cause"]))
