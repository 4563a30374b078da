"""Desired against actual, one row per instance: what `status` and HTTP show.

By the rows it is told, too, whether an apply has nothing left to wait for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from mic_supervisor.clocks import later
from mic_supervisor.model import DesiredState, ObservedState, ObservedWorkload, Unsatisfiable
from mic_supervisor.plan.actions import Blocked, Plan
from mic_supervisor.plan.assess import Assessment, Selection, is_alive, workloads
from mic_supervisor.plan.fallback import as_it_runs, fallback
from mic_supervisor.plan.health import ON_ITS_WAY, Activity, Phase, phase_of, since_of
from mic_supervisor.plan.memory import Cooldown, InstanceMemory, Memory, memory_key
from mic_supervisor.plan.words import Code, Reason, because

Sync = Literal["in_sync", "out_of_sync", "unknown"]

_HEALTH = {
    Phase.READY: "healthy",
    Phase.UNPROBED: "unknown",
    Phase.DEGRADED: "degraded",
    Phase.PAUSED: "suspended",
    Phase.DRAINED: "suspended",
    Phase.BACKOFF: "unhealthy",
    Phase.STUCK_STOPPING: "unhealthy",
}


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model in a server of several: where it is placed, and how far it is."""

    model: str
    gpus: tuple[str, ...]
    phase: Phase
    reason: str | None = None
    next_retry: float | None = None
    why: Reason | None = None

    @property
    def code(self) -> str | None:
        return None if self.why is None else self.why.code


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """One instance. Endpoints are URLs by port name.

    Times are steady, as decisions are; `in_wall` makes them seconds since the epoch, as all who
    show them need them.
    """

    id: str
    origin: str
    model: str
    backend: str
    gpus: tuple[str, ...]
    phase: Phase
    sync: Sync
    health: str  # healthy, progressing, degraded, unhealthy, suspended, missing, unknown
    reason: str | None
    since: float | None = None
    restarts: int = 0
    next_retry: float | None = None
    endpoints: Mapping[str, str] = field(default_factory=dict)
    runtime: str | None = None
    ref: str | None = None
    pid: int | None = None
    spec_hash: str | None = None
    serving: bool | None = None  # what its probes say, whatever specification runs; None unknown
    models: tuple[ModelStatus, ...] = ()  # of a server of several
    why: Reason | None = None  # what `reason` says, as data; None: a probe or a program said it
    openai_model: str | None = None  # its name in OpenAI's API

    @property
    def code(self) -> str | None:
        """What programs know the reason by."""
        return None if self.why is None else self.why.code

    @property
    def inside(self) -> tuple[str, ...]:
        """The models of a server of several."""
        return tuple(one.model for one in self.models)

    def mentions(self, failure: str) -> bool:
        """Whether the reason says already what something failed with."""
        return self.reason == failure or (self.why is not None and self.why.is_about(failure))

    def in_wall(self, offset: float) -> InstanceStatus:
        """For people: with the clocks' offset added to every time."""
        return replace(
            self,
            since=later(self.since, offset),
            next_retry=later(self.next_retry, offset),
            models=tuple(
                replace(one, next_retry=later(one.next_retry, offset)) for one in self.models
            ),
        )

    @property
    def as_desired(self) -> bool:
        """As far as can be known, it does what the file says."""
        return self.phase in (Phase.READY, Phase.UNPROBED) and self.sync == "in_sync"


def instance_statuses(
    desired: DesiredState,
    observed: ObservedState,
    assessments: Sequence[Assessment],
    plan: Plan,
    memory: Memory,
    activities: Mapping[str, Activity] = {},
) -> tuple[InstanceStatus, ...]:
    """Sorted by id: every desired instance, every unsatisfiable entry, everything that has to go.

    `activities` is what is being carried out for an instance, by its id.
    """
    blocked = {item.instance: item for item in plan.blocked}
    waits = {change.instance: change.waits for change in plan.changes if change.waits}
    due = {change.instance: change.why for change in plan.changes if change.kind != "adopt"}
    rows = [
        _desired(item, blocked.get(item.instance.id), waits, due, memory, activities)
        for item in assessments
    ]
    known = {row.id for row in rows}
    rows += [
        _leaving(workload, activities.get(workload.identity.instance), plan)
        for workload in {
            item.identity.instance: item for item in workloads(observed) if is_alive(item)
        }.values()
        if workload.identity.instance not in known
    ]
    known = {row.id for row in rows}
    rows += [_absent(entry) for entry in desired.unsatisfiable if not known & set(entry.instances)]
    rows = [
        _cooling_down(row, memory.of(row.id).cooldown, trying=row.id in activities) for row in rows
    ]
    return tuple(sorted(rows, key=lambda row: row.id))


