"""How one instance is brought up: what to launch, where, what is early, and what to load into it.

In a server of several models each has a backoff of its own. What merely is missing from the file
is unloaded only when that is confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mic_supervisor.config.document import CONFIRM
from mic_supervisor.model import (
    ContainerSpec,
    Gpu,
    Launch,
    LoadState,
    ObservedWorkload,
    Placement,
    PlacementState,
    RunState,
)
from mic_supervisor.plan.actions import (
    Blocked,
    ChangeKind,
    Create,
    FieldDiff,
    Load,
    Prepare,
    Remove,
    Restart,
    Start,
    Step,
    ToModel,
    Unload,
)
from mic_supervisor.plan.assess import Assessment, is_alive
from mic_supervisor.plan.fallback import fallback, rebuilt, relaunch
from mic_supervisor.plan.health import ended, never_ran
from mic_supervisor.plan.launch import launch, near_of, preparation
from mic_supervisor.plan.memory import memory_key
from mic_supervisor.plan.obstacles import in_the_way, in_trouble
from mic_supervisor.plan.situation import Situation
from mic_supervisor.plan.words import Code, Reason, because, gpu_names, short_digest, shortened


@dataclass(frozen=True, slots=True)
class BringUp:
    """`early` runs while whatever must go still serves; `late` is the start itself.

    `stops` is the instance's own workload where it is alive but unhealthy. `again` is set where it
    is to be made anew under the same name, so only once it is gone.
    """

    kind: ChangeKind
    why: Reason
    early: tuple[Step, ...]
    late: Start | Restart
    stops: ObservedWorkload | None = None
    again: Create | None = None

    @property
    def target(self) -> str:
        """The name of the workload that will run."""
        return self.late.launch.name if isinstance(self.late, Start) else self.late.workload.name


@dataclass(frozen=True, slots=True)
class Decision:
    """`serving` may stay alive, `up` is due, and `why_not` is why no more than that is done."""

    serving: ObservedWorkload | None
    up: BringUp | None = None
    why_not: Blocked | None = None


def decide_bring_up(s: Situation, item: Assessment) -> Decision:
    """How one instance is brought up, if that is due."""
    entry = s.entry(item)
    unhealthy_gpu = next(
        (s.gpus[u] for u in item.instance.gpus if u in s.gpus and s.gpus[u].trouble), None
    )
    if (good := fallback(entry, item)) is not None:
        up, why = _fall_back(s, good)
        if unhealthy_gpu and up is not None:
            return Decision(good.match, None, item.blocked(in_trouble(unhealthy_gpu)))
        return Decision(good.match, cleared(up, item) if up is not None else None, why)
    unhealthy = item.failure(entry, s.now)
    forced = item.instance.id in s.context.forced
    blind = item.blind if unhealthy is None and not unhealthy_gpu else None
    if item.runs and unhealthy is None and blind is None and not forced:
        return Decision(item.match)
    why_not = _keeps_down(s, item, unhealthy_gpu)
    if why_not is not None:
        return Decision(item.match, None, item.blocked(why_not))
    if not forced and entry.retry_at is not None and entry.retry_at > s.now:
        backoff = because(Code.BACKOFF, failure=entry.reason)
        return Decision(item.match, None, item.blocked(backoff, entry.retry_at))
    found = _bring_up(s, item, unhealthy, blind)
    if isinstance(found, Reason):
        return Decision(item.match, None, item.blocked(found))
    return Decision(item.match, cleared(found, item))


def _keeps_down(s: Situation, item: Assessment, unhealthy_gpu: Gpu | None) -> Reason | None:
    """What speaks against any start of it, however it were made."""
    lost = [uuid for uuid in item.instance.gpus if uuid not in s.gpus]
    if lost:
        return because(Code.GPU_LOST, gpus=", ".join(lost))
    if unhealthy_gpu is not None:
        return in_trouble(unhealthy_gpu)
    missing = {uuid for workload in item.alive for uuid in workload.identity.gpus} - s.named
    unnamed = not s.context.confirmed and not s.is_of_profile(item.instance.model, missing)
    if unnamed and item.instance.shared:
        # One of the entries of a server is missing, and it would be replaced since it is.
        gone = gpu_names(sorted(missing), s.indices)
        return because(Code.SHRINKS, gpus=gone, hint=CONFIRM)
    other = s.failed_on.get(item.instance.model)
    if other is not None and item.alive and not item.runs:
        return because(Code.FAILED_ELSEWHERE, instance=other)
    return None


def _bring_up(
    s: Situation, item: Assessment, unhealthy: str | None, blind: str | None
) -> BringUp | Reason:
    """The way up, or what stands in it. `blind`: it must be made anew, and that is why."""
    instance, match = item.instance, item.match
    numbers = s.numbers[instance.id]
    if numbers is None:
        first, last = s.context.port_range
        return because(Code.NO_PORT, first=first, last=last)
    try:
        target = launch(item, numbers, s.indices, s.context)
        target = replace(target, near=near_of(target.spec.limits, instance.gpus, s.gpus))
    except KeyError as error:
        return because(Code.NO_VARIABLE, name=str(error))
    obstacle = in_the_way(s, instance, target.runtime, target.name, numbers.values())
    if obstacle is not None:
        return obstacle
    kind, cause = _why(s, item, unhealthy)
    stops = match if match is not None and is_alive(match) else None
    prepare = _preparing(s, item, target)
    start = Start(f"start {target.name}", instance.id, target)
    if item.runtime not in s.context.creates_ahead:
        return BringUp(kind, cause, (prepare,), start, stops)
    create = Create(f"create {target.name}", instance.id, target, depends_on=(prepare.id,))
    if blind is not None:
        why = because(Code.GPU_NOT_SEEN, blind=blind)
        return BringUp("replace", why, (prepare,), start, stops, again=create)
    again = [match] if match is not None and dict(match.identity.ports) == numbers else []
    # The name tells specification and ports: what has it already is what would be created.
    again += [workload for workload in item.ended if workload.name == target.name]
    if again:
        restart = Restart(f"restart {again[0].name}", instance.id, again[0])
        # Only where something serves meanwhile: what is down loses nothing by a failing start.
        return BringUp(kind, cause, (prepare,) if item.alive else (), restart, stops)
    return BringUp(kind, cause, (prepare, create), start)


def _preparing(s: Situation, item: Assessment, target: Launch) -> Prepare:
    """With the command of `prepare`, unless that was run for this specification already."""
    prepare, asked = (
        Prepare(f"prepare {target.name}", item.instance.id, target),
        item.instance.prepare,
    )
    if asked is None:
        return prepare
    parts = (target.identity.spec_hash, *asked.command)
    key = s.context.key.digest("\0".join(parts))
    if s.entry(item).prepared == key:
        return prepare
    command = preparation(item.instance.workload, asked, target.identity, s.indices)
    return replace(prepare, command=command, asked=asked, key=key)


def cleared(up: BringUp, item: Assessment) -> BringUp:
    """`up`, after what was created for the instance and is not what it starts is gone.

    A start of it may be in flight, from a supervisor that was killed: it must not come to its end
    beside another one. A remove waits for it, and then fails, before anything was stopped.
    """
    early = [*up.early]
    for workload in (item.match, *item.ended):
        if workload is None or workload.state is not RunState.CREATED:
            continue
        if workload.name != up.target:
            after = tuple(step.id for step in early[-1:])
            early.append(
                Remove(f"remove {workload.name}", item.instance.id, workload, depends_on=after)
            )
    return replace(up, early=tuple(early))


def _fall_back(s: Situation, good: Assessment) -> tuple[BringUp | None, Blocked]:
    """What is due for what was rolled back to, see plan/fallback.py, and why no more than that."""
    entry = s.entry(good)
    failure = entry.failed_reason
    reported = good.blocked(because(Code.ROLLED_BACK, failure=failure, instance=good.instance.id))
    unhealthy = good.failure(entry, s.now)
    patient = entry.retry_at is not None and entry.retry_at > s.now
    well = good.runs and unhealthy is None
    if well and not (patient and loads(good)):
        return None, reported
    if patient:
        how = "cannot be loaded again" if well else "failed as well"
        last, own = entry.reason, good.instance.id
        why = because(Code.ROLLBACK_BACKOFF, failure=failure, how=how, last=last, instance=own)
        return None, good.blocked(why, entry.retry_at)
    up = _take_over(s, good, unhealthy)
    if isinstance(up, BringUp):
        return up, reported
    facts = {"obstacle": up, "hint": up.hint, "instance": good.instance.id}
    why = because(Code.ROLLBACK_BLOCKED, failure=failure, **facts)
    return None, good.blocked(why)


def _take_over(s: Situation, good: Assessment, unhealthy: str | None) -> BringUp | Reason:
    """The way back to the last good specification, or what stands in it."""
    instance, back, entry = good.instance, good.match, s.entry(good)
    record = entry.ready_record
    lost = [uuid for uuid in instance.gpus if uuid not in s.gpus]
    if lost:
        return because(Code.GPU_LOST, gpus=", ".join(lost))
    early: tuple[Step, ...] = ()
    late: Start | Restart
    spec = rebuilt(record, good)
    if spec is not None and record is not None:
        target = relaunch(record, spec, s.indices)
        target = replace(target, near=near_of(spec.limits, target.identity.gpus, s.gpus))
        name, numbers = target.name, target.identity.ports.values()
        early = (Prepare(f"prepare {name}", instance.id, target),)
        late = Start(f"start {name}", instance.id, target)
    else:
        assert back is not None  # it is what was rolled back to
        name, numbers = back.name, back.identity.ports.values()
        late = Restart(f"restart {name}", instance.id, back)
    obstacle = in_the_way(s, instance, good.runtime, name, numbers)
    if obstacle is not None:
        return obstacle
    if unhealthy is not None:
        why = because(Code.ROLLED_BACK_UNHEALTHY, failure=unhealthy)
        return BringUp("restart", why, early, late, back)
    return BringUp("start", because(Code.ROLLBACK, failure=entry.failed_reason), early, late)


def host_ports(step: Step) -> set[int]:
    """The ports that a step gives to its instance."""
    if isinstance(step, Start):
        return set(step.launch.identity.ports.values())
    if isinstance(step, Restart):
        return set(step.workload.identity.ports.values())
    return set()


def _why(s: Situation, item: Assessment, unhealthy: str | None) -> tuple[ChangeKind, Reason]:
    match = item.match
    created = match is not None and match.state is RunState.CREATED
    if unhealthy is not None:
        return "restart", because(Code.UNHEALTHY, failure=unhealthy)
    if item.runs and item.instance.id in s.context.forced:
        return "restart", because(Code.ASKED_FOR)
    if item.alive:
        return "replace", because(Code.INTERRUPTED) if created else _drift(item)
    if match is not None and never_ran(match):
        return "start", because(Code.NEVER_STARTED)
    if match is not None:
        return "start", because(Code.ENDED, end=ended(match))
    if item.diff:
        return "create", because(Code.CHANGED_AND_DOWN, drift=_drift(item))
    known = s.entry(item).ready is not None
    return "create", because(Code.WORKLOAD_REMOVED if known else Code.MISSING)


def _drift(item: Assessment) -> Reason:
    paths = [diff.path for diff in item.diff]
    models = [placement.called for placement in item.instance.placements]
    # What is in a server that is replaced is gone until the new one has it loaded.
    down = f"; {' and '.join(models)} go down with it" if len(models) > 1 else ""
    if paths == ["gpus"]:
        return because(Code.GPUS_CHANGED, down=down)
    if paths == ["digest"] and isinstance(item.instance.workload, ContainerSpec):
        before, after = (short_digest(at) for at in (item.diff[0].before, item.diff[0].after))
        image = item.instance.workload.image
        return because(Code.TAG_MOVED, image=image, before=before, after=after)
    return because(Code.SPEC_CHANGED, paths=shortened(paths), down=down)


# --- models inside a server ---------------------------------------------------------------------


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
            model = load.step.placement.called
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
    due += _asked_for(s, item)
    for unload in _unloads(item):
        one = unload.step.placement
        named = one.gpus and s.is_of_profile(one.model, {*one.gpus} - s.placed)
        if s.context.confirmed or named:
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
        of = f"{placement.called}: " if item.instance.shared else ""
        if state.state is LoadState.LOADED:
            changed = ", ".join(entry.path for entry in diff) or "its configuration"
            why = because(Code.MODEL_CHANGED, of=of, changed=changed)
        else:
            why = because(Code.NOT_LOADED, of=of, model=placement.called)
        name = f"load {placement.called} into {match.name}"
        out.append(Due(Load(name, item.instance.id, match, placement), why, diff))
    return out


def _asked_for(s: Situation, item: Assessment) -> list[Due]:
    """The models of a server that somebody wants restarted: what is unloaded is loaded again."""
    match = item.match
    if match is None or not item.started_up:
        return []
    keys = {memory_key(item.instance.id, one.called): one for one in item.instance.placements}
    return [
        _unload(item, match, one, because(Code.ASKED_FOR))
        for key, one in keys.items()
        if key in s.context.forced and item.loaded(one)
    ]


def _unloads(item: Assessment) -> list[Due]:
    """What a server has loaded for us that the file does not have in it any more."""
    match = item.match
    if match is None or not item.started_up or item.alive:
        return []
    return [
        _unload(item, match, one, because(Code.SURPLUS, model=one.model))
        for one in item.health.surplus
    ]


def _unload(item: Assessment, match: ObservedWorkload, one: Placement, why: Reason) -> Due:
    return Due(Unload(f"unload {one.called} from {match.name}", item.instance.id, match, one), why)


def _is_known(state: PlacementState) -> bool:
    """Whether a server's word on a model is enough to send it anew."""
    if state.state is LoadState.LOADED:
        return state.digest is not None
    return state.state in (LoadState.ABSENT, LoadState.FAILED)
