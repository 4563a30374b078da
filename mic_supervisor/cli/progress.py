"""Tells a person what happens while it happens, and how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.config.names import composed, is_called, shown_id, with_shown_ids
from mic_supervisor.plan.words import beside, gpu_names, left_out_line

if TYPE_CHECKING:
    from rich.table import Table

    from mic_supervisor.converge.events import Event

# The change itself says it better, and so does the end of `drain`.
_QUIET = frozenset({"pending", "stopping", "drained"})
_GOOD = frozenset({"starting", "loading", "ready", "unprobed"})


@contextmanager
def follow(indices: dict[str, int], *, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """What to tell of each event: a table on a terminal, lines in a pipe, nothing if `quiet`."""
    began, changed = time.monotonic(), set[str]()
    rows: dict[str, tuple[str, str, float]] = {}
    models: dict[str, str] = {}

    def told(event: Event) -> str | None:
        models[event.instance] = event.model
        text = line_of(event, changed)
        return None if text is None else with_shown_ids(text, models)

    def line(event: Event) -> None:
        if (text := told(event)) is not None:
            passed = time.monotonic() - began
            label = gpu_label(event.gpus, indices)
            called = shown_id(event.instance, event.model)
            click.echo(f"{passed:6.1f} s  {label:<7}  {called}: {text}")

    def row(event: Event) -> None:
        if (text := told(event)) is not None:
            called = shown_id(event.instance, event.model)
            rows[called] = (gpu_label(event.gpus, indices), text, time.monotonic())

    if quiet:
        yield lambda _event: None
    elif not sys.stdout.isatty():
        yield line
    else:
        from rich.live import Live

        with Live(get_renderable=lambda: table(rows), refresh_per_second=8, transient=True):
            yield row


def table(rows: Mapping[str, tuple[str, str, float]]) -> Table:
    """Of GPU, text and the monotonic time since when, by instance. GPU and time are never cut: a
    long name or reason goes on in the next line."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPU", "INSTANCE", "", "FOR"):
        table.add_column(name, no_wrap=name in ("GPU", "FOR"), overflow="fold")
    for instance, (label, text, at) in sorted(rows.items()):
        table.add_row(label, instance, text, f"{max(0.0, time.monotonic() - at):.0f} s")
    return table


def line_of(event: Event, changed: set[str]) -> str | None:
    """What there is to say about an event; None for what says nothing new.

    `changed` collects the instances that something was done for: that the others are found as they
    were is no news.
    """
    if event.kind == "begin":
        changed.add(event.instance)
    if event.kind == "phase":
        if event.phase == "loading" and not event.text:
            return None
        if event.phase in _QUIET or (event.phase in _GOOD and event.instance not in changed):
            return None
        if event.phase == "paused":
            return event.text
        text = beside(event.phase or "", event.text)
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
    why = beside(row["phase"], row["reason"] or "") if row["phase"] != "ready" else ""
    tail = "  ".join(part for part in (row["endpoints"].get("http", ""), why) if part)
    return f"{row['phase']:<9}  {row['id']}  {label}  {tail}".rstrip()


def on(document: dict[str, Any], uuids: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a document that have any of these GPUs."""
    return [
        row for row in document["instances"] if {gpu["uuid"] for gpu in row["gpus"]} & set(uuids)
    ]


def named(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of an instance or a model, or those that a daemon took for named; of a model in a
    server of several, what is said of it.
    """
    from mic_supervisor.plan.memory import memory_key

    rows, ids, wanted = document["instances"], document.get("named", ()), composed(name)
    found = [r for r in rows if r["id"] in ids or is_called(name, r["id"], [r["model"]])]
    return found or [
        {
            **row,
            **one,
            "id": memory_key(row["id"], wanted),
            "as_desired": one["phase"] == "ready",
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
    models = {row["id"]: row["model"] for row in document["instances"]}
    good = []
    for row in rows:
        click.echo(with_shown_ids(outcome(row), models))
        failure = failures.get(row["id"], {"reason": "", "hint": None, "told": True})
        good.append(row["as_desired"] and not failure.get("not_pulled"))
        if good[-1]:
            continue
        if not failure.get("told"):  # an earlier daemon does not say
            click.echo(with_shown_ids(f"    {failure['reason']}", models))
        hint = failure["hint"] or hints.get(row["id"])
        if hint:
            click.echo(with_shown_ids(f"    hint: {hint}", models))
    return 0 if good and all(good) else 3 if any(good) else 1


def print_left_out(document: dict[str, Any]) -> None:
    """What else the file asks for; a daemon sees to that by itself."""
    for item in document["left_out"]:
        line = left_out_line(item["instance"], item["action"], item["cause"])
        click.echo(with_shown_ids(line, {item["instance"]: item["model"]}))
