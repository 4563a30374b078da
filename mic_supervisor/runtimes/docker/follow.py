"""Logs and events of an engine as lines. A stream that breaks is an error, never an end."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.model import ObservedWorkload
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.errors import engine_errors
from mic_supervisor.runtimes.docker.streams import documents, frames, lines

if TYPE_CHECKING:
    from requests import Response

EVENTS = ("start", "die", "oom", "destroy", "health_status")


def log_lines(
    engine: Engine, workload: ObservedWorkload, tail: int | None, follow: bool
) -> Iterator[str]:
    """Lines of a container's log, see Runtime.logs."""
    what = f"cannot read the log of container {workload.name}"
    response = engine.open(
        what,
        "GET",
        f"/containers/{workload.ref}/logs",
        params={
            "stdout": 1,
            "stderr": 1,
            "follow": int(follow),
            "tail": "all" if tail is None else max(tail, 0),
        },
        silence=None if follow else engine.timeout,
    )
    with response:
        yield from engine.reading(what, lines(frames(response.raw.read)))


def event_lines(
    engine: Engine,
    labels: Mapping[str, str],
    stop: threading.Event,
    started: Callable[[str], None],
    ended: Callable[[str, int | None], None],
) -> Iterator[str]:
    """A line per event of a container with these labels, see DockerRuntime.events.

    `started` and `ended` are told of a container, by its id, before its line is given out; `ended`
    with its exit code.
    """
    what = "cannot follow the engine's events"
    filters = {
        "type": ["container"],
        "event": list(EVENTS),
        "label": [f"{key}={value}" for key, value in labels.items()],
    }
    response = engine.open(
        what, "GET", "/events", params={"filters": json.dumps(filters)}, silence=None
    )
    over = threading.Event()
    watcher = threading.Thread(
        target=_hang_up, args=(response, stop, over), name="docker-events-stop", daemon=True
    )
    watcher.start()
    try:
        yield f"listening to the engine at {engine.address}"
        for event in engine.reading(what, documents(response.iter_lines())):
            if stop.is_set():
                return
            ref = event.get("id")
            if isinstance(ref, str) and event.get("Action") == "die":
                ended(ref, _exit_code(event))
            elif isinstance(ref, str) and event.get("Action") == "start":
                started(ref)
            yield _event_line(event)
    except RuntimeUnavailable:
        if stop.is_set():
            return
        raise
    finally:
        over.set()
        response.close()
    if not stop.is_set():
        raise RuntimeUnavailable(f"{what}: the engine ended the stream")


def _hang_up(response: Response, stop: threading.Event, over: threading.Event) -> None:
    """Close the stream under its reader once `stop` is set, unless it is over by itself."""
    from docker.types import CancellableStream

    while not stop.wait(0.5):
        if over.is_set():
            return
    # Closed already: that was the aim.
    with contextlib.suppress(*engine_errors()):
        CancellableStream(iter(()), response).close()


def _exit_code(event: Mapping[str, Any]) -> int | None:
    actor = event.get("Actor")
    found = actor.get("Attributes") if isinstance(actor, Mapping) else None
    code = found.get("exitCode") if isinstance(found, Mapping) else None
    return int(code) if isinstance(code, str) and code.isdecimal() else None


def _event_line(event: Mapping[str, Any]) -> str:
    """For example "die mic-default-mam (exit code 137)"."""
    actor = event.get("Actor")
    actor = actor if isinstance(actor, Mapping) else {}
    found = actor.get("Attributes")
    attributes = found if isinstance(found, Mapping) else {}
    action = str(event.get("Action") or event.get("status") or "changed")
    line = f"{action} {attributes.get('name') or actor.get('ID') or event.get('id')}"
    code = attributes.get("exitCode")
    return f"{line} (exit code {code})" if action == "die" and code is not None else line