def chosen_rows(
    targets: Selection, desired: DesiredState, rows: Iterable[InstanceStatus]
) -> list[InstanceStatus]:
    """Those that tell how the chosen fare.

    The rows of their instances, of their unsatisfiable entries, and of what still has to leave
    their GPUs.
    """
    named = {item.id for item in desired.instances}
    chosen = [item for item in desired.instances if targets.has(item)]
    ids = {item.id for item in chosen}
    needed = {uuid for item in chosen for uuid in item.gpus}
    needed |= targets.gpus & {*desired.kept_empty}
    lost = {entry.subject for entry in desired.unsatisfiable}
    lost |= {one for entry in desired.unsatisfiable for one in entry.instances}

    def wanted(row: InstanceStatus) -> bool:
        if row.id in named:
            return row.id in ids
        if row.id in lost:
            return targets.concerns(row.model, row.gpus)
        return bool(needed & {*row.gpus})

    return [row for row in rows if wanted(row)]


def by_model(row: InstanceStatus) -> list[InstanceStatus]:
    """A row for each model: of a server of several, one for each that it is to have."""
    if not row.models:
        return [row]
    return [
        replace(
            row,
            **{field.name: getattr(item, field.name) for field in fields(item)},
            sync="in_sync" if item.phase is Phase.READY else row.sync,
            models=(),
        )
        for item in row.models
    ]


def _desired(
    item: Assessment,
    blocked: Blocked | None,
    waits: Mapping[str, Reason],
    due: Mapping[str, Reason],
    memory: Memory,
    activities: Mapping[str, Activity],
) -> InstanceStatus:
    instance, entry = item.instance, memory.of(item.instance.id)
    activity = activities.get(instance.id)
    retry_at = blocked.until if blocked is not None else None
    phase, reason = phase_of(
        item,
        activity=activity and activity.phase,
        blocked=blocked is not None,
        retry_at=retry_at,
    )
    if activity is not None:
        reason = activity.reason
    why: Reason | None = None
    held = blocked if activity is None else None
    if held is not None and not held.paused and phase is not Phase.READY:
        why, reason = held.why, held.reason
        if item.alive and entry.failed == item.hash:
            phase, reason = Phase.DEGRADED, f"{reason}{_how(entry, item)}"
        elif retry_at is not None:
            phase = Phase.BACKOFF
        elif held.queued and phase is Phase.BLOCKED:
            phase = Phase.WAITING_VRAM
        if instance.shared and item.started_up:
            # A model that does not load concerns itself alone; the server has others.
            phase = Phase.DEGRADED
    if held is not None and held.paused:
        failing = item.runs and phase not in (Phase.READY, Phase.UNPROBED)
        how = f"; it runs, {phase.value}" + (f": {reason}" if reason else "")
        phase, reason = Phase.PAUSED, held.reason + (how if failing else "")
        why = held.why
    elif held is not None and held.drained:
        phase = Phase.DRAINED
    elif activity is None and instance.id in waits:
        why = waits[instance.id]
        reason = f"waits for {why}"
    elif phase is Phase.PENDING and reason is None and instance.id in due:
        why = due[instance.id]
        reason = str(why)
    if phase is Phase.LOADING and (unloaded := _failing(item, memory)) is not None:
        # That a model is tried again changes nothing for the others of its server.
        phase, why, reason = Phase.DEGRADED, unloaded, str(unloaded)
    really = as_it_runs(entry, item)
    serving = really.match
    in_sync = item.runs and not item.alive and instance.id not in due
    if in_sync and instance.placements and item.started_up:
        in_sync = all(item.loaded(placement) for placement in instance.placements)
    return InstanceStatus(
        id=instance.id,
        origin=instance.origin,
        model=instance.model,
        backend=instance.backend,
        gpus=instance.gpus,
        phase=phase,
        sync="in_sync" if in_sync else "out_of_sync",
        health=_health(phase, item),
        reason=reason,
        since=since_of(entry, phase),
        restarts=entry.restarts,
        next_retry=retry_at,
        endpoints=_endpoints(really.instance.workload.listen, serving, instance.metrics_path),
        runtime=serving.runtime if serving else None,
        ref=serving.ref if serving else None,
        pid=serving.pid if serving and is_alive(serving) else None,
        spec_hash=item.hash,
        serving=really.serving,
        models=_models(item, phase, reason, why, memory),
        why=why,
        openai_model=instance.openai_model,
    )


