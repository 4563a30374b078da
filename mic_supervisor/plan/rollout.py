"""What a plan leaves for later.

Of one model, no more instances change at a time than its rollout allows. And a lane in which
something failed that no specification is to blame for has a rest.
"""

from __future__ import annotations

from dataclasses import replace

from mic_supervisor.plan.actions import Change, Plan
from mic_supervisor.plan.assess import Assessment
from mic_supervisor.plan.memory import Rest
from mic_supervisor.plan.situation import Situation
from mic_supervisor.plan.words import Code, because


def roll(plan: Plan, s: Situation) -> Plan:
    """The same plan, some of its changes told to wait, with all that depends on them.

    Only the replacement of an instance that still serves waits: to bring up what is down makes
    nothing less available. What is down with the new specification holds up the others, which it
    could take down too; what is blocked from outside, or was not chosen, says nothing about them.
    """
    blocked = {item.instance for item in plan.blocked if item.until is None}
    down: dict[str, int] = {}
    for item in s.assessments:
        changing = item.instance.id in s.context.busy
        failing = not _serves(item) and item.instance.id not in blocked and s.is_chosen(item)
        down.setdefault(item.instance.model, 0)
        down[item.instance.model] += changing or failing
    out: list[Change] = []
    for change in plan.changes:
        changed = s.by_id.get(change.instance)
        if (
            change.kind in ("replace", "restart")
            and changed is not None
            and _serves(changed)
            and change.instance not in s.context.busy
        ):
            model, limit = changed.instance.model, changed.instance.max_unavailable
            if _unpublished(s, change.instance, model):
                # Else those who forward requests would for a moment know of neither.
                change = replace(change, waits=because(Code.HOOK))
            elif down[model] >= limit:
                turn = because(Code.TURN, limit=limit, s="s" if limit > 1 else "", model=model)
                change = replace(change, waits=turn)
            else:
                down[model] += 1
        out.append(change)
    return replace(plan, changes=_with_followers(out))


def rest(plan: Plan, s: Situation) -> Plan:
    """The same plan; the changes of a lane that rests are told to wait."""
    rests: dict[str, Rest] = {}
    for change in plan.changes:
        one = s.memory.of(change.instance).rest
        if one is not None and one.until > s.now and change.steps:
            rests[change.lane] = max(rests.get(change.lane, one), one, key=lambda it: it.until)
    changes = tuple(
        replace(change, waits=because(Code.NEXT_TRY, failure=one.reason), until=one.until)
        if change.steps and (one := rests.get(change.lane)) is not None
        else change
        for change in plan.changes
    )
    return replace(plan, changes=changes)


def _unpublished(s: Situation, instance: str, model: str) -> bool:
    """Whether another one that serves the model is not known to those who forward requests."""
    if s.context.published is None:
        return False
    known = s.context.published.get(model, ())
    return any(
        item.ready and item.instance.id not in known
        for item in s.assessments
        if item.instance.model == model and item.instance.id != instance
    )


def _with_followers(changes: list[Change]) -> tuple[Change, ...]:
    """A change with a step that depends on a step of one that waits, waits as well."""
    while True:
        waiting = {
            step.id: one.instance for one in changes if one.waits is not None for step in one.steps
        }
        late = {
            index: waiting[needed]
            for index, one in enumerate(changes)
            if one.waits is None
            for _, needed in one.behind(waiting.keys())
        }
        if not late:
            return tuple(changes)
        for index, instance in late.items():
            changes[index] = replace(changes[index], waits=because(Code.LATER, instance=instance))


def _serves(item: Assessment) -> bool:
    """As well as can be known with the desired specification, or alive with an earlier one."""
    return item.serves or bool(item.alive)
