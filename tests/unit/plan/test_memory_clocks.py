"""What the wall clock says, and was set to meanwhile, decides nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.model import ObservedState, ObservedWorkload
from mic_supervisor.plan import backoff, ledger
from mic_supervisor.plan.actions import Blocked, Plan
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.reconcile import reconcile
from mic_supervisor.plan.words import Code, because
from tests.unit.plan.builders import (
    CONTEXT,
    MAM,
    NOW,
    changed,
    desired,
    failing,
    knows,
    observed,
    plan_for,
    workload,
)

HOUR = 3600.0


def started(age: float, *, ahead: float = 0.0) -> ObservedWorkload:
    """A workload of MAM that was started `age` seconds ago, by a clock that was `ahead`."""
    return workload(MAM, started_at=NOW - age + ahead, running_since=NOW - age)


def hanging(item: ObservedWorkload) -> ObservedState:
    return observed(item, health={item.ref: failing("startup")})


@pytest.mark.parametrize("ahead", [HOUR, -HOUR, 365 * 86400.0])
def test_a_budget_is_spent_after_its_seconds_whatever_the_clock_was_when_it_began(
    ahead: float,
) -> None:
    young, old = started(299.0, ahead=ahead), started(300.0, ahead=ahead)
    assert plan_for([MAM], hanging(young)).empty
    (change,) = plan_for([MAM], hanging(old)).changes
    assert change.cause.startswith("not up within 300 s")


def test_a_fresh_start_is_no_failure_and_no_rollback_after_the_clock_was_set() -> None:
    new = changed(MAM, image="mam:2")
    runs = workload(new, started_at=NOW - HOUR, running_since=NOW - 1)
    memory = knows(MAM_aaaaaaaa=InstanceMemory(started=runs.name, started_at=NOW - 1, ready="then"))
    found = assess(desired(new), hanging(runs), CONTEXT)
    kept = ledger.observed(memory, found, NOW, jitter=0.0).of(new.id)
    assert (kept.failures, kept.failed, kept.retry_at) == (0, None, None)


@given(
    shift=st.floats(-1e9, 1e9),
    age=st.floats(0.0, 1000.0),
    wait=st.one_of(st.none(), st.floats(-400.0, 400.0)),
    failures=st.integers(0, 9),
    alive=st.booleans(),
)
def test_no_shift_of_the_wall_clock_changes_a_decision(
    shift: float, age: float, wait: float | None, failures: int, alive: bool
) -> None:
    def decided(ahead: float) -> tuple[Plan, Memory]:
        item = started(age, ahead=ahead)
        item = replace(item, created_at=(item.created_at or 0.0) + ahead)
        state = hanging(item) if alive else observed()
        state = replace(state, at=NOW + ahead)
        entry = InstanceMemory(
            failures=failures,
            reason="it ended",
            retry_at=None if wait is None else NOW + wait,
            started=item.name,
            started_at=NOW - age,
        )
        wanted = desired(MAM)
        found = assess(wanted, state, CONTEXT)
        kept = ledger.observed(knows(MAM_aaaaaaaa=entry), found, NOW, jitter=0.0)
        return reconcile(wanted, state, kept, NOW, CONTEXT, found), kept

    (plan, kept), (as_before, kept_before) = decided(shift), decided(0.0)
    assert kept == kept_before
    assert (plan.blocked, plan.next_wake) == (as_before.blocked, as_before.next_wake)
    assert [(one.kind, one.cause) for one in plan.changes] == [
        (one.kind, one.cause) for one in as_before.changes
    ]


# --- what is told, and what is kept --------------------------------------------------------------


def test_a_next_try_is_told_by_the_clock_as_it_is_set_now() -> None:
    waits = Blocked("a", because(Code.BACKOFF, failure="x"), until=50.0)
    plan = Plan(blocked=(waits, Blocked("b", because(Code.BACKOFF, failure="x"))))
    for offset in (1e9, 1e9 + HOUR):
        told = plan.in_wall(offset)
        assert [item.until for item in told.blocked] == [50.0 + offset, None]
        assert told.next_wake == 50.0 + offset


@given(failures=st.integers(0, 60), far=st.floats(-1e10, 1e10))
def test_a_wait_is_never_longer_than_it_was_whole(failures: int, far: float) -> None:
    kept = Memory({"a": InstanceMemory(failures=failures, retry_at=NOW + far)}).in_time(NOW)
    at = kept.of("a").retry_at
    assert at is not None
    farthest = backoff.LONGEST * (1.0 + backoff.JITTER)
    assert at - NOW <= backoff.delay(max(failures, 2), 1.0) <= farthest


def test_what_has_happened_is_in_the_past_and_after_a_reboot_nothing_is_ready() -> None:
    far = NOW + 1e9
    entry = InstanceMemory(started_at=far, ready_since=far, since=far)
    same = Memory({"a": entry}).in_time(NOW).of("a")
    assert (same.started_at, same.ready_since, same.since) == (NOW, NOW, NOW)
    assert Memory({"a": entry}).in_time(NOW, rebooted=True).of("a").ready_since is None
