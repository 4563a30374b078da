"""What is due inside a server that runs: models to load, to load anew, and to unload.

In a server of several models each has a patience of its own. What merely is missing from the file
is unloaded only when that is confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mic_supervisor.config.document import CONFIRM
from mic_supervisor.model import LoadState, PlacementState
from mic_supervisor.plan.actions import Blocked, FieldDiff, Load, ToModel, Unload
from mic_supervisor.plan.assess import Assessment
from mic_supervisor.plan.situation import Situation
from mic_supervisor.plan.words import Code, Reason, because


@dataclass(frozen=True, slots=True)
class Due:
    """One load or unload, why, and what differs."""

    step: ToModel
    why: Reason
    diff: tuple[FieldDiff, ...] = ()


def inside(s: Situation, item: Assessment) -> tuple[list[Due], Blocked | None]:
    """What is due in one server, and one reason why no more than that.

    Only a server that answers can say what it has loaded.
    """
    due = loads(item)
    late: list[tuple[float, Reason]] = []
    if item.instance.shared:
        for load in [*due]:
            model = load.step.placement.model
            entry = s.memory.of(memory_key(item.instance.id, model))
            if entry.retry_at is not None and entry.retry_at > s.now:
                due.remove(load)
                why = because(Code.MODEL_BACKOFF, model=model, failure=entry.reason)
                late.append((entry.retry_at, why))
    elif due:
        entry = s.entry(item)
        if entry.retry_at is not None and entry.retry_at > s.now:
            due = []
            late.append((entry.retry_at, because(Code.BACKOFF, failure=entry.reason)))
    why_not = None
    if late:
        first, *others = (why for _, why in late)
        both = Reason(first.kind, first.facts, tuple(others))
        why_not = item.blocked(both, min(at for at, _ in late))
    for unload in _unloads(item):
        one = unload.step.placement
        if s.context.confirmed or (one.gpus and {*one.gpus} <= s.placed):
            due.append(unload)
        elif why_not is None:
            why_not = item.blocked(because(Code.UNCONFIRMED, what=one.model, hint=CONFIRM))
    return due, why_not


def loads(item: Assessment) -> list[Due]:
    """Only of a server that has started up, and only where it is known what it has loaded."""
    match = item.match
    if match is None or not item.started_up:
        return []
    out = []
    for placement in item.instance.placements:
        state = item.placement(placement)
        if item.loaded(placement) or not _is_known(state):
            continue
        before, after = dict(state.summary), dict(placement.summary)
        diff = tuple(
            FieldDiff(key, before.get(key), after.get(key))
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
        )
        of = f"{placement.model}: " if item.instance.shared else ""
        if state.state is LoadState.LOADED:
            changed = ", ".join(entry.path for entry in diff) or "its configuration"
            why = because(Code.MODEL_CHANGED, of=of, changed=changed)
        else:
            why = because(Code.NOT_LOADED, of=of, model=placement.model)
        name = f"load {placement.model} into {match.name}"
        out.append(Due(Load(name, item.instance.id, match, placement), why, diff))
    return out


def _unloads(item: Assessment) -> list[Due]:
    """What a server has loaded for us that the file does not have in it any more."""
    match = item.match
    if match is None or not item.started_up or item.alive:
        return []
    return [
        Due(
            Unload(f"unload {one.model} from {match.name}", item.instance.id, match, one),
            because(Code.SURPLUS, model=one.model),
        )
        for one in item.health.surplus
    ]


def memory_key(instance: str, model: str) -> str:
    """Under what it is remembered how loading a model of a shared server went."""
    return f"{instance}/{model}"


def _is_known(state: PlacementState) -> bool:
    """Whether a server's word on a model is enough to send it anew."""
    if state.state is LoadState.LOADED:
        return state.digest is not None
    return state.state in (LoadState.ABSENT, LoadState.FAILED)