def _failing(item: Assessment, memory: Memory) -> Reason | None:
    """What the models of a server of several last failed to load with; None: none has."""
    if not item.instance.shared:
        return None
    missing = [one.called for one in item.instance.placements if not item.loaded(one)]
    failures = {name: memory.of(memory_key(item.instance.id, name)).reason for name in missing}
    found = [
        because(Code.MODEL_BACKOFF, model=name, failure=failure)
        for name, failure in sorted(failures.items())
        if failure is not None
    ]
    return replace(found[0], also=tuple(found[1:])) if found else None


def _models(
    item: Assessment, phase: Phase, reason: str | None, why: Reason | None, memory: Memory
) -> tuple[ModelStatus, ...]:
    if not item.instance.shared:
        return ()
    found: list[ModelStatus] = []
    for placement in sorted(item.instance.placements, key=lambda one: one.called):
        entry = memory.of(memory_key(item.instance.id, placement.called))
        where = (placement.called, placement.gpus)
        if not item.started_up or phase is Phase.PAUSED:
            found.append(ModelStatus(*where, phase, reason, why=why))
        elif item.loaded(placement):
            if item.lives:
                found.append(ModelStatus(*where, Phase.READY))
            else:
                found.append(ModelStatus(*where, phase, reason, why=why))
        elif entry.retry_at is not None:
            late = because(Code.BACKOFF, failure=entry.reason)
            found.append(ModelStatus(*where, Phase.BACKOFF, entry.reason, entry.retry_at, late))
        else:
            found.append(ModelStatus(*where, Phase.LOADING, item.placement(placement).reason))
    return tuple(found)


def _how(entry: InstanceMemory, item: Assessment) -> str:
    """How what was rolled back to fares, for the end of a sentence that says that it runs."""
    good = fallback(entry, item)
    if good is None or not good.runs:
        return ""
    phase, reason = phase_of(good)
    if phase is Phase.READY:
        return ", and is ready"
    if phase is Phase.UNPROBED:
        return ", unprobed"
    return f", {phase.value}" + (f": {reason}" if reason else "")


# What is tried again has not come further than the last time.
_BEFORE_START = frozenset({Phase.PENDING, Phase.STOPPING, Phase.WAITING_VRAM})


def _cooling_down(
    row: InstanceStatus, cooldown: Cooldown | None, *, trying: bool
) -> InstanceStatus:
    """What its last change failed with, where that is a phase of its own, or it only waits.

    That stays so while it is tried again, until something starts: it is one wait, however many
    tries that takes.
    """
    if cooldown is None or row.phase in (Phase.READY, Phase.PAUSED, Phase.DRAINED):
        return row
    if trying and row.phase not in _BEFORE_START:
        return row
    if not trying and cooldown.phase is None and row.phase is not Phase.PENDING:
        return row
    phase = Phase.BACKOFF if cooldown.phase is None else Phase(cooldown.phase)
    return replace(
        row,
        phase=phase,
        reason=cooldown.reason,
        why=because(Code.NEXT_TRY, failure=cooldown.reason),
        next_retry=None if trying else cooldown.until,
        health=_HEALTH.get(phase, row.health),
    )


def _health(phase: Phase, item: Assessment) -> str:
    missing = phase is Phase.PENDING or (phase is Phase.BLOCKED and not item.runs)
    return _HEALTH.get(phase, "missing" if missing and not item.alive else "progressing")


