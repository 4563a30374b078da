"""Of one model, no more instances change at a time than its rollout allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mic_supervisor.plan.actions import Change
from mic_supervisor.plan.assess import Assessment, Context


def roll(
    changes: Iterable[Change], assessments: Iterable[Assessment], context: Context
) -> tuple[Change, ...]:
    """The same changes, some of them told to wait.

    Only the replacement of an instance that still serves waits: to bring up what is down makes
    nothing less available.
    """
    by_id = {item.instance.id: item for item in assessments}
    down: dict[str, int] = {}
    for item in by_id.values():
        down.setdefault(item.instance.model, 0)
        down[item.instance.model] += not _serves(item) or item.instance.id in context.busy
    out: list[Change] = []
    for change in changes:
        changed = by_id.get(change.instance)
        if change.kind == "replace" and changed is not None and _serves(changed):
            model, limit = changed.instance.model, changed.instance.max_unavailable
            if down[model] >= limit:
                plural = "s" if limit > 1 else ""
                waits = f"its turn: {limit} instance{plural} of {model} at a time"
                change = replace(change, waits=waits)
            else:
                down[model] += 1
        out.append(change)
    return tuple(out)


def _serves(item: Assessment) -> bool:
    """Ready with the desired specification, or alive with an earlier one."""
    return item.ready or (item.started_up and item.unprobed) or bool(item.alive)
