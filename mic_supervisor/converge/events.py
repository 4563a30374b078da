"""What the converger tells whoever listens: the terminal, the log, the history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from mic_supervisor.text import one_line

if TYPE_CHECKING:  # a command that asks the daemon needs events, and nothing of the planner
    from mic_supervisor.plan.assess import Selection
    from mic_supervisor.plan.look import Look

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
    "order",
    "claim",
]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one instance, or of kind "gpu" to a GPU.

    `seconds` is how long it took, where it took any. `by` is the user who ordered it; None: nobody
    did, or it is not known who.
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
    by: str | None = None

    @property
    def ordered(self) -> str:
        """The end of a sentence about it."""
        return f", by {self.by}" if self.by else ""


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
        by=event.by and one_line(event.by),
    )


def adopted(seen: Look, at: float) -> Iterator[Event]:
    """An instance that runs as it should, and that nothing is remembered of, is taken over."""
    text = "adopted: it runs already, as the file asks"
    for item in seen.assessments:
        one = item.instance
        known = seen.before.of(one.id).started is not None
        if item.runs and not known and seen.memory.of(one.id).started is not None:
            yield Event("adopt", at, one.id, text, one.model, one.gpus)


def pauses(
    chosen: Selection, text: str, indices: Mapping[str, int], at: float, by: str | None
) -> Iterator[Event]:
    """That a person paused or resumed these, `text` says which."""
    for model in sorted(chosen.models):
        yield Event("pause", at, model, text, model, by=by)
    for uuid in sorted(chosen.gpus):
        (name,) = replace(chosen, models=frozenset(), gpus=frozenset({uuid})).called(indices)
        yield Event("pause", at, name, text, gpus=(uuid,), by=by)


@dataclass(frozen=True, slots=True)
class Order:
    """What a person ordered, as it was said, and who did; None: it is not known."""

    command: str
    by: str | None = None


Listener = Callable[[Event], None]


@dataclass(slots=True)
class Events:
    """Passes every event on to every listener, in order. Texts are made fit to be shown first."""

    listeners: list[Listener] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        event = fit(event)
        for listener in self.listeners:
            listener(event)
