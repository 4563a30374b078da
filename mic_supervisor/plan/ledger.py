"""The ledger: everything that is remembered of an instance, and the only way that it changes.

The converger, `plan` and the tests' world tell it what they see and do:

| it is told | of | and remembers |
|---|---|---|
| `observed` | one look at everything | what serves, what ended, what is well again |
| `begun` | a step that is about to be carried out | that the end of what is stopped is no failure |
| `done` | a step that was carried out | what runs now, since when, and what its GPU held before |
| `failed` | a step that was not | a failure of the specification, or a rest |
| `finished` | a change all of whose steps were | that nothing stands in its way |
| `reported` | the phases that are shown | since when |

A failure is of one of two kinds, and each has one wait (plan/backoff.py). What only the
specification can have caused counts against it: it is tried again later and later, or an earlier
one takes over. Anything else (an engine that is gone, a stop that fails) says nothing about it: the
whole instance has a short `Cooldown`. Plan and status show both, with the next try.

What becomes of a workload that ended, or must be ended:

| it ended | and | then |
|---|---|---|
| because we stopped it | - | it is forgotten: `begun` |
| while it was paused, or on an unhealthy GPU | - | it is forgotten, and is no failure |
| by itself, or is not alive, or not up in time | it is the one in `started` | a failure, once |
| by itself | it is not the one in `started` | it was counted before |
| before it ever ran | - | no failure: whoever made it did not come to start it |
| and is removed by hand | nothing else is alive | it is forgotten |
| - | what it ran was never ready, an earlier one was and is there | the earlier one takes over |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from mic_supervisor.errors import (
    MicError,
    ReleaseFailed,
    RuntimeUnavailable,
    StopFailed,
    WorkloadGone,
)
from mic_supervisor.model import ObservedWorkload
from mic_supervisor.plan import backoff
from mic_supervisor.plan.actions import (
    Change,
    Create,
    Load,
    Prepare,
    Restart,
    Start,
    Step,
    Stop,
    Unload,
)
from mic_supervisor.plan.assess import Assessment, is_alive
from mic_supervisor.plan.fallback import can_roll_back, fallback
from mic_supervisor.plan.health import DOWN, Phase, ended, never_ran, since_of
from mic_supervisor.plan.memory import (
    Cooldown,
    Floor,
    InstanceMemory,
    Memory,
    Pulled,
    Recorded,
    memory_key,
)
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.plan.words import Code

# --- what is done -----------------------------------------------------------------------------


def begun(memory: Memory, step: Step) -> Memory:
    """Whatever ends now was asked for, and is no crash: not for our successor either. Nor is what
    starts now what failed before.
    """
    if isinstance(step, Start):
        return _with(memory, step.instance, retry_at=None)
    if isinstance(step, Stop | Restart):
        return _with(memory, step.workload.identity.instance, started=None, retry_at=None)
    return memory


def done(
    memory: Memory,
    step: Step,
    change: Change,
    now: float,
    floors: Mapping[str, Floor],
    files: str | None = None,
) -> Memory:
    """`floors` are what its GPUs held before the start. One that is not known is forgotten: what
    was known before would be the wrong one. So it is with `files`, what a load found on the disk.
    """
    if isinstance(step, Load | Unload):
        known = {**(memory.of(step.instance).files or {}), step.placement.model: files}
        kept = {model: found for model, found in known.items() if found is not None}
        return _with(memory, step.instance, files=kept or None)
    if isinstance(step, Prepare) and step.key is not None:
        return _with(memory, step.instance, prepared=step.key)
    if not isinstance(step, Start | Restart):
        return memory
    others = {uuid: floor for uuid, floor in memory.floors.items() if uuid not in change.gpus}
    own = {uuid: floors[uuid] for uuid in change.gpus if uuid in floors}
    return _with(
        replace(memory, floors={**others, **own}),
        change.instance,
        started=step.launch.name if isinstance(step, Start) else step.workload.name,
        started_at=now,
        cold=True,
        restarts=memory.of(change.instance).restarts + _is_a_restart(change),
    )


def _is_a_restart(change: Change) -> bool:
    """A start that was cut short, and comes to its end now, is none."""
    return change.kind in ("start", "restart") and change.why.kind is not Code.NEVER_STARTED


def failed(
    memory: Memory, step: Step, error: MicError, item: Assessment | None, now: float, jitter: float
) -> Memory:
    """`item` is the instance as it was when the change was decided; None: it is not desired."""
    if item is not None and item.instance.shared and isinstance(step, Load):
        # It concerns the model alone: the server goes on with the others.
        key, digest = memory_key(step.instance, step.placement.called), step.placement.digest
        entry = memory.of(key)
        failures = (entry.failures if entry.attempt == digest else 0) + 1
        entry = replace(
            entry,
            failures=failures,
            reason=error.message,
            attempt=digest,
            retry_at=now + backoff.delay(max(failures, 2), jitter),
        )
        return memory.with_instance(key, entry)
    if item is None or not is_of_the_specification(step, error):
        return cool_down(memory, step.instance, error.message, now, _PHASES.get(type(error)))
    entry = _count(
        memory.of(step.instance),
        item,
        error.message,
        now,
        jitter=jitter,
        refused=True,
        early=isinstance(step, Prepare | Create),
    )
    return memory.with_instance(step.instance, entry)


def pulled(memory: Memory, found: Mapping[str, Pulled | None]) -> Memory:
    """Somebody asked for the newest images of these instances, and the engine has them. None: what
    runs is the newest.
    """
    chosen = {name: replace(memory.of(name), pulled=one) for name, one in found.items()}
    return replace(memory, instances={**memory.instances, **chosen})


def finished(memory: Memory, change: Change) -> Memory:
    return _with(memory, change.instance, cooldown=None)


def cool_down(
    memory: Memory, instance: str, reason: str, now: float, phase: Phase | None = None
) -> Memory:
    """Try nothing for the instance for a while."""
    entry = memory.of(instance)
    failures = entry.cooldown.failures + 1 if entry.cooldown is not None else 1
    cooldown = Cooldown(now + backoff.cooldown(failures), reason, failures, phase)
    return memory.with_instance(instance, replace(entry, cooldown=cooldown))


def forgiven(memory: Memory, instances: Collection[str]) -> Memory:
    """What failed is tried again now, from the beginning."""
    chosen = {name: memory.of(name) for name in instances if name in memory.instances}
    cleared = {
        name: replace(
            _cleared(entry), cooldown=None, prepared=None if entry.has_failed else entry.prepared
        )
        for name, entry in chosen.items()
    }
    return replace(memory, instances={**memory.instances, **cleared})


def explained(memory: Memory, instances: Collection[str] | None = None) -> Memory:
    """A person said to go on with these, None is everything: see Memory.unexplained."""
    if memory.unexplained is None or instances is None:
        return replace(memory, unexplained=None)
    left = {
        runtime: tuple(name for name in names if name not in instances)
        for runtime, names in memory.unexplained.items()
    }
    return replace(memory, unexplained=left)


_PHASES: Mapping[type[MicError], Phase] = {
    StopFailed: Phase.STUCK_STOPPING,
    ReleaseFailed: Phase.BLOCKED,
}


def _with(memory: Memory, instance: str, **values: object) -> Memory:
    """Of an instance that nothing is known of, there is nothing to change."""
    entry = memory.instances.get(instance)
    if entry is None:
        return memory
    return memory.with_instance(instance, replace(entry, **values))  # type: ignore[arg-type]


def _well(entry: InstanceMemory) -> InstanceMemory:
    """Without the failures that made it wait."""
    return replace(entry, failures=0, reason=None, retry_at=None, attempt=None)


def _cleared(entry: InstanceMemory) -> InstanceMemory:
    """As if its specification had never failed."""
    return replace(_well(entry), failed=None, failed_reason=None)


def _runs(entry: InstanceMemory, workload: ObservedWorkload) -> InstanceMemory:
    """One that we did not start: whoever did, its end would be a failure."""
    if entry.started == workload.name:
        return entry
    return replace(entry, started=workload.name, started_at=None, cold=None, ready_since=None)


def is_of_the_specification(step: Step, error: MicError) -> bool:
    """Whether a step that failed says something about the specification that is to run.

    Only what makes it run can fail because of it. A remove that finds a container running, a stop
    or a release say something about what was there before, and an engine that is gone, or a
    container that somebody removed meanwhile, about nothing.
    """
    makes_it_run = isinstance(step, Prepare | Create | Start | Restart | Load)
    return makes_it_run and not isinstance(
        error, RuntimeUnavailable | WorkloadGone | StopFailed | ReleaseFailed
    )


def _count(
    entry: InstanceMemory,
    assessment: Assessment,
    reason: str,
    now: float,
    *,
    jitter: float,
    refused: bool = False,
    early: bool = False,
) -> InstanceMemory:
    """Count one failure of the desired specification.

    `refused`: somebody said no, and would say it again at once; so even the first retry waits.
    `early`: it failed before anything was stopped for it. That is tried again, with backoff.

    A specification that was never ready, while an earlier one was and is still there, is not tried
    again: the earlier one takes over, at once.
    """
    failures = entry.failures + 1
    retry_at = now + backoff.delay(max(failures, 2) if refused else failures, jitter)
    failed, failed_reason = entry.failed, entry.failed_reason
    if (
        not early
        and failed != assessment.hash
        and entry.ready != assessment.hash
        and can_roll_back(entry, assessment)
    ):
        failed, failed_reason, retry_at = assessment.hash, reason, now
    return replace(
        entry,
        failures=failures,
        reason=reason,
        attempt=assessment.hash,
        retry_at=retry_at,
        failed=failed,
        failed_reason=failed_reason,
        ready_since=None,
    )


# --- what is told -----------------------------------------------------------------------------


class Entered(NamedTuple):
    """An instance came into another phase; `seconds` is how long it was in the one before."""

    row: InstanceStatus
    was: str | None
    seconds: float | None


def reported(
    memory: Memory, rows: Iterable[InstanceStatus], now: float, unasked: Collection[str] = ()
) -> tuple[Memory, tuple[InstanceStatus, ...], list[Entered]]:
    """The phases that are shown, with since when; and those that were entered.

    An instance that fails is down since its first failure, whichever phase its tries are in. One
    that was up, and is `unasked`, since this supervisor has not come to its probes, is still up.
    """
    shown: list[InstanceStatus] = []
    entered: list[Entered] = []
    for row in rows:
        entry = memory.instances.get(row.id)
        if entry is None:
            shown.append(row)
            continue
        if row.id in unasked and entry.phase is not None and entry.phase not in DOWN:
            shown.append(replace(row, since=entry.since))
            continue
        if entry.phase != row.phase:
            seconds = None if entry.since is None else now - entry.since
            entered.append(Entered(row, entry.phase, seconds))
            since = since_of(entry, row.phase) or now
            entry = replace(entry, phase=row.phase.value, since=since)
            memory = memory.with_instance(row.id, entry)
        shown.append(replace(row, since=entry.since))
    return memory, tuple(shown), entered


# --- what is seen -----------------------------------------------------------------------------


def observed(
    memory: Memory,
    assessments: Iterable[Assessment],
    now: float,
    *,
    jitter: float,
    busy: Collection[str] = (),
    keep: Collection[str] = (),
    leaving: Collection[str] = (),
    unhealthy_gpus: Collection[str] = (),
) -> Memory:
    """Fold what was just observed into the memory. Instances that are gone are forgotten.

    Of a `busy` instance nothing is concluded: that it does not run may be our own doing. Nor of one
    to `keep`: the file names it, and for now cannot be followed. Of one that is `leaving`, and that
    the file no longer names, a cooldown is remembered. The end of a paused one is not counted as a
    failure, then or later: whoever paused it may have ended it. Nor is that of one on a GPU that is
    `unhealthy_gpus`, by its UUID: the GPU may have.
    """
    memory = _cooled_down(memory, now, busy)
    instances: dict[str, InstanceMemory] = {
        name: entry
        for name, entry in memory.instances.items()
        if name in busy or name in keep or (entry.cooldown is not None and name in leaving)
    }
    for assessment in assessments:
        instance = assessment.instance.id
        if instance not in busy:
            paused = bool(memory.paused) and memory.paused.has(
                assessment.instance.model, assessment.gpus
            )
            quiet = paused or not {*assessment.gpus}.isdisjoint(unhealthy_gpus)
            instances[instance] = _remember(memory.of(instance), assessment, now, jitter, quiet)
        if assessment.instance.shared:
            instances |= _remember_loads(memory, assessment)
    return replace(memory, instances=instances)


def _remember(
    entry: InstanceMemory, assessment: Assessment, now: float, jitter: float, quiet: bool
) -> InstanceMemory:
    if entry.attempt not in (None, assessment.hash) or entry.failed not in (None, assessment.hash):
        # The file asks for something else now: what failed before says nothing about it.
        entry = _cleared(entry)
    if not assessment.readable:
        return entry
    if assessment.serves and entry.started is None:
        # A start that failed has come to its end all the same, and is adopted.
        entry = replace(entry, cooldown=None)
    back = fallback(entry, assessment)
    if quiet:
        entry = _note_end_quietly(entry, assessment)
    else:
        entry = _note_end(entry, back or assessment, now, jitter)
    if assessment.serves:
        assert assessment.match is not None  # implied by `serves`
        entry = replace(
            entry,
            cold=None,
            ready=assessment.hash,
            ready_workload=assessment.match.name,
            ready_since=entry.ready_since if entry.ready_since is not None else now,
            ready_probes=assessment.instance.probes,
            ready_record=recorded(assessment.match),
            failed=None,
            failed_reason=None,
        )
    elif back is None or not back.serves:
        entry = replace(entry, ready_since=None)
    else:
        since = entry.ready_since if entry.ready_since is not None else now
        entry = replace(entry, cold=None, ready_since=since)
    if backoff.is_stable(entry.ready_since, now, assessment.instance.start_timeout):
        entry = _well(entry)
    return entry


def _remember_loads(memory: Memory, assessment: Assessment) -> dict[str, InstanceMemory]:
    """What is still to be known of loads that failed: not what is loaded, nor what has changed."""
    kept: dict[str, InstanceMemory] = {}
    for placement in assessment.instance.placements:
        key = memory_key(assessment.instance.id, placement.called)
        entry = memory.instances.get(key)
        same = entry is not None and entry.attempt == placement.digest
        if entry is not None and same and not assessment.loaded(placement):
            kept[key] = entry
    return kept


def _note_end(
    entry: InstanceMemory, assessment: Assessment, now: float, jitter: float
) -> InstanceMemory:
    """What became of the workload that runs, or ran last, for the instance.

    `started` names it until its failure was counted, so that each is counted once.
    """
    workload = assessment.match
    if workload is None:
        if entry.started is not None and not assessment.alive:
            return replace(entry, started=None, ready_since=None)  # removed by hand
        return entry
    if is_alive(workload):
        failure = assessment.failure(entry, now)
    elif never_ran(workload):
        return entry  # it was made, and whoever made it did not come to start it
    else:
        failure = ended(workload)
    if failure is None:
        return _runs(entry, workload)
    if entry.started != workload.name:
        return entry
    return _count(replace(entry, started=None), assessment, failure, now, jitter=jitter)


def _note_end_quietly(entry: InstanceMemory, assessment: Assessment) -> InstanceMemory:
    """Forget what ended, so that nobody counts it later; who started it again is no matter."""
    if assessment.running is None:
        return replace(entry, started=None, ready_since=None)
    match = assessment.match
    return _runs(entry, match) if assessment.runs and match is not None else entry


def _cooled_down(memory: Memory, now: float, busy: Collection[str]) -> Memory:
    """A cooldown after which nothing was tried any more is over, and so is its count. A try may
    take longer than the longest cooldown.
    """
    latest = now - backoff.LONGEST_COOLDOWN
    for name, entry in memory.instances.items():
        if entry.cooldown is not None and entry.cooldown.until < latest and name not in busy:
            memory = _with(memory, name, cooldown=None)
    return memory


def recorded(workload: ObservedWorkload) -> Recorded | None:
    """What to remember of a workload that is ready; None where a container remains anyway."""
    spec = workload.identity.spec
    if not isinstance(spec, Mapping) or spec.get("kind") != "process":
        return None
    return Recorded(workload.runtime, workload.name, workload.identity)