def _leaving(workload: ObservedWorkload, activity: Activity | None, plan: Plan) -> InstanceStatus:
    """A row for what runs and is not desired. What follows it may be blocked: then it stays."""
    identity = workload.identity
    phase, why = Phase.PENDING, because(Code.LEAVING)
    for change in plan.changes:
        if change.instance == identity.instance and change.why.kind is Code.DRAINED:
            why = change.why
    for item in plan.blocked:
        if item.instance == identity.instance:
            phase, why = Phase.PAUSED if item.paused else Phase.BLOCKED, item.why
            break
        if set(item.gpus) & set(identity.gpus):
            phase, why = Phase.BLOCKED, because(Code.STAYS, instance=item.instance)
    return InstanceStatus(
        id=identity.instance,
        origin=identity.origin,
        model=identity.model,
        backend=identity.backend,
        gpus=identity.gpus,
        phase=activity.phase if activity is not None else phase,
        sync="out_of_sync",
        health=_HEALTH[Phase.PAUSED] if phase is Phase.PAUSED and activity is None else "unknown",
        reason=str(why),
        why=why,
        endpoints=_endpoints("127.0.0.1", workload),
        runtime=workload.runtime,
        ref=workload.ref,
        pid=workload.pid,
        spec_hash=identity.spec_hash,
    )


def _absent(entry: Unsatisfiable) -> InstanceStatus:
    why = because(Code.ENTRY_IN_TROUBLE, trouble=entry.reason)
    return InstanceStatus(
        id=entry.name,
        origin="file",
        model=entry.model or "none",
        backend="",
        gpus=entry.gpus,
        phase=Phase.BLOCKED,
        sync="unknown",
        health="missing",
        reason=str(why),
        why=why,
    )


def _endpoints(
    listen: str, workload: ObservedWorkload | None, metrics_path: str | None = None
) -> dict[str, str]:
    if workload is None or not is_alive(workload):
        return {}
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)
    if ":" in host:
        host = f"[{host}]"
    endpoints = {
        name: f"{'grpc' if name == 'grpc' else 'http'}://{host}:{number}"
        + ("/metrics" if name == "metrics" else "")
        for name, number in sorted(workload.identity.ports.items())
    }
    if metrics_path is not None and "http" in endpoints:
        endpoints.setdefault("metrics", endpoints["http"] + metrics_path)
    return endpoints


# --- whether an apply has nothing left to wait for ----------------------------------------------

_SLACK = 5.0  # seconds beyond a start's budget, in which the planner says that it is spent
_FINAL = frozenset({*Phase} - ON_ITS_WAY - {Phase.DEGRADED})


def converged(
    desired: DesiredState,
    plan: Plan,
    statuses: Iterable[InstanceStatus],
    memory: Memory,
    *,
    began: float,
    now: float,
    only: Collection[str] | None = None,
) -> bool:
    """Every instance is ready, or has failed in a way that time alone does not fix.

    `only` are the instances that matter; None: all.

    1. A change that can be executed is work left, unless its last try failed.
    2. An instance on its way is waited for, within the budget that its start has. One that queues
       for its GPU is on its way.
    3. A change whose turn has not come is waited for through those it waits for.
    4. What took over in a rollback is waited for like any other start.
    """
    failing = {name for name, entry in memory.instances.items() if entry.cooldown is not None}
    if any(
        change.steps and change.waits is None and change.instance not in failing
        for change in plan.changes
        if only is None or change.instance in only
    ):
        return False
    final = {item.instance for item in plan.blocked if not item.queued}
    final |= {
        change.instance
        for change in plan.changes
        if change.waits is not None and change.waits.kind is not Code.HOOK
    }
    final |= failing
    budgets = {item.id: item.start_timeout for item in desired.instances}
    for row in statuses:
        entry = memory.of(row.id)
        took_over = row.phase is Phase.DEGRADED and entry.failed is not None  # 4
        if only is not None and row.id not in only:
            continue
        if row.phase in _FINAL or (row.id in final and not (took_over and not entry.ready_since)):
            continue
        started = entry.started_at or began
        if now - max(started, began) < budgets.get(row.id, 0.0) + _SLACK:
            return False
    return True
