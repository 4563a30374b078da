"""What is due inside a server that runs: models to load, to load anew, and to unload.

In a server of several models each has a patience of its own; a pause of a model holds its loads and
its unloads. What merely is missing from the file is unloaded only when that is confirmed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from mic_supervisor.config.document import CONFIRM
from mic_supervisor.plan.actions import Blocked, FieldDiff, Load, Unload
from mic_supervisor.plan.assess import Assessment
from mic_supervisor.plan.bring_up import blocked
from mic_supervisor.plan.holds import Holds, way_out
from mic_supervisor.plan.loads import DueLoad, loads, memory_key, unloads
from mic_supervisor.plan.memory import InstanceMemory, Memory


@dataclass(frozen=True, slots=True)
class Due:
    """One load or unload, why, and what differs."""

    step: Load | Unload
    cause: str
    diff: tuple[FieldDiff, ...] = ()


@dataclass(slots=True)
class Inside:
    """What is due in one server, and in one sentence why no more than that."""

    due: list[Due] = field(default_factory=list)
    why_not: Blocked | None = None

    def wait(self, why: Blocked) -> None:
        """One reason is enough: the first stays."""
        self.why_not = self.why_not or why


def inside(
    item: Assessment,
    entry: InstanceMemory,
    memory: Memory,
    holds: Holds,
    now: float,
    *,
    confirmed: bool,
    named: Collection[str],
) -> Inside:
    """Only a server that answers can say what it has loaded.

    `named` are the GPUs that the file has something on, or keeps empty; `confirmed` says whether
    what it does not name may go.
    """
    out = Inside()
    due = loads(item)
    if item.instance.shared:
        due = _patient(item, due, memory, now, out)
    elif due and entry.retry_at is not None and entry.retry_at > now:
        out.wait(blocked(item, f"backoff: {entry.reason}", until=entry.retry_at))
        due = []
    held: dict[str, str] = {}
    for load in due:
        model = load.step.placement.model
        if (pause := holds.placement(model)) is not None:
            held[model] = f"{model} is {pause}; would load: {load.cause}"
        else:
            out.due.append(Due(load.step, load.cause, load.diff))
    for unload in unloads(item):
        one = unload.step.placement
        if (pause := holds.placement(one.model)) is not None:
            held[one.model] = f"{one.model} is {pause}; would unload: {unload.cause}"
        elif confirmed or (one.gpus and {*one.gpus} <= {*named}):
            out.due.append(Due(unload.step, unload.cause))
        else:
            out.wait(
                blocked(
                    item,
                    f"the file no longer names {one.model}; its removal waits to be confirmed",
                    hint=CONFIRM,
                )
            )
    if held:
        out.wait(blocked(item, "; ".join(held.values()), hint=way_out(held)))
    return out


def _patient(
    item: Assessment, due: list[DueLoad], memory: Memory, now: float, out: Inside
) -> list[DueLoad]:
    """Those whose turn it is."""
    ready: list[DueLoad] = []
    waiting: list[tuple[float, str]] = []
    for load in due:
        model = load.step.placement.model
        entry = memory.of(memory_key(item.instance.id, model))
        if entry.retry_at is not None and entry.retry_at > now:
            waiting.append((entry.retry_at, f"{model}: backoff: {entry.reason}"))
        else:
            ready.append(load)
    if waiting:
        reason = "; ".join(text for _, text in waiting)
        out.wait(blocked(item, reason, until=min(at for at, _ in waiting)))
    return ready
