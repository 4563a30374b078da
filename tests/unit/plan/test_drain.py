"""A host that is out of service: everything stops, and nothing starts."""

from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import given

from mic_supervisor.model import Doubt, Hook, HttpCall, ObservedWorkload, RunState
from mic_supervisor.plan.actions import Start, Stop
from mic_supervisor.plan.assess import is_alive
from mic_supervisor.plan.memory import Drained, Memory, Pause, Paused
from tests.unit.plan.builders import (
    CONTEXT,
    changed,
    desired,
    known,
    observed,
    on,
    plan_for,
    process,
    shortly,
    text,
    trouble,
    workload,
)
from tests.unit.plan.builders import gpu as a_gpu
from tests.unit.plan.cases import Case, cases

MAM, FACE = on("MAM", 0), on("face", 2)


def drained(*found: ObservedWorkload, reason: str | None = None) -> Memory:
    return replace(known(*found), drained=Drained(600.0, reason))


def clocks(shown: str) -> str:
    return re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", shown)


def test_what_runs_stops_and_what_does_not_is_not_started() -> None:
    old = workload(MAM)
    plan = plan_for([MAM, FACE], observed(old), drained(old, reason="a new riser"))
    assert clocks(text(plan)) == (
        "- stop     MAM-aaaaaaaa  GPU 0  the host is drained since HH:MM:SS (a new riser)\n"
        f"    stops {old.name}\n"
        "\n"
        "! drained  face-cccccccc on GPU 2: the host is drained since HH:MM:SS (a new riser)\n"
        "    hint: mic-supervisor undrain\n"
        "\n"
        "warning: the host is drained since HH:MM:SS (a new riser); "
        "to end that: mic-supervisor undrain\n"
        "\n"
        "Plan: 1 to stop; 1 drained.\n"
    )
    assert shortly(plan, old=old) == ["stop old"]


def test_it_is_withdrawn_and_drained_first() -> None:
    one = replace(MAM, drain=HttpCall("GET", "/idle"), drain_timeout=30.0)
    old = workload(one)
    wanted = desired(one, hook=Hook(("/bin/true",)))
    assert shortly(plan_for(wanted, observed(old), drained(old)), old=old) == [
        "withdraw old",
        "drain old <- withdraw old",
        "stop old <- drain old",
    ]


def test_what_the_file_does_not_name_stops_too_and_nothing_is_removed() -> None:
    """Also where that is not confirmed, and where an entry that cannot be followed may mean it."""
    undesired, ended = workload(FACE), workload(on("old", 4), RunState.EXITED)
    state = observed(undesired, ended)
    wanted = desired(unsatisfiable=(trouble("GPU 2", "no such GPU", 2),))
    for asked in (desired(), wanted):
        plan = plan_for(asked, state, drained(undesired), context=replace(CONTEXT, confirmed=False))
        assert shortly(plan, old=undesired) == ["stop old"]


def test_another_specification_stops_and_nothing_takes_its_place() -> None:
    old = workload(MAM)
    plan = plan_for([changed(MAM)], observed(old), drained(old))
    assert shortly(plan, old=old) == ["stop old"]


def test_what_is_held_otherwise_is_left_as_it_is() -> None:
    mam, face, third = workload(MAM), workload(FACE), workload(on("x", 4))
    face = replace(face, doubt=Doubt("its record is damaged", "look at it"))
    memory = replace(drained(mam, face, third), paused=Paused(models={"MAM": Pause(600.0)}))
    plan = plan_for([MAM, FACE, on("x", 4)], observed(mam, face, third), memory)
    assert shortly(plan, third=third) == ["stop third"]
    assert {one.instance: one.why.code for one in plan.blocked} == {
        "MAM-aaaaaaaa": "paused",
        "face-cccccccc": "in_doubt",
    }
    unread = plan_for([MAM], observed(mam, errors={"docker": "no answer"}), drained(mam))
    assert unread.changes == () and unread.blocked[0].why.code == "runtime_unreadable"


def test_down_removes_what_has_stopped() -> None:
    old = workload(MAM, RunState.EXITED)
    plan = plan_for(desired(down=True), observed(old), drained(old))
    assert shortly(plan, old=old) == ["remove old"]


def test_it_ends_and_everything_starts_again() -> None:
    old = workload(MAM, RunState.EXITED)
    plan = plan_for([MAM], observed(old), replace(known(), drained=None))
    assert [one.kind for one in plan.changes] == ["start"]


def test_a_foreign_process_is_in_nobodys_way() -> None:
    old = workload(MAM)
    state = observed(old, gpus=[a_gpu(0, processes=(process(4121),))])
    assert shortly(plan_for([MAM], state, drained(old)), old=old) == ["stop old"]


@given(cases())
def test_whatever_is_there_nothing_starts_and_all_that_can_be_told_stops(case: Case) -> None:
    memory = replace(case.memory, drained=Drained(600.0), unexplained=None, paused=Paused())
    context = replace(case.context, targets=None, busy=frozenset())
    state = case.observed
    plan = plan_for(case.desired, state, memory, context=context)
    steps = [step for change in plan.changes for step in change.steps]
    assert not [step for step in steps if isinstance(step, Start)]
    assert {change.kind for change in plan.changes} <= {"stop"}
    if state.inventory.error is None and not any(view.error for view in state.runtimes):
        stopped = {step.workload.name for step in steps if isinstance(step, Stop)}
        alive = [one for view in state.runtimes for one in view.workloads if is_alive(one)]
        assert {one.name for one in alive if one.doubt is None} <= stopped
