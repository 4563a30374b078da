"""What runs when the memory is lost is adopted as it is, until somebody says to go on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings

from mic_supervisor.config.document import CONFIRM
from mic_supervisor.model import Health, Instance, ObservedState, ObservedWorkload, RunState
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import Stop
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.look import Look, look
from mic_supervisor.plan.memory import Memory
from tests.support.examples import examples
from tests.unit.plan.builders import (
    CONTEXT,
    FACE,
    MAM,
    NOW,
    changed,
    desired,
    failing,
    observed,
    on,
    reread,
    text,
    uuid,
    workload,
)
from tests.unit.plan.cases import Case, cases

OLD = changed(MAM, image="mam:0")
LOST = Memory(unexplained={})
WHY = "it stays as it is, since what was remembered of it is lost"


def seen(
    *instances: Instance, runs: Iterable[ObservedWorkload] = (), memory: Memory = LOST, **kw: object
) -> Look:
    state = observed(*runs, **kw)  # type: ignore[arg-type]
    return look(desired(*instances), state, memory, NOW, CONTEXT)


def kinds(found: Look) -> list[tuple[str, str]]:
    return [(change.kind, change.instance) for change in found.plan.changes]


def test_what_runs_otherwise_than_the_file_asks_stays_and_what_is_due_is_said() -> None:
    first = seen(MAM, runs=[workload(OLD)])
    expected = (
        f"! blocked  MAM-aaaaaaaa on GPU 0: {WHY}; "
        "would replace: its specification changed: image\n"
        f"    hint: {CONFIRM}\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    assert text(first.plan) == expected
    # A restart of the supervisor is no reason to go on.
    again = seen(MAM, runs=[workload(OLD)], memory=reread(first.memory))
    assert text(again.plan) == expected
    (row,) = again.statuses
    assert (row.phase.value, row.sync, row.code) == ("blocked", "out_of_sync", "unexplained")
    after = seen(MAM, runs=[workload(OLD)], memory=ledger.explained(again.memory))
    assert kinds(after) == [("replace", MAM.id)]


def test_what_runs_as_the_file_asks_is_adopted_and_follows_the_file_from_then_on() -> None:
    runs = workload(MAM)
    first = seen(MAM, runs=[runs])
    assert kinds(first) == [("adopt", MAM.id)]
    assert kinds(seen(changed(MAM, image="mam:2"), runs=[runs], memory=first.memory)) == [
        ("replace", MAM.id)
    ]


def test_what_the_file_has_another_model_for_stays_and_keeps_its_gpu() -> None:
    other = workload(on("other", 0))
    first = seen(MAM, on("MAM", 1), runs=[other])
    assert kinds(first) == [("create", "MAM-bbbbbbbb")]
    told = {item.instance: item.reason for item in first.plan.blocked}
    assert told["MAM-aaaaaaaa"] == f"GPU 0 is still held by other-aaaaaaaa, {WHY}"
    assert told["other-aaaaaaaa"].startswith(WHY)


def test_of_two_of_one_instance_neither_is_stopped() -> None:
    second = replace(workload(MAM), name="second", ref="second", created_at=1.0)
    first = seen(MAM, runs=[workload(MAM), second])
    assert first.plan.count == 0
    assert first.plan.blocked[0].reason.startswith(WHY)


@pytest.mark.parametrize("state", [RunState.EXITED, RunState.CREATED])
def test_what_is_down_is_started(state: RunState) -> None:
    assert kinds(seen(MAM, runs=[workload(MAM, state)])) == [("start", MAM.id)]
    assert kinds(seen(MAM, runs=[])) == [("create", MAM.id)]


def test_what_is_not_alive_by_its_probe_is_restarted() -> None:
    runs = workload(MAM)
    health: dict[str, Health] = {runs.ref: failing("liveness")}
    assert kinds(seen(MAM, runs=[runs], health=health)) == [("restart", MAM.id)]


def test_what_stays_is_held_until_it_ends_by_itself() -> None:
    held = seen(MAM, runs=[workload(OLD)])
    ended = seen(MAM, runs=[workload(OLD, RunState.EXITED)], memory=held.memory)
    assert kinds(ended) == [("create", MAM.id)]
    # Then it runs as the file asks, and follows it.
    back = seen(changed(MAM, image="mam:2"), runs=[workload(MAM)], memory=ended.memory)
    assert kinds(back) == [("replace", MAM.id)]


def test_what_could_not_be_read_at_first_is_adopted_when_it_can() -> None:
    old = workload(changed(FACE, command=("/opt/old",)))
    first = seen(MAM, FACE, runs=[workload(MAM), old], errors={"subprocess": "no answer"})
    assert [item.instance for item in first.plan.blocked] == [FACE.id]
    then = seen(MAM, FACE, runs=[workload(MAM), old], memory=reread(first.memory))
    assert then.plan.blocked[0].reason.startswith(WHY)
    # What changed in the file meanwhile is not of this.
    new = changed(MAM, image="mam:2")
    assert kinds(seen(new, FACE, runs=[workload(MAM), old], memory=then.memory)) == [
        ("replace", MAM.id)
    ]


def test_a_person_may_say_to_go_on_with_one_alone() -> None:
    runs = [workload(OLD), workload(changed(FACE, command=("/opt/old",)))]
    memory = ledger.explained(seen(MAM, FACE, runs=runs).memory, {FACE.id})
    found = seen(MAM, FACE, runs=runs, memory=memory)
    assert kinds(found) == [("replace", FACE.id)]
    assert [item.instance for item in found.plan.blocked] == [MAM.id]


def test_what_the_file_keeps_empty_stays_too() -> None:
    state: ObservedState = observed(workload(OLD))
    wanted = desired(kept_empty=(uuid(0),))
    first = look(wanted, state, LOST, NOW, CONTEXT)
    assert first.plan.count == 0
    assert first.plan.blocked[0].reason == f"{WHY}; would remove: the file keeps its GPU empty"


@settings(max_examples=examples(300))
@given(cases())
def test_after_a_loss_only_what_is_as_desired_is_stopped_to_be_started_again(case: Case) -> None:
    memory = replace(case.memory, instances={}, unexplained={})
    found = look(case.desired, case.observed, memory, NOW, case.context)
    matches = {
        item.match.ref
        for item in assess(case.desired, case.observed, case.context)
        if item.match is not None
    }
    stops = [s for change in found.plan.changes for s in change.steps if isinstance(s, Stop)]
    assert {step.workload.ref for step in stops} <= matches
