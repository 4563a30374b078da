"""Phases, and what is remembered of successes and failures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum

from mic_supervisor.errors import (
    MicError,
    ReleaseFailed,
    RuntimeUnavailable,
    StopFailed,
    WorkloadGone,
)
from mic_supervisor.model import LoadState, ObservedWorkload, Placement, RunState
from mic_supervisor.plan import backoff
from mic_supervisor.plan.actions import Create, Load, Prepare, Restart, Start, Step
from mic_supervisor.plan.assess import Assessment, is_alive
from mic_supervisor.plan.fallback import fallback, way_back
from mic_supervisor.plan.loads import memory_key
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.workload_record import recorded


class Phase(StrEnum):
    """Where an instance is on its way."""

    PENDING = "pending"
    STOPPING = "stopping"
    WAITING_VRAM = "waiting_vram"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    UNPROBED = "unprobed"
    DEGRADED = "degraded"
    BACKOFF = "backoff"
    BLOCKED = "blocked"
    PAUSED = "paused"
    STUCK_STOPPING = "stuck_stopping"


def phase_of(
    assessment: Assessment,
    *,
    activity: Phase | None = None,
    blocked: bool = False,
    retry_at: float | None = None,
) -> tuple[Phase, str | None]:
    """The phase, and why it is not simply ready.

    `activity` is what is being executed for the instance right now.
    """
    if activity is not None:
        return activity, None
    if not assessment.runs:
        if assessment.alive and not blocked:
            return Phase.PENDING, "another specification runs"
        if retry_at is not None:
            return Phase.BACKOFF, None
        return (Phase.BLOCKED if blocked else Phase.PENDING), None
    match = assessment.match
    assert match is not None  # implied by `runs`
    if match.doubt is not None:
        return Phase.DEGRADED, match.doubt.reason
    if match.state is RunState.PAUSED:
        return Phase.DEGRADED, "it was paused by hand"
    if not assessment.started_up:
        result = assessment.health.startup
        return Phase.STARTING, result.reason if result is not None else None
    for placement in assessment.instance.placements:
        if not assessment.loaded(placement):
            state = assessment.placement(placement)
            if state.state is LoadState.LOADED and state.digest is not None:
                return Phase.LOADING, f"{placement.model} runs with another configuration"
            return Phase.LOADING, state.reason or f"{placement.model} is {state.state.value}"
    if assessment.unprobed:
        return Phase.UNPROBED, "it has no probe: nothing can say whether it is healthy"
    if assessment.ready:
        return Phase.READY, None
    for result in (assessment.health.liveness, assessment.health.readiness):
        if result is not None and result.ok is not True:
            unknown = "health unknown: " if result.ok is None else ""
            return Phase.DEGRADED, f"{unknown}{result.reason}"
    return Phase.STARTING, "not probed yet"


def remember(
    memory: Memory,
    assessments: Iterable[Assessment],
    now: float,
    *,
    jitter: float,
    busy: Collection[str] = (),
    keep: Collection[str] = (),
    sick: Collection[str] = (),
) -> Memory:
    """Fold what was just observed into the memory. Instances that are gone are forgotten.

    Of a `busy` instance nothing is concluded: that it does not run may be our own doing. Nor of one
    to `keep`: the file names it, and for now cannot be followed. The end of a paused one is not
    counted as a failure, then or later: whoever paused it may have ended it. Nor is that of one on
    a GPU that is `sick`, by its UUID: the GPU may have.
    """
    instances: dict[str, InstanceMemory] = {
        name: entry for name, entry in memory.instances.items() if name in busy or name in keep
    }
    for assessment in assessments:
        instance = assessment.instance.id
        if instance not in busy:
            paused = bool(memory.paused) and memory.paused.has(
                assessment.instance.model, assessment.gpus
            )
            quiet = paused or not {*assessment.gpus}.isdisjoint(sick)
            instances[instance] = _remember(memory.of(instance), assessment, now, jitter, quiet)
        if assessment.instance.shared:
            instances |= _remember_loads(memory, assessment)
    return replace(memory, instances=instances)


def _remember(
    entry: InstanceMemory, assessment: Assessment, now: float, jitter: float, quiet: bool
) -> InstanceMemory:
    if entry.attempt not in (None, assessment.hash) or entry.failed not in (None, assessment.hash):
        # The file asks for something else now: what failed before says nothing about it.
        entry = replace(
            entry,
            failures=0,
            reason=None,
            retry_at=None,
            attempt=None,
            failed=None,
            failed_reason=None,
        )
    if not assessment.readable:
        return entry
    back = fallback(entry, assessment)
    if quiet:
        entry = _note_end_quietly(entry, assessment)
    else:
        entry = _note_end(entry, back or assessment, now, jitter)
    if assessment.serves:
        assert assessment.match is not None  # implied by `serves`
        entry = replace(
            entry,
            ready=assessment.hash,
            ready_workload=assessment.match.name,
            ready_since=entry.ready_since if entry.ready_since is not None else now,
            ready_probes=assessment.instance.probes,
            ready_record=recorded(assessment.match),
            failed=None,
            failed_reason=None,
        )
    elif back is not None and back.serves:
        since = entry.ready_since if entry.ready_since is not None else now
        entry = replace(entry, ready_since=since)
    elif entry.ready_since is not None:
        entry = replace(entry, ready_since=None)
    if backoff.is_stable(entry.ready_since, now, assessment.instance.start_timeout):
        entry = replace(entry, failures=0, reason=None, retry_at=None, attempt=None)
    return entry


def _remember_loads(memory: Memory, assessment: Assessment) -> dict[str, InstanceMemory]:
    """What is still to be known of loads that failed: not what is loaded, nor what has changed."""
    kept: dict[str, InstanceMemory] = {}
    for placement in assessment.instance.placements:
        key = memory_key(assessment.instance.id, placement.model)
        entry = memory.instances.get(key)
        same = entry is not None and entry.attempt == placement.digest
        if entry is not None and same and not assessment.loaded(placement):
            kept[key] = entry
    return kept


def note_load_failure(
    entry: InstanceMemory, placement: Placement, reason: str, now: float, jitter: float
) -> InstanceMemory:
    """Count one failure to load a model of a shared server. The server said no, and would again."""
    failures = (entry.failures if entry.attempt == placement.digest else 0) + 1
    return replace(
        entry,
        failures=failures,
        reason=reason,
        attempt=placement.digest,
        retry_at=now + backoff.delay(max(failures, 2), jitter),
    )


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
        failure = assessment.live_failure or assessment.overdue(entry.started_at, now)
    elif never_ran(workload):
        return entry  # it was made, and whoever made it did not come to start it
    else:
        failure = ended(workload)
    if failure is None:
        if entry.started != workload.name:
            entry = replace(entry, started=workload.name, started_at=None, ready_since=None)
        return entry
    if entry.started != workload.name:
        return entry
    return note_failure(replace(entry, started=None), assessment, failure, now, jitter=jitter)


def _note_end_quietly(entry: InstanceMemory, assessment: Assessment) -> InstanceMemory:
    """Forget what ended, so that nobody counts it later; who started it again is no matter."""
    if assessment.running is None:
        return replace(entry, started=None, ready_since=None)
    match = assessment.match
    if assessment.runs and match is not None and entry.started != match.name:
        return replace(entry, started=match.name, started_at=None, ready_since=None)
    return entry


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


def note_failure(
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
    `early`: it failed before anything was stopped for it. That is tried again, with patience.

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
        and way_back(entry, assessment)
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


def never_ran(workload: ObservedWorkload) -> bool:
    """Whether it is at rest because its start was not come to: that is no failure of it."""
    if is_alive(workload) or workload.exit_code is not None:
        return False
    return workload.state is RunState.CREATED or workload.started_at is None


def ended(workload: ObservedWorkload) -> str:
    """How a workload ended, in words."""
    if workload.error:
        return workload.error
    if workload.exit_code is None:
        return "it ended"
    return f"it exited with {describe_exit(workload.exit_code)}"


_SIGNALS: Mapping[int, str] = {
    1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE",
    9: "SIGKILL", 11: "SIGSEGV", 13: "SIGPIPE", 15: "SIGTERM",
}  # fmt: skip


def describe_exit(code: int) -> str:
    """128 + N is how a shell, and Docker, report signal N."""
    name = _SIGNALS.get(code - 128 if code > 128 else -code if code < 0 else 0)
    return f"{code} ({name})" if name else str(code)
