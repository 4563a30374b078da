"""Of one model, no more instances change at a time than its rollout allows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from mic_supervisor.plan.actions import Change
from mic_supervisor.plan.assess import Assessment, Context

FOR_THE_HOOK = "on_endpoints_change, which has yet to be told of what serves instead"
"""What a change waits for that nothing else in the plan brings about, and that is on its way."""


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
            if _unpublished(by_id.values(), change.instance, model, context):
                # Else those who forward requests would for a moment know of neither.
                change = replace(change, waits=FOR_THE_HOOK)
            elif down[model] >= limit:
                plural = "s" if limit > 1 else ""
                waits = f"its turn: {limit} instance{plural} of {model} at a time"
                change = replace(change, waits=waits)
            else:
                down[model] += 1
        out.append(change)
    return _with_followers(out)


def _unpublished(items: Iterable[Assessment], instance: str, model: str, context: Context) -> bool:
    """Whether another one that serves the model is not known to those who forward requests."""
    if context.published is None:
        return False
    known = context.published.get(model, ())
    others = [item for item in items if item.instance.model == model]
    return any(
        item.ready and item.instance.id not in known
        for item in others
        if item.instance.id != instance
    )


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
