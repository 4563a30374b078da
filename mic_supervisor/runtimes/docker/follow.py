"""Logs and events of an engine as lines. A stream that breaks is an error, never an end.

The SDK ends a broken stream like a whole one; so what an end means is looked at.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from docker import APIClient
from docker.types import CancellableStream

from mic_supervisor.errors import MicError, RuntimeUnavailable
from mic_supervisor.model import ObservedWorkload
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.errors import ERRORS, explain

EVENTS = ("start", "die", "oom", "destroy", "health_status")
_LONGEST = 1 << 20  # bytes of a line that does not end


def lines(parts: Iterable[bytes]) -> Iterator[str]:
    """Lines, however they are cut. Bytes that are not UTF-8 become U+FFFD."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        if len(rest) > _LONGEST:
            whole, rest = [*whole, rest], b""
        yield from (_text(line) for line in whole)
    if rest:
        yield _text(rest)


def log_lines(
    engine: Engine, workload: ObservedWorkload, tail: int | None, follow: bool
) -> Iterator[str]:
    """Lines of a container's log, see Runtime.logs."""
    what = f"cannot read the log of container {workload.name}"
    last: Literal["all"] | int = "all" if tail is None else max(tail, 0)
    if not follow:
        yield from lines([engine.call(what, lambda api: api.logs(workload.ref, tail=last))])
        return
    log = engine.call(what, lambda api: api.logs(workload.ref, stream=True, tail=last))
    try:
        yield from lines(log)
    finally:
        _hang_up(log)
    found = engine.container(what, workload.ref)
    if found is not None and found["State"]["Running"]:
        raise RuntimeUnavailable(f"{what}: the engine ended the stream")


def event_lines(engine: Engine, labels: Mapping[str, str], stop: threading.Event) -> Iterator[str]:
    """A line per event of a container with these labels, see DockerRuntime.events."""
    what = "cannot follow the engine's events"
    filters = {
        "type": "container",
        "event": list(EVENTS),
        "label": [f"{key}={value}" for key, value in labels.items()],
    }

    def ask(api: APIClient) -> CancellableStream[dict[str, Any]]:
        api.ping()  # the SDK tells of a refusal with the first event only
        return api.events(filters=filters, decode=True)

    events = engine.call(what, ask)
    over = threading.Event()
    threading.Thread(
        target=_watch, args=(events, stop, over), name="docker-events-stop", daemon=True
    ).start()
    try:
        yield f"listening to the engine at {engine.address}"
        for event in events:
            if stop.is_set():
                return
            if event.get("Action") == "die":
                _written_down(engine, str(event.get("id")))
            yield _event_line(event)
    except ERRORS as error:
        if stop.is_set():
            return
        raise explain(what, error, engine.address) from error
    finally:
        over.set()
        _hang_up(events)
    if not stop.is_set():
        raise RuntimeUnavailable(f"{what}: the engine ended the stream")


def _watch(
    events: CancellableStream[dict[str, Any]], stop: threading.Event, over: threading.Event
) -> None:
    """Close the stream under its reader once `stop` is set, unless it is over by itself."""
    while not stop.wait(0.5):
        if over.is_set():
            return
    _hang_up(events)


def _hang_up(stream: CancellableStream[Any]) -> None:
    # Closed already: that was the aim.
    with contextlib.suppress(*ERRORS):
        stream.close()


def _written_down(engine: Engine, ref: str) -> None:
    """Wait until the engine's list says that a container ended, or cannot be asked.

    An engine tells of a death before it cleans up, and lists the container as running until it is
    done with that, about 0.1 s later, of which it tells nobody (seen on Engine 20.10). It holds the
    container's lock meanwhile, and an inspection waits for it.
    """
    with contextlib.suppress(MicError):
        engine.container("cannot inspect a container that ended", ref)


def _event_line(event: Mapping[str, Any]) -> str:
    """For example "die mic-default-mam (exit code 137)"."""
    actor = event.get("Actor") or {}
    attributes = actor.get("Attributes") or {}
    action = event.get("Action") or event.get("status") or "changed"
    line = f"{action} {attributes.get('name') or actor.get('ID') or event.get('id')}"
    code = attributes.get("exitCode")
    return f"{line} (exit code {code})" if action == "die" and code is not None else line


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode(errors="replace")
