"""Desired and observed state in, a plan out.

A plan is decided once, as if nothing was held up; what then holds it up only takes changes out of
it or lets them wait, with all that depends on them. In this order; the numbers stand again in the
code:

1. What cannot be read is frozen. An unreadable runtime may run what it ran when it could be read,
   and what was begun since: nothing is started or stopped on those GPUs and ports. One that could
   never be read may run a container of ours on any GPU that is not known to be another runtime's.
2. Every workload that is alive in a lane and is not the match of a desired instance must go. It is
   stopped only when each instance that follows on its GPUs is prepared, and created if its runtime
   can create ahead. If a follower is blocked, it stays: a model that runs is worth more than an
   empty GPU. A GPU that is to be kept empty has no follower. And nothing starts beside what stays.
3. An instance without a running match is started, unless it waits for its backoff, a foreign
   process is in the way, or its specification failed, here or on another instance of the model:
   then an earlier one takes over (rollback), or goes on.
4. An instance that runs and is unhealthy is restarted in place, with the same backoff.
5. An instance that runs and lacks a model, or has it with another configuration, gets it loaded.
6. What ended and is neither a match nor the predecessor to roll back to is removed.
7. What is paused, in doubt, or was not chosen, is left as it is: see plan/filters.py.
8. Of one model, no more instances change at a time than its rollout allows: see plan/filters.py.
9. Where something failed just now that no specification is to blame for, the next try is later.
10. On a host that is drained everything of ours stops, and nothing starts: see plan/departures.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mic_supervisor.config.document import CONFIRM
from mic_supervisor.model import (
    DesiredState,
    ObservedState,
    ObservedWorkload,
    RunState,
    RuntimeView,
)
from mic_supervisor.plan.actions import (
    Blocked,
    Change,
    ChangeKind,
    FieldDiff,
    Load,
    Plan,
    Release,
    Remove,
    Step,
)
from mic_supervisor.plan.assess import (
    Assessment,
    Context,
    assess,
    by_instance,
    is_alive,
    left_alone,
)
from mic_supervisor.plan.bring_up import BringUp, decide_bring_up, host_ports, inside
from mic_supervisor.plan.departures import (
    Departures,
    departures,
    drain,
    left_over,
    needs,
    superseded,
)
from mic_supervisor.plan.fallback import fallback
from mic_supervisor.plan.filters import cooldown, exclude, roll
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.obstacles import has_exited, warnings
from mic_supervisor.plan.situation import Lane, Situation
from mic_supervisor.plan.words import Code, Reason, because, called


def reconcile(
    desired: DesiredState,
    observed: ObservedState,
    memory: Memory,
    now: float,
    context: Context,
    assessments: Sequence[Assessment] | None = None,
) -> Plan:
    """The plan that takes the machine one round nearer to the desired state.

    Equal arguments give equal plans. `assessments` spares the work where the caller has them.
    """
    if assessments is None:
        assessments = assess(desired, observed, context, memory)
    s = Situation(desired, observed, memory, now, context, assessments)
    plan = cooldown(roll(exclude(_with_claims(_decide(s), s), s), s), s)  # 7, 8, 9
    return replace(
        plan,
        blocked=tuple(sorted(plan.blocked, key=lambda one: (one.instance, one.reason, one.gpus))),
        warnings=warnings(s),
    )


def _with_claims(plan: Plan, s: Situation) -> Plan:
    """With who claims what is changed, beside the cause."""
    who = {claim.instance: claim for claim in s.desired.claims if claim.by and not claim.ending}

    def named(change: Change) -> Change:
        claim = who.get(change.instance)
        if claim is None:
            return change
        by = because(Code.CLAIMED_BY, holder=called(claim))
        return replace(change, why=replace(change.why, also=(*change.why.also, by)))

    return replace(plan, changes=tuple(map(named, plan.changes))) if who else plan


def _decide(s: Situation) -> Plan:
    changes: list[Change] = []
    why_not = [
        Blocked(
            entry.name,
            because(Code.ENTRY_IN_TROUBLE, trouble=entry.reason, hint=entry.hint),
            entry.gpus,
            entry.model,
        )
        for entry in s.desired.unsatisfiable
    ]
    if s.observed.inventory.error is not None:  # 1
        unknown = because(Code.GPUS_UNREADABLE, error=s.observed.inventory.error_line)
        why_not += _frozen(s.assessments, s.undesired, unknown)
    else:
        for lane in s.lanes:
            due, blocked = _lane(s, lane)
            changes += due
            why_not += blocked
    changes.sort(key=lambda one: (one.lane, one.instance, one.kind, one.cause))
    return Plan(tuple(changes), tuple(why_not))


def _lane(s: Situation, lane: Lane) -> tuple[list[Change], Iterable[Blocked]]:
    for view in sorted(s.observed.runtimes, key=lambda item: item.runtime):  # 1
        if view.error is not None and _concerned(s, view, lane):
            unknown = because(
                Code.RUNTIME_UNREADABLE, runtime=view.runtime, error=view.error, hint=view.hint
            )
            return [], _frozen(lane.wanted, lane.undesired, unknown)
    if s.drained is not None:  # 10
        return drain(s, lane, s.drained)
    # One reason for each instance is enough.
    unconfirmed = because(Code.UNCONFIRMED, what="it", hint=CONFIRM)
    blocked = {
        workload.identity.instance: left_alone(workload, unconfirmed)
        for workload in lane.undesired
        if s.is_unconfirmed(workload)
    }
    undesired = [workload for workload in lane.undesired if not s.is_unconfirmed(workload)]
    decisions = {item.instance.id: decide_bring_up(s, item) for item in lane.wanted}  # 3, 4
    blocked |= {
        name: decision.why_not
        for name, decision in decisions.items()
        if decision.why_not is not None
    }
    bring_ups = {
        name: decision.up for name, decision in decisions.items() if decision.up is not None
    }
    serving = {name: decision.serving for name, decision in decisions.items()}
    while True:  # 2
        stops = departures(s, lane, undesired, bring_ups, serving)
        obstructed = _obstructed(s, lane, bring_ups, stops)
        if not obstructed:
            break
        # What cannot start may make something else stay, and so on.
        bring_ups = {name: up for name, up in bring_ups.items() if name not in obstructed}
        blocked |= obstructed
    changes: list[Change] = []
    for item in lane.wanted:
        name = item.instance.id
        if name in bring_ups:
            changes.append(_start(s, lane, item, bring_ups[name], stops, undesired))
        else:
            due, why_not = _beside(s, lane, item, stops, name in blocked)
            changes += due
            if why_not is not None:
                blocked.setdefault(name, why_not)
    return changes + _removals(s, lane, undesired, stops), blocked.values()


def _concerned(s: Situation, view: RuntimeView, lane: Lane) -> bool:
    """Whether a lane depends on what an unreadable runtime runs."""
    if view.runtime in {*(i.runtime for i in lane.wanted), *(i.runtime for i in lane.undesired)}:
        return True
    if not lane.undesired and all(item.runs and not item.alive for item in lane.wanted):
        return False
    if view.last is None:
        return True
    gpus = {uuid for item in lane.wanted for uuid in item.gpus}
    gpus |= {uuid for workload in lane.undesired for uuid in workload.identity.gpus}
    ports = {n for item in lane.wanted for n in (s.numbers[item.instance.id] or {}).values()}
    return any(
        not one.identity.gpus
        or gpus & {*one.identity.gpus}
        or ports & {*one.identity.ports.values()}
        for one in view.last
    )


def _frozen(
    wanted: Iterable[Assessment], undesired: Iterable[ObservedWorkload], why: Reason
) -> list[Blocked]:
    """Of everything that may have to change. What is known to run is not touched."""
    blocked = [item.blocked(why) for item in wanted if item.alive or not item.runs]
    return blocked + [
        left_alone(one, why) for one in {o.identity.instance: o for o in undesired}.values()
    ]


def _obstructed(
    s: Situation, lane: Lane, bring_ups: Mapping[str, BringUp], stops: Departures
) -> dict[str, Blocked]:
    """The starts that need what something that stays has."""
    out: dict[str, Blocked] = {}
    for item in lane.wanted:
        up = bring_ups.get(item.instance.id)
        if up is None:
            continue
        for workload in s.having(item.instance.id, *item.instance.gpus, *host_ports(up.late)):
            if not is_alive(workload) or workload in stops:
                continue
            if (what := needs(item, up.late, workload)) is not None:
                out[item.instance.id] = item.blocked(_held(s, what, workload))
                break
    return out


def _held(s: Situation, what: str, workload: ObservedWorkload) -> Reason:
    if any(workload is other.match for other in s.assessments):
        code = Code.HELD_BY_OWNER
    elif workload in s.undesired and s.is_unconfirmed(workload):
        code = Code.HELD_UNCONFIRMED
    elif s.protects(workload):
        code = Code.HELD_BY_ENTRY
    else:
        code = Code.HELD_FOR_OTHERS
    return because(code, what=s.called(what), holder=workload.identity.instance)


# --- changes --------------------------------------------------------------------------------


def _start(
    s: Situation,
    lane: Lane,
    item: Assessment,
    up: BringUp,
    stops: Departures,
    undesired: Iterable[ObservedWorkload],
) -> Change:
    """The start waits for everything that leaves its GPUs and ports, whoever stops it."""
    instance, entry = item.instance, s.entry(item)
    steps = _own_stops(item, stops)
    before = [*stops.before(item, up), *(step.id for step in up.early[-1:])]
    before += [  # whose start may be in flight
        f"remove {workload.name}"
        for workload in undesired
        if workload.state is RunState.CREATED and set(workload.identity.gpus) & set(instance.gpus)
    ]
    ended = superseded(item, up, entry)
    if item.runtime not in s.context.creates_ahead:
        # Their name may be the new one's, too: what is removed after the start would be that.
        steps += [_remove(workload, before) for workload in ended]
        before += [f"remove {workload.name}" for workload in ended]
        ended = []
    former = _former(s, item, stops)
    late: list[Step] = []
    if former or _is_released(s, item):
        release = Release(
            f"release {instance.id}",
            instance.id,
            instance.gpus,
            former,
            depends_on=tuple(before),
            floors={u: s.memory.floors[u] for u in instance.gpus if u in s.memory.floors},
            vram=instance.vram,
        )
        late.append(release)
        before = [release.id]
    if up.again is not None and item.match is not None:
        remove = _remove(item.match, before)
        late += [remove, replace(up.again, depends_on=(remove.id,))]
        before = [up.again.id]
    start = replace(up.late, depends_on=tuple(before))
    late += [start, *(_remove(workload, [start.id]) for workload in ended)]
    diff = () if fallback(entry, item) is not None else item.diff
    return _change(up.kind, lane, item, up.why, [*up.early, *steps, *late], diff)


def _beside(
    s: Situation, lane: Lane, item: Assessment, stops: Departures, reported: bool
) -> tuple[list[Change], Blocked | None]:
    """What is due for an instance that is not started, and why no more. `reported`: it is known
    why."""
    entry = s.entry(item)
    changes: list[Change] = []
    why_not: Blocked | None = None
    steps = _own_stops(item, stops)
    # Two of one instance: the second serves nobody and holds the GPU. While something is carried
    # out for it, the second is the former one, on its way out. One of which the engine cannot say
    # whether it runs has mostly ended long ago, or is not the one that serves.
    known = all(one.state is not RunState.UNKNOWN for one in item.ours)
    if steps and known and item.instance.id not in s.context.busy:
        code = Code.FAILED if entry.failed == item.hash else Code.RUNS_TWICE
        changes.append(_change("stop", lane, item, because(code), steps, item.diff))
    good = fallback(entry, item)
    if good is not None or not reported:
        found, why_not = inside(s, good or item)  # 5
        for due in found:
            kind: ChangeKind = "load" if isinstance(due.step, Load) else "unload"
            change = _change(kind, lane, item, due.why, [due.step], due.diff)
            one = due.step.placement
            if item.instance.shared:  # it concerns one model of several
                change = replace(change, model=one.called, gpus=one.gpus)
            changes.append(change)
    extra = left_over(item, entry)  # 6
    if extra and item.runs and not steps:
        removes: list[Step] = [_remove(workload) for workload in extra]
        left = because(Code.LEFT_OVER)
        changes.append(_change("remove", lane, item, left, removes, item.diff))
    idle = not changes and not reported and why_not is None
    if item.runs and entry.started is None and idle:
        changes.append(_change("adopt", lane, item, because(Code.ADOPTED), [], item.diff))
    return changes, why_not


def _removals(
    s: Situation, lane: Lane, undesired: Iterable[ObservedWorkload], stops: Departures
) -> list[Change]:
    changes: list[Change] = []
    for instance, found in by_instance(undesired).items():
        steps: list[Step] = []
        for workload in found:
            stop = stops.of(workload)
            if is_alive(workload) and not stop:
                continue  # what follows it is blocked, so it stays
            steps += [*stop, _remove(workload, [step.id for step in stop[-1:]])]
        if steps:
            # What ended earlier may have had other GPUs.
            last = next((item for item in found if is_alive(item)), found[0])
            one = last.identity
            why = _why_leaving(s, lane, last)
            where = (one.model, one.backend, one.gpus, lane.name)
            changes.append(Change("remove", instance, *where, why, steps=tuple(steps)))
    return changes


def _why_leaving(s: Situation, lane: Lane, workload: ObservedWorkload) -> Reason:
    if s.desired.down:
        return because(Code.DOWN)
    gpus = set(workload.identity.gpus)
    for claim in s.desired.claims:
        if claim.ending is not None and claim.instance == workload.identity.instance:
            return because(Code.CLAIM_ENDED, ending=claim.ending.text)
    for item in lane.wanted:
        if gpus & set(item.instance.gpus):
            return because(Code.OTHER_MODEL, model=item.instance.model)
    if not gpus <= s.named and s.is_put_off(workload):
        return because(Code.OF_PROFILE)
    if gpus & {uuid for entry in s.desired.fleet for uuid in entry.gpus}:
        return because(Code.HANDED_OVER)
    return because(Code.KEPT_EMPTY if gpus & set(s.desired.kept_empty) else Code.NOT_NAMED)


def _own_stops(item: Assessment, stops: Departures) -> list[Step]:
    return [step for workload in item.ours for step in stops.of(workload)]


def _former(s: Situation, item: Assessment, stops: Departures) -> tuple[ObservedWorkload, ...]:
    """The workloads that had these GPUs last."""
    if all(s.gpus[uuid].simulated for uuid in item.instance.gpus):
        return ()
    good = fallback(s.entry(item), item)
    last = (item.match, good.match if good is not None else None)
    return tuple(
        workload
        for workload in s.having(item.instance.id, *item.instance.gpus)
        if (workload in stops or workload in last) and workload.state is not RunState.CREATED
    )


def _is_released(s: Situation, item: Assessment) -> bool:
    """Whether the driver still lists on these GPUs what has ended."""
    gpus = [s.gpus[uuid] for uuid in item.instance.gpus]
    return any(has_exited(process) for gpu in gpus for process in gpu.processes or ())


def _remove(workload: ObservedWorkload, after: Sequence[str] = ()) -> Remove:
    instance = workload.identity.instance
    return Remove(f"remove {workload.name}", instance, workload, depends_on=tuple(after))


def _change(
    kind: ChangeKind,
    lane: Lane,
    item: Assessment,
    why: Reason,
    steps: Sequence[Step],
    diff: tuple[FieldDiff, ...],
) -> Change:
    one = item.instance
    return Change(
        kind, one.id, one.model, one.backend, one.gpus, lane.name, why, diff, tuple(steps)
    )
