"""What the converger tells whoever listens: the terminal, the log, the history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from mic_supervisor.text import one_line

EventKind = Literal[
    "begin",
    "progress",
    "warning",
    "done",
    "failed",
    "phase",
    "config",
    "adopt",
    "pause",
    "gpu",
    "hook",
]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one instance, or of kind "gpu" to a GPU.

    `seconds` is how long it took, where it took any.
    """

    kind: EventKind
    at: float
    instance: str
    text: str
    model: str = ""
    gpus: tuple[str, ...] = ()
    cause: str = ""
    seconds: float | None = None
    hint: str | None = None
    phase: str | None = None
    was: str | None = None


def fit(event: Event) -> Event:
    """The same, as it can be shown: a program, or a damaged file, may have said anything."""
    return replace(
        event,
        instance=one_line(event.instance),
        text=one_line(event.text),
        model=one_line(event.model),
        cause=one_line(event.cause),
        hint=event.hint and one_line(event.hint),
        phase=event.phase and one_line(event.phase),
        was=event.was and one_line(event.was),
    )


Listener = Callable[[Event], None]


@dataclass(slots=True)
class Events:
    """Passes every event on to every listener, in order. Texts are made fit to be shown first."""

    listeners: list[Listener] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        event = fit(event)
        for listener in self.listeners:
            listener(event)
