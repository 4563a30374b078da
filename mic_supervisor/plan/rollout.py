"""Of one model, no more instances change at a time than its rollout allows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from mic_supervisor.plan.actions import Change
from mic_supervisor.plan.assess import Assessment, Context


def roll(
    changes: Iterable[Change],
    assessments: Iterable[Assessment],
    context: Context,
    obstructed: Collection[str],
) -> tuple[Change, ...]:
    """The same changes, some of them told to wait.

    Only the replacement of an instance that still serves waits: to bring up what is down makes
    nothing less available. What is down with the new specification holds up the others, which it
    could take down too; what is `obstructed` from outside says nothing about them.
    """
    by_id = {item.instance.id: item for item in assessments}
    down: dict[str, int] = {}
    for item in by_id.values():
        down.setdefault(item.instance.model, 0)
        changing = item.instance.id in context.busy
        failing = not _serves(item) and item.instance.id not in obstructed
        down[item.instance.model] += changing or failing
    out: list[Change] = []
    for change in changes:
        changed = by_id.get(change.instance)
        if (
            change.kind in ("replace", "restart")
            and changed is not None
            and _serves(changed)
            and change.instance not in context.busy
        ):
            model, limit = changed.instance.model, changed.instance.max_unavailable
            if down[model] >= limit:
                plural = "s" if limit > 1 else ""
                waits = f"its turn: {limit} instance{plural} of {model} at a time"
                change = replace(change, waits=waits)
            else:
                down[model] += 1
        out.append(change)
    return _with_followers(out)


def _with_followers(changes: list[Change]) -> tuple[Change, ...]:
    """A change with a step that depends on a step of one that waits, waits as well."""
    while True:
        waiting = {
            step.id: change.instance
            for change in changes
            if change.waits is not None
            for step in change.steps
        }
        held = {
            index: waiting[needed]
            for index, change in enumerate(changes)
            if change.waits is None
            for step in change.steps
            for needed in step.depends_on
            if needed in waiting
        }
        if not held:
            return tuple(changes)
        for index, instance in held.items():
            changes[index] = replace(changes[index], waits=f"{instance}, whose turn comes later")


def _serves(item: Assessment) -> bool:
    """As well as can be known with the desired specification, or alive with an earlier one."""
    return item.serves or bool(item.alive)
