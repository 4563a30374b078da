"""What is done and seen of an instance, and what of that is shown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor.errors import (
    LoadFailed,
    MicError,
    ReleaseFailed,
    RuntimeUnavailable,
    StopFailed,
)
from mic_supervisor.model import Health, ObservedWorkload, ProbeResult, RunState
from mic_supervisor.plan import backoff, ledger
from mic_supervisor.plan.actions import (
    Load,
    Release,
    Remove,
    Restart,
    Start,
    Step,
    Stop,
    Unload,
)
from mic_supervisor.plan.health import Activity, Phase
from mic_supervisor.plan.look import Look, look
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.status import converged
from tests.unit.plan.builders import (
    CONTEXT,
    NOW,
    assessment,
    changed,
    container,
    desired,
    failing,
    known,
    observed,
    on,
    passed,
    reread,
    text,
    workload,
)
from tests.unit.plan.test_bring_up_servers import BOTH, IT, A

MAM = on("MAM", 0, workload=container("mam:1"))
RUNS = workload(MAM)
NEW = changed(MAM, image="mam:2")
STOP = Stop(f"stop {RUNS.name}", MAM.id, RUNS, "SIGTERM", 30.0)
STUCK = StopFailed("cannot stop it: it is still there after KILL")


def after(step: Step, error: MicError, times: int = 1, item: object = NEW) -> Memory:
    memory = known(RUNS)
    for _ in range(times):
        found = assessment(NEW) if item is NEW else None
        memory = ledger.failed(memory, step, error, found, NOW, 0.0)
    return memory


def seen(memory: Memory, now: float = NOW) -> Look:
    return look(desired(NEW), observed(RUNS, health={RUNS.ref: passed()}), memory, now, CONTEXT)


@pytest.mark.parametrize(
    ("step", "error", "phase"),
    [
        (STOP, STUCK, Phase.STUCK_STOPPING),
        (
            Release("release it", MAM.id, MAM.gpus, ()),
            ReleaseFailed("after 30 s still 2 GiB"),
            Phase.BLOCKED,
        ),
        (STOP, RuntimeUnavailable("cannot stop it: no engine"), Phase.BACKOFF),
        (Remove("remove it", MAM.id, RUNS), MicError("cannot remove it: it runs"), Phase.BACKOFF),
    ],
)
def test_the_wait_after_what_no_specification_caused_is_shown(
    step: Step, error: MicError, phase: Phase
) -> None:
    found = seen(after(step, error))
    (change,) = found.plan.changes
    assert (str(change.waits), change.until) == (
        f"its next try, since the last one failed: {error.message}",
        NOW + 1,
    )
    assert f"failed: {error.message}; next try at " in text(found.plan)
    (row,) = found.statuses
    assert (row.phase, row.reason, row.next_retry) == (phase, error.message, NOW + 1)
    assert found.plan.next_wake == NOW + 1
    assert found.in_wall().plan.changes[0].until == NOW + 1 + found.offset


def test_it_is_doubled_to_a_minute_and_ends_with_its_time() -> None:
    waits = [seen(after(STOP, STUCK, times)).plan.changes[0].until for times in range(1, 9)]
    assert waits == [NOW + seconds for seconds in (1, 2, 4, 8, 16, 32, 60, 60)]
    assert seen(after(STOP, STUCK), NOW + 1).plan.changes[0].waits is None


def test_what_is_not_desired_any_more_rests_as_well() -> None:
    memory = after(STOP, STUCK, item=None)
    found = look(desired(), observed(RUNS), memory, NOW, replace(CONTEXT, confirmed=True))
    assert [change.until for change in found.plan.changes] == [NOW + 1]
    assert [(row.phase, row.next_retry) for row in found.statuses] == [
        (Phase.STUCK_STOPPING, NOW + 1)
    ]
    gone = look(desired(), observed(), found.memory, NOW, CONTEXT)
    assert gone.memory.instances == {}


def test_who_shares_the_lane_waits_too_and_an_apply_has_nothing_to_wait_for() -> None:
    other = on("OTHER", 0)
    memory = after(STOP, STUCK, item=None)
    wanted = desired(other)
    found = look(wanted, observed(RUNS), memory, NOW, replace(CONTEXT, confirmed=True))
    assert {change.instance for change in found.plan.changes if change.waits} == {MAM.id, other.id}
    assert converged(
        wanted,
        found.plan,
        found.statuses,
        found.memory,
        began=NOW,
        now=NOW,
    )


def test_a_rest_ends_with_a_change_that_is_done_a_word_or_a_restart_of_the_supervisor() -> None:
    memory = after(STOP, STUCK)
    (change,) = seen(memory).plan.changes
    assert memory.of(MAM.id).has_failed
    assert ledger.finished(memory, change).of(MAM.id).cooldown is None
    assert ledger.forgiven(memory, {MAM.id}).of(MAM.id).cooldown is None
    assert reread(memory) == memory  # a version that does not know it drops it
    assert memory.in_time(NOW).of(MAM.id).cooldown is None


def test_a_start_that_failed_and_came_to_its_end_all_the_same_leaves_no_rest() -> None:
    """An engine that hangs up goes on with what it was asked for."""
    step = Start("start it", MAM.id, None)  # type: ignore[arg-type]
    failed = after(step, RuntimeUnavailable("cannot start it: the engine hung up"))
    memory = failed.with_instance(MAM.id, replace(failed.of(MAM.id), started=None))
    state = observed(RUNS, health={RUNS.ref: passed()})
    found = look(desired(MAM), state, memory, NOW, CONTEXT)
    assert memory.of(MAM.id).cooldown is not None
    assert found.memory.of(MAM.id).cooldown is None
    (edited,) = look(desired(NEW), state, found.memory, NOW, CONTEXT).plan.changes
    assert edited.waits is None


def test_a_rest_that_nothing_was_tried_after_is_forgotten() -> None:
    memory = after(STOP, STUCK, 3)
    late = NOW + 4 + backoff.LONGEST_COOLDOWN
    assert seen(memory, late).memory.of(MAM.id).cooldown is not None
    assert seen(memory, late + 1).memory.of(MAM.id).cooldown is None


def test_its_count_outlasts_a_try_that_takes_longer_than_any_rest() -> None:
    memory = after(STOP, STUCK, 3)
    late = NOW + 600.0
    busy = replace(CONTEXT, busy=frozenset({MAM.id}))
    state = observed(RUNS, health={RUNS.ref: passed()})
    during = look(desired(NEW), state, memory, late, busy).memory
    again = ledger.failed(during, STOP, STUCK, assessment(NEW), late, 0.0)
    cooldown = again.of(MAM.id).cooldown
    assert cooldown is not None
    assert cooldown.until == late + 8


@pytest.mark.parametrize("activity", [Phase.PENDING, Phase.STOPPING, Phase.WAITING_VRAM])
@pytest.mark.parametrize(
    ("step", "error"),
    [
        (STOP, STUCK),
        (Release("it", MAM.id, MAM.gpus, ()), ReleaseFailed("after 30 s still 2 GiB")),
        (STOP, RuntimeUnavailable("cannot stop it: no engine")),
    ],
)
def test_a_try_that_has_come_no_further_shows_the_phase_and_reason_of_the_wait(
    step: Step, error: MicError, activity: Phase
) -> None:
    found = seen(after(step, error))
    (waits,) = found.statuses
    (tried,) = found.doing({MAM.id: Activity(activity, "waiting for 2 GiB")}).statuses
    assert (tried.phase, tried.reason, tried.next_retry) == (waits.phase, error.message, None)
    (starts,) = found.doing({MAM.id: Activity(Phase.STARTING)}).statuses
    assert (starts.phase, starts.reason) == (Phase.STARTING, None)


def test_what_the_specification_may_have_caused_has_one_wait() -> None:
    step = Start("start it", MAM.id, None)  # type: ignore[arg-type]
    entry = after(step, LoadFailed("cannot start it: no such device")).of(MAM.id)
    assert (entry.failures, entry.cooldown) == (1, None)
    assert entry.retry_at == NOW + 5


def test_a_model_of_a_shared_server_that_is_not_unloaded_is_no_hot_loop() -> None:
    for step, cooldowns in (
        (Load("it", BOTH.id, IT, A), False),
        (Unload("it", BOTH.id, IT, A), True),
    ):
        memory = ledger.failed(known(IT), step, LoadFailed("no"), assessment(BOTH, IT), NOW, 0.0)
        assert (memory.of(BOTH.id).cooldown is not None) is cooldowns


def test_what_was_not_known_before_is_adopted_in_the_plan_of_the_same_look() -> None:
    state = observed(RUNS, health={RUNS.ref: passed()})
    first = look(desired(MAM), state, Memory(), NOW, CONTEXT)
    assert [change.kind for change in first.plan.changes] == ["adopt"]
    assert look(desired(MAM), state, first.memory, NOW, CONTEXT).plan.changes == ()


@pytest.mark.parametrize(
    ("was", "restarts"),
    [
        (workload(MAM, RunState.EXITED, exit_code=137), 1),
        (workload(MAM, RunState.CREATED), 0),
        # As a keeper's record, and a unit, whose start was cut short.
        (
            workload(
                MAM, RunState.EXITED, exit_code=None, started_at=None, error="it was cut short"
            ),
            0,
        ),
    ],
)
def test_a_start_that_was_cut_short_is_no_restart(was: ObservedWorkload, restarts: int) -> None:
    memory = Memory().with_instance(MAM.id, InstanceMemory(phase="starting"))
    (change,) = look(desired(MAM), observed(was), memory, NOW, CONTEXT).plan.changes
    (step,) = (step for step in change.steps if isinstance(step, Restart))
    entry = ledger.done(memory, step, change, NOW, {}).of(MAM.id)
    assert (entry.restarts, entry.cold) == (restarts, True)


UNHEARD = ProbeResult(False, "refused", NOW, 1)


def waiting(entry: InstanceMemory, now: float = NOW, health: Health | None = None) -> Look:
    state = observed(RUNS, health={RUNS.ref: health or passed()})
    return look(desired(MAM), state, Memory().with_instance(MAM.id, entry), now, CONTEXT)


@pytest.mark.parametrize(
    "health",
    [Health(), Health(startup=UNHEARD), failing("liveness", 1), failing("startup", 1, None)],
)
def test_what_failed_and_waits_has_failed_for_a_supervisor_that_asks_it_for_the_first_time(
    health: Health,
) -> None:
    ready = waiting(InstanceMemory()).memory.of(MAM.id)
    entry = replace(ready, started=None, failures=2, reason="not up within 3 s: refused")
    entry = replace(entry, attempt=assessment(MAM, RUNS).hash, retry_at=NOW + 5)
    found = waiting(entry, health=health)
    (row,) = found.statuses
    assert (row.phase, row.next_retry) == (Phase.BACKOFF, NOW + 5)
    assert row.reason == "backoff: not up within 3 s: refused"
    assert found.memory.of(MAM.id).failures == 2  # it is counted once
    late = waiting(entry, NOW + 5, health)
    (change,) = late.plan.changes
    assert (change.kind, change.cause) == ("restart", "not up within 3 s: refused")

    (row,) = waiting(entry).statuses  # its probes pass by now
    assert row.phase is Phase.READY
    # A try that was cut short by the end of its supervisor is no failure.
    stop = next(step for step in change.steps if isinstance(step, Stop))
    begun = ledger.begun(late.memory, stop).of(MAM.id)
    (row,) = waiting(begun, NOW + 5, health).statuses
    assert row.phase is not Phase.BACKOFF
    assert waiting(begun, NOW + 5, health).plan.count == 0


# --- since when ---------------------------------------------------------------------------------


def told(memory: Memory, phase: Phase, at: float, **values: object) -> tuple[Memory, float | None]:
    (row,) = seen(memory).statuses
    memory, (shown,), _ = ledger.reported(memory, [replace(row, phase=phase)], at, **values)  # type: ignore[arg-type]
    return memory, shown.since


def test_since_is_when_it_went_down_whichever_phase_its_tries_are_in() -> None:
    memory = known(RUNS)
    memory, since = told(memory, Phase.READY, 100.0)
    assert since == 100.0
    memory = memory.with_instance(MAM.id, replace(memory.of(MAM.id), failures=1, reason="it ended"))
    for at, phase in enumerate(
        [Phase.BACKOFF, Phase.PENDING, Phase.STARTING, Phase.LOADING, Phase.BACKOFF, Phase.BLOCKED]
    ):
        memory, since = told(memory, phase, 200.0 + at)
        assert since == 200.0
    memory, since = told(memory, Phase.READY, 300.0)
    assert since == 300.0


def test_a_command_tells_since_when_it_is_down_although_it_remembers_nothing() -> None:
    entry = InstanceMemory(failures=1, reason="it ended", phase="backoff", since=200.0)
    memory = Memory().with_instance(MAM.id, entry)
    (row,) = look(desired(MAM), observed(), memory, NOW, CONTEXT).statuses
    assert (row.phase, row.since) == (Phase.PENDING, 200.0)
    memory = memory.with_instance(MAM.id, replace(entry, failures=0))
    (row,) = look(desired(MAM), observed(), memory, NOW, CONTEXT).statuses
    assert row.since is None


def test_since_of_one_that_does_not_fail_is_of_its_phase() -> None:
    memory, since = told(known(RUNS), Phase.STARTING, 100.0)
    memory, since = told(memory, Phase.LOADING, 110.0)
    assert since == 110.0


def test_a_supervisor_that_has_asked_nothing_yet_tells_no_new_phase() -> None:
    memory, _ = told(known(RUNS), Phase.READY, 100.0)
    again, since = told(reread(memory), Phase.STARTING, 500.0, unasked={MAM.id})
    assert (again, since) == (memory, 100.0)
    _, since = told(known(RUNS), Phase.STARTING, 500.0, unasked={MAM.id})
    assert since == 500.0
