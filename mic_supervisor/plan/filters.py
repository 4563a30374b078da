"""What holds up a plan: it takes changes out of it, or has them wait for their turn.

Taken out is what is in doubt, what is paused, what was not chosen, and what nothing explains.

What runs and cannot be told for certain is in doubt: nothing is done with it, nor on its GPUs.

What runs otherwise than the file asks, and was found so when the memory was lost, may have a reason
that is lost with it: a pause, a rollback, what a GPU's number meant. So it stays until somebody
says to go on.

A pause is for who works on something by hand. It covers all that is of the model or on the GPU,
named by the file or not: nothing is created, started, stopped, removed, loaded or unloaded, and no
failure is counted. What needs something of it waits.

A plan may be limited to models and GPUs. Then whatever else there is stays as it is, apart from
what has to leave the GPUs of the chosen so that they can start. What the file merely no longer
names is left alone: to limit a plan is no word on that.

Of one model, no more instances change at a time than its rollout allows. And a lane in which
something failed that no specification is to blame for has a cooldown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from mic_supervisor.config.document import CONFIRM
from mic_supervisor.model import ObservedWorkload
from mic_supervisor.plan.actions import (
    Blocked,
    Change,
    Plan,
    Restart,
    Start,
    Step,
    Stop,
    ToModel,
    ToWorkload,
)
from mic_supervisor.plan.assess import Assessment, by_instance, is_alive, left_alone
from mic_supervisor.plan.departures import follows, needs
from mic_supervisor.plan.memory import Cooldown
from mic_supervisor.plan.selection import resume, since
from mic_supervisor.plan.situation import Situation
from mic_supervisor.plan.words import Code, Reason, because


def exclude(plan: Plan, s: Situation) -> Plan:
    """The same plan without the changes of what is excluded, and without all that depends on
    them."""
    held = {one.instance: one for one in (*_claimed(plan, s), *_held(s))}
    if not held and not s.memory.paused:
        return plan
    plan = _take_out(plan, {name: one for name, one in held.items() if one.chosen}, s)
    plan = _take_out_loads(plan, s)
    return _take_out(plan, {name: one for name, one in held.items() if not one.chosen}, s)


def _take_out(plan: Plan, held: Mapping[str, Blocked], s: Situation) -> Plan:
    taken = [change for change in plan.changes if change.instance in held]
    cooldown = [change for change in plan.changes if change.instance not in held]
    cooldown, stuck = _without(cooldown, taken, held, s)
    reported = {item.instance: item for item in plan.blocked if item.instance not in held} | stuck
    why_not = [_renamed(item, held) for item in reported.values()]
    why_not += [_as_blocked(one, plan) for one in held.values() if one.chosen]
    left_out = [
        replace(change, steps=())
        for change in taken
        if not held[change.instance].chosen and change.kind != "adopt"
    ]
    return replace(plan, changes=tuple(cooldown), blocked=tuple(why_not), left_out=tuple(left_out))


def _held(s: Situation) -> Iterable[Blocked]:
    """Every instance, and entry in trouble, that is left as it is; of several the last counts."""
    targets = s.context.targets
    unexplained = {name for names in (s.memory.unexplained or {}).values() for name in names}
    because_lost = because(Code.UNEXPLAINED, hint=CONFIRM)
    for item in s.assessments:
        if item.instance.id in unexplained:
            yield item.blocked(because_lost)
        if (why := _why(s, item.instance.model, item.gpus, s.is_chosen(item))) is not None:
            yield item.blocked(why)
    # Of several with one id, those that are alive say where it is.
    for several in by_instance(s.undesired).values():
        alive = [item for item in several if is_alive(item)] or several
        gpus = {uuid for item in alive for uuid in item.identity.gpus}
        chosen = targets is None or not s.needed.isdisjoint(gpus)
        if alive[0].identity.instance in unexplained and not s.is_unconfirmed(alive[0]):
            yield left_alone(alive[0], because_lost)
        if (why := _why(s, alive[0].identity.model, gpus, chosen)) is not None:
            yield left_alone(alive[0], why)
    for entry in s.desired.unsatisfiable:
        if targets is not None and not targets.concerns(entry.model, entry.gpus):
            yield Blocked(entry.name, because(Code.NOT_CHOSEN), entry.gpus, entry.model)
    for workload in s.alive:
        if (doubt := workload.doubt) is not None:
            yield left_alone(workload, because(Code.IN_DOUBT, doubt=doubt.reason, hint=doubt.hint))


def _claimed(plan: Plan, s: Situation) -> Iterable[Blocked]:
    """What something would be done for and only a daemon may: it knows who claims it."""
    due = {change.instance for change in plan.changes if change.kind != "adopt"}
    for claim in s.desired.claims if s.desired.claim_grace is None else ():
        item = s.by_id.get(claim.instance or "")
        if item is not None and item.instance.id in due:
            yield item.blocked(because(Code.CLAIMED))


def _why(s: Situation, model: str, gpus: Collection[str], chosen: bool) -> Reason | None:
    """Why what is of the model, and concerns the GPUs, is excluded; None: it is not."""
    paused = s.memory.paused
    found = {uuid: paused.gpus[uuid] for uuid in sorted({*gpus} & paused.gpus.keys())}
    names = [str(s.indices.get(uuid, uuid)) for uuid in found]
    pauses = [*found.values()]
    if model in paused.models:
        names.insert(0, model)
        pauses.append(paused.models[model])
    if not pauses:
        return None if chosen else because(Code.NOT_CHOSEN)
    first = since(min(pauses, key=lambda pause: pause.since), s.observed.at)
    return replace(first, facts={**first.facts, "hint": resume(names)})


def _without(
    cooldown: list[Change], taken: Iterable[Change], held: Mapping[str, Blocked], s: Situation
) -> tuple[list[Change], dict[str, Blocked]]:
    """`cooldown` without what depends on steps that are `taken` out, and why each start is blocked.

    What serves is not stopped while one that follows it is kept from starting. That one may need
    no step before the stop, so there is nothing to see of it in the plan.
    """
    gone = {step.id: step for change in taken for step in change.steps}
    kept_down = [
        item
        for name, item in s.by_id.items()
        if name in held and held[name].chosen and item.running is None
    ]
    stuck: dict[str, Blocked] = {}
    while True:
        stays = {id(one): found for one in cooldown if (found := _what_stays(one, gone, kept_down))}
        if not stays:
            return cooldown, stuck
        for change in [one for one in cooldown if id(one) in stays]:
            cooldown = [one for one in cooldown if one is not change]
            gone |= {step.id: step for step in change.steps}
            late = next((x for x in change.steps if isinstance(x, Start | Restart)), None)
            if late is None:
                continue
            item, workload = s.by_id[change.instance], stays[id(change)]
            if not item.runs:
                kept_down.append(item)
            what = s.called(needs(item, late, workload) or workload.name)
            holder = workload.identity.instance
            why = because(Code.HELD_FOR_OTHERS, what=what, holder=holder)
            stuck[change.instance] = item.blocked(why)


def _what_stays(
    change: Change, gone: Mapping[str, Step], kept_down: Iterable[Assessment]
) -> ObservedWorkload | None:
    """The workload that the change would have gone, and that stays; None: nothing is in its way."""
    for step, needed in change.behind(gone.keys()):
        for one in (gone[needed], step):  # its own stop waits for what others prepare
            if isinstance(one, ToWorkload):
                return one.workload
    for step in change.steps:
        if isinstance(step, Stop) and any(follows(item, step.workload) for item in kept_down):
            return step.workload
    return None


def _renamed(item: Blocked, held: Mapping[str, Blocked]) -> Blocked:
    """With the exclusion as the reason, where what is in the way is excluded."""
    one = held.get(item.why.facts.get("holder", ""))
    if one is None:
        return item
    facts = {**item.why.facts, "hold": one.why, "hint": one.why.hint}
    code = Code.HELD_IN_DOUBT if one.why.kind is Code.IN_DOUBT else Code.HELD_ON_HOLD
    return replace(item, why=Reason(code, facts), until=None)


def _as_blocked(one: Blocked, plan: Plan) -> Blocked:
    """That it is excluded; unless it is in doubt, what the plan would have done for it as well."""
    if one.why.kind is Code.IN_DOUBT:
        return one
    due = [
        because(Code.WOULD, kind=change.kind, cause=change.why)
        for change in plan.changes
        if change.instance == one.instance and change.kind != "adopt"
    ]
    due += [
        because(Code.WOULD_BE_BLOCKED, blocked=item.why)
        for item in plan.blocked
        if item.instance == one.instance
    ]
    return replace(one, why=replace(one.why, also=tuple(due)))


def _take_out_loads(plan: Plan, s: Situation) -> Plan:
    """Without what is due for paused models in servers that are not paused."""
    paused = s.memory.paused.models
    cooldown: list[Change] = []
    reported: dict[str, list[Reason]] = {}
    names: dict[str, list[str]] = {}
    for change in plan.changes:
        step = next(iter(change.steps), None)
        if not isinstance(step, ToModel) or step.placement.called not in paused:
            cooldown.append(change)
            continue
        model = step.placement.called
        names.setdefault(change.instance, []).append(model)
        pause = since(paused[model], s.observed.at)
        due = because(Code.WOULD, kind=change.kind, cause=change.why)
        reasons = reported.setdefault(change.instance, [])
        reasons += [because(Code.MODEL_PAUSED, model=model, pause=pause), due]
    known = {item.instance for item in plan.blocked}  # one reason for each is enough
    blocked = [
        s.by_id[name].blocked(
            Reason(first.kind, {**first.facts, "hint": resume(names[name])}, tuple(more))
        )
        for name, (first, *more) in reported.items()
        if name not in known
    ]
    return replace(plan, changes=tuple(cooldown), blocked=(*plan.blocked, *blocked))


# --- what waits for its turn --------------------------------------------------------------------


def roll(plan: Plan, s: Situation) -> Plan:
    """The same plan, some of its changes told to wait, with all that depends on them.

    Only the replacement of an instance that still serves waits: to bring up what is down makes
    nothing less available. What is down with the new specification holds up the others, which it
    could take down too; what is blocked from outside, or was not chosen, says nothing about them.
    """
    blocked = {item.instance for item in plan.blocked if item.until is None}
    down: Counter[str] = Counter()  # instances, by model
    for item in s.assessments:
        changing = item.instance.id in s.context.busy
        failing = not _serves(item) and item.instance.id not in blocked and s.is_chosen(item)
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


def cooldown(plan: Plan, s: Situation) -> Plan:
    """The same plan; the changes of a lane in a cooldown wait."""
    cooldowns: dict[str, Cooldown] = {}
    for change in plan.changes:
        one = s.memory.of(change.instance).cooldown
        if one is not None and one.until > s.now and change.steps:
            cooldowns[change.lane] = max(
                cooldowns.get(change.lane, one), one, key=lambda it: it.until
            )
    changes = tuple(
        replace(change, waits=because(Code.NEXT_TRY, failure=one.reason), until=one.until)
        if change.steps and (one := cooldowns.get(change.lane)) is not None
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
