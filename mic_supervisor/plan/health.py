"""Where an instance is on its way.

| phase | it is in it while | it leaves it by |
|---|---|---|
| pending | a change is due, and its steps are about to begin | the first step |
| stopping | a former workload is withdrawn, drained or stopped | its end |
| waiting_vram | a former workload's memory, or a foreign process, has the GPU | the release |
| starting | its startup probe does not pass yet, or it is not warmed up | both, its end, time |
| loading | its server is up, and a model is missing in it | the server's word |
| ready | everything that can be asked says that it is as the file wants it | a probe, its end |
| unprobed | it runs, and nothing can be asked | its end |
| degraded | something of it says no, or an earlier specification took over | a probe, a change |
| backoff | its last try failed, and the next one is later (plan/backoff.py) | the time, `retry` |
| blocked | something stands in the way that time alone does not fix | that thing |
| paused | somebody asked for it to be left as it is | `resume` |
| drained | it does not run: somebody took the host out of service | `undrain` |
| stuck_stopping | a workload outlived its KILL, and the next try is later | its end |
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from mic_supervisor.model import LoadState, ObservedWorkload, RunState
from mic_supervisor.plan.actions import (
    Drain,
    Load,
    Release,
    Restart,
    Start,
    Step,
    Stop,
    Unload,
    Withdraw,
)
from mic_supervisor.plan.assess import Assessment, is_alive
from mic_supervisor.plan.memory import InstanceMemory


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
    DRAINED = "drained"
    STUCK_STOPPING = "stuck_stopping"


class Activity(NamedTuple):
    """What is being carried out for an instance, and what that waits for, where that is known."""

    phase: Phase
    reason: str | None = None


ON_ITS_WAY = frozenset(
    {Phase.PENDING, Phase.STOPPING, Phase.WAITING_VRAM, Phase.STARTING, Phase.LOADING}
)


# It is down, or about to be, and nobody asked for that.
_AS_ASKED = frozenset({Phase.READY, Phase.UNPROBED, Phase.PAUSED, Phase.DRAINED})
DOWN = frozenset({*Phase} - _AS_ASKED - {Phase.DEGRADED})


def since_of(entry: InstanceMemory, phase: Phase) -> float | None:
    """Since when an instance is in a phase, as far as is remembered: steady.

    A try that fails has not brought it up: it is down since it went down.
    """
    stays_down = entry.has_failed and {entry.phase, phase} <= DOWN
    return entry.since if stays_down or entry.phase == phase else None


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
                return Phase.LOADING, f"{placement.called} runs with another configuration"
            return Phase.LOADING, state.reason or f"{placement.called} is {state.state.value}"
    if not assessment.warmed_up:
        result = assessment.health.warm_up
        return Phase.STARTING, result.reason if result is not None else "not warmed up yet"
    if assessment.unprobed:
        return Phase.UNPROBED, "it has no probe: nothing can say whether it is healthy"
    if assessment.ready:
        return Phase.READY, None
    for result in (assessment.health.liveness, assessment.health.readiness):
        if result is not None and result.ok is not True:
            unknown = "health unknown: " if result.ok is None else ""
            return Phase.DEGRADED, f"{unknown}{result.reason}"
    return Phase.STARTING, "not probed yet"


def never_ran(workload: ObservedWorkload) -> bool:
    """Whether it is inactive because its start was not come to: that is no failure of it."""
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


def phase_of_step(step: Step) -> Phase:
    """Where an instance is while a step is carried out for it."""
    match step:
        case Withdraw() | Drain() | Stop():
            return Phase.STOPPING
        case Release():
            return Phase.WAITING_VRAM
        case Start() | Restart():
            return Phase.STARTING
        case Load() | Unload():
            return Phase.LOADING
    return Phase.PENDING
