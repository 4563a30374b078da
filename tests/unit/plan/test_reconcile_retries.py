"""Whole plans after failures, in ill health, inside servers, and in their turn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor.model import (
    Health,
    LoadState,
    Probes,
    RunState,
)
from mic_supervisor.plan.memory import InstanceMemory
from tests.unit.plan.builders import (
    CONTEXT,
    FACE,
    MAM,
    NOW,
    assessment,
    changed,
    failing,
    gpu,
    knows,
    loaded,
    observed,
    on,
    passed,
    placement,
    plan_for,
    process,
    shortly,
    text,
    workload,
)

# --- failures, and patience -------------------------------------------------------------------


def failed_once(**values: object) -> InstanceMemory:
    """The memory of MAM whose second specification failed after the first had been ready."""
    good, new = workload(MAM), changed(MAM, image="mam:2")
    entry = InstanceMemory(
        failures=1,
        reason="it exited with 1",
        attempt=assessment(new).hash,
        failed=assessment(new).hash,
        failed_reason="it exited with 1",
        ready="then",
        ready_workload=good.name,
        retry_at=NOW,
    )
    return replace(entry, **values)  # type: ignore[arg-type]


def test_the_last_good_specification_takes_over_from_one_that_failed() -> None:
    new = changed(MAM, image="mam:2")
    good = workload(MAM, RunState.EXITED)
    bad = workload(new, RunState.EXITED, created_at=200.0)
    plan = plan_for([new], observed(good, bad), knows(MAM_aaaaaaaa=failed_once()))
    assert text(plan) == (
        "+ start    MAM-aaaaaaaa  GPU 0  rollback: it exited with 1\n"
        "\n"
        "! blocked  MAM-aaaaaaaa on GPU 0: "
        "the new specification failed (it exited with 1); the last good one runs\n"
        "    hint: change the file, or: mic-supervisor retry MAM-aaaaaaaa\n"
        "\n"
        "Plan: 1 to start; 1 blocked.\n"
    )
    assert shortly(plan, good=good, bad=bad) == [
        "release MAM-aaaaaaaa",
        "restart good <- release MAM-aaaaaaaa",
    ]


def test_a_failed_specification_that_still_runs_is_stopped_before_the_good_one_starts() -> None:
    new = changed(MAM, image="mam:2")
    good, bad = workload(MAM, RunState.EXITED), workload(new, created_at=200.0)
    plan = plan_for([new], observed(good, bad), knows(MAM_aaaaaaaa=failed_once()))
    assert shortly(plan, good=good, bad=bad) == [
        "stop bad",
        "release MAM-aaaaaaaa <- stop bad",
        "restart good <- release MAM-aaaaaaaa",
    ]


def test_while_the_last_good_one_runs_the_failed_one_is_not_tried() -> None:
    new = changed(MAM, image="mam:2")
    good, bad = workload(MAM), workload(new, RunState.EXITED, created_at=200.0)
    plan = plan_for([new], observed(good, bad), knows(MAM_aaaaaaaa=failed_once()), now=NOW + 1e6)
    assert text(plan) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: "
        "the new specification failed (it exited with 1); the last good one runs\n"
        "    hint: change the file, or: mic-supervisor retry MAM-aaaaaaaa\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_a_good_one_that_fails_in_its_turn_is_started_with_backoff() -> None:
    new = changed(MAM, image="mam:2")
    good = workload(MAM, RunState.EXITED, exit_code=139)
    entry = failed_once(failures=2, reason="it exited with 139 (SIGSEGV)", retry_at=NOW + 5)
    plan = plan_for([new], observed(good), knows(MAM_aaaaaaaa=entry))
    assert text(plan) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: the new specification failed (it exited with 1); "
        "the last good one failed as well; backoff: it exited with 139 (SIGSEGV); "
        "next try at 00:16:45\n"
        "    hint: change the file, or: mic-supervisor retry MAM-aaaaaaaa\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    assert plan.next_wake == NOW + 5
    assert plan_for([new], observed(good), knows(MAM_aaaaaaaa=entry), now=NOW + 5).count == 1


def test_a_rollback_does_not_start_beside_a_foreign_process() -> None:
    new, good = changed(MAM, image="mam:2"), workload(MAM, RunState.EXITED)
    held = [gpu(0, processes=(process(4121),))]
    plan = plan_for([new], observed(good, gpus=held), knows(MAM_aaaaaaaa=failed_once()))
    assert plan.count == 0
    assert [item.reason for item in plan.blocked] == [
        "the new specification failed (it exited with 1); the last good one cannot take over yet: "
        "GPU 0 is held by PID 4121 (python, 18.2 GiB), not ours"
    ]


def test_without_the_good_one_the_failed_one_is_tried_again() -> None:
    new = changed(MAM, image="mam:2")
    bad = workload(new, RunState.EXITED)
    plan = plan_for([new], observed(bad), knows(MAM_aaaaaaaa=failed_once()))
    assert shortly(plan, bad=bad)[-1] == "restart bad <- release MAM-aaaaaaaa"


def test_a_changed_file_is_tried_although_the_one_before_failed() -> None:
    third = changed(MAM, image="mam:3")
    good = workload(MAM)
    plan = plan_for([third], observed(good), knows(MAM_aaaaaaaa=failed_once()))
    assert [change.kind for change in plan.changes] == ["replace"]


def test_what_failed_on_one_gpu_is_not_tried_on_another() -> None:
    new, other = changed(MAM, image="mam:2"), changed(on("MAM", 1), image="mam:2")
    running = observed(workload(MAM), workload(on("MAM", 1)))
    plan = plan_for([new, other], running, knows(MAM_aaaaaaaa=failed_once()))
    assert text(plan) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: "
        "the new specification failed (it exited with 1); the last good one runs\n"
        "    hint: change the file, or: mic-supervisor retry MAM-aaaaaaaa\n"
        "! blocked  MAM-bbbbbbbb on GPU 1: "
        "the new specification failed on MAM-aaaaaaaa; the earlier one runs\n"
        "    hint: change the file, or: mic-supervisor retry MAM-aaaaaaaa\n"
        "\n"
        "No changes; 2 blocked.\n"
    )


def test_rollback_can_be_turned_off() -> None:
    new = replace(changed(MAM, image="mam:2"), rollback=False)
    good, bad = workload(MAM, RunState.EXITED), workload(new, RunState.EXITED, created_at=200.0)
    plan = plan_for([new], observed(good, bad), knows(MAM_aaaaaaaa=failed_once()))
    assert shortly(plan, bad=bad) == [
        "release MAM-aaaaaaaa",
        "restart bad <- release MAM-aaaaaaaa",
    ]


def test_backoff_says_why_and_until_when() -> None:
    was = workload(MAM, RunState.EXITED)
    entry = InstanceMemory(failures=3, reason="it exited with 1", retry_at=NOW + 10)
    memory = knows(MAM_aaaaaaaa=entry, MAM_bbbbbbbb=replace(entry, retry_at=NOW + 7))
    other = workload(on("MAM", 1), RunState.EXITED)
    plan = plan_for([MAM, on("MAM", 1)], observed(was, other), memory)
    assert text(plan) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: backoff: it exited with 1; next try at 00:16:50\n"
        "! blocked  MAM-bbbbbbbb on GPU 1: backoff: it exited with 1; next try at 00:16:47\n"
        "\n"
        "No changes; 2 blocked.\n"
    )
    assert plan.next_wake == NOW + 7
    later = plan_for([MAM, on("MAM", 1)], observed(was, other), memory, now=NOW + 7)
    assert [change.instance for change in later.changes] == ["MAM-bbbbbbbb"]
    assert later.next_wake == NOW + 10


def test_a_start_that_is_asked_for_does_not_wait_for_the_backoff() -> None:
    was = workload(MAM, RunState.EXITED)
    memory = knows(MAM_aaaaaaaa=InstanceMemory(failures=3, reason="x", retry_at=NOW + 10))
    forced = replace(CONTEXT, forced=frozenset({MAM.id}))
    assert plan_for([MAM], observed(was), memory, context=forced).count == 1


def test_one_that_is_not_alive_is_restarted_in_place() -> None:
    runs = workload(MAM)
    plan = plan_for([MAM], observed(runs, health={runs.ref: failing("liveness")}))
    assert text(plan) == (
        "~ restart  MAM-aaaaaaaa  GPU 0  not alive: GET /health answers 503\n"
        "\n"
        "Plan: 1 to restart.\n"
    )
    assert shortly(plan, it=runs) == [
        "stop it",
        "release MAM-aaaaaaaa <- stop it",
        "restart it <- release MAM-aaaaaaaa",
    ]


def test_a_process_that_is_not_alive_is_stopped_and_started_anew() -> None:
    runs = workload(FACE)
    plan = plan_for([FACE], observed(runs, health={runs.ref: failing("liveness")}))
    assert shortly(plan) == [
        "prepare face-cccccccc",
        "stop face-cccccccc <- prepare face-cccccccc",
        "release face-cccccccc <- stop face-cccccccc, prepare face-cccccccc",
        "start face-cccccccc <- release face-cccccccc",
    ]


@pytest.mark.parametrize(
    "health",
    [
        failing("liveness", failures=2),
        failing("liveness", failures=9, ok=None),
        failing("readiness", failures=99),
        failing("startup", failures=2),
        failing("startup", failures=9, ok=None),
        Health(),
    ],
    ids=["not yet", "prober's fault", "readiness only reports", "starting", "unknown", "unasked"],
)
def test_what_is_no_reason_to_restart(health: Health) -> None:
    # Each of these was started long before now: a new supervisor finds it so.
    runs = workload(MAM)
    assert plan_for([MAM], observed(runs, health={runs.ref: health})).empty


def test_one_that_does_not_get_up_in_its_time_is_restarted() -> None:
    runs = workload(MAM)
    state = observed(runs, health={runs.ref: failing("startup")})
    assert text(plan_for([MAM], state)) == (
        "~ restart  MAM-aaaaaaaa  GPU 0  not up within 300 s: GET /health answers 503\n"
        "\n"
        "Plan: 1 to restart.\n"
    )
    assert plan_for([MAM], state, now=100.0 + 299.9).empty


def test_the_time_to_get_up_counts_from_our_start_where_the_runtime_does_not_say() -> None:
    runs = workload(MAM, started_at=None)
    state = observed(runs, health={runs.ref: failing("startup")})
    memory = knows(MAM_aaaaaaaa=InstanceMemory(started=runs.name, started_at=500.0))
    assert plan_for([MAM], state, memory, now=799.0).empty
    assert plan_for([MAM], state, memory, now=800.0).count == 1
    adopted = knows(MAM_aaaaaaaa=InstanceMemory(started=runs.name))
    assert plan_for([MAM], state, adopted, now=1e9).empty


def test_an_unhealthy_one_waits_for_its_backoff_while_it_runs() -> None:
    runs = workload(MAM)
    state = observed(runs, health={runs.ref: failing("liveness")})
    entry = InstanceMemory(started=None, failures=2, reason="not alive: x", retry_at=NOW + 5)
    plan = plan_for([MAM], state, knows(MAM_aaaaaaaa=entry))
    assert plan.count == 0
    assert plan.blocked[0].until == NOW + 5


def test_a_restart_that_is_asked_for() -> None:
    runs = workload(MAM)
    plan = plan_for([MAM], observed(runs), context=replace(CONTEXT, forced=frozenset({MAM.id})))
    assert text(plan) == ("~ restart  MAM-aaaaaaaa  GPU 0  asked for\n\nPlan: 1 to restart.\n")


# --- models inside a server -------------------------------------------------------------------

SERVER = on("MAM", 0, backend="server", placements=(placement("MAM", 0, 8),))


def load_plan(state: object, memory: object = None) -> str:
    runs = workload(SERVER)
    health = {runs.ref: passed(state)}  # type: ignore[arg-type]
    return text(plan_for([SERVER], observed(runs, health=health), memory))  # type: ignore[arg-type]


def test_a_model_that_the_server_does_not_have_is_loaded() -> None:
    assert load_plan(loaded("MAM", state=LoadState.ABSENT, digest=None, summary=())) == (
        "~ load     MAM-aaaaaaaa  GPU 0  the server does not have MAM loaded\n"
        '    instances_per_gpu: null -> "8"\n'
        "\n"
        "Plan: 1 to load.\n"
    )


def test_a_changed_number_of_instances_is_loaded_in_place() -> None:
    assert load_plan(loaded("MAM", 4)) == (
        "~ load     MAM-aaaaaaaa  GPU 0  instances_per_gpu changed\n"
        '    instances_per_gpu: "4" -> "8"\n'
        "\n"
        "Plan: 1 to load.\n"
    )


def test_a_change_that_has_no_name_is_loaded_too() -> None:
    assert "GPU 0  its configuration changed\n" in load_plan(loaded("MAM", digest="other"))


def test_a_load_that_failed_is_made_again() -> None:
    assert "1 to load" in load_plan(loaded("MAM", state=LoadState.FAILED, reason="no such file"))


@pytest.mark.parametrize(
    "state",
    [
        loaded("MAM"),
        loaded("MAM", 4, state=LoadState.LOADING),
        loaded("MAM", 4, state=LoadState.UNKNOWN),
        loaded("MAM", digest=None),
        loaded("other", 4),
    ],
    ids=["as desired", "loading", "unknown", "configuration unknown", "not asked yet"],
)
def test_nothing_is_loaded(state: object) -> None:
    assert load_plan(state) == "No changes.\n"


def test_a_load_is_patient() -> None:
    runs = workload(SERVER)
    entry = InstanceMemory(started=runs.name, failures=2, reason="out of memory", retry_at=NOW + 5)
    assert load_plan(loaded("MAM", 4), knows(MAM_aaaaaaaa=entry)) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: backoff: out of memory; next try at 00:16:45\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_nothing_is_loaded_into_a_server_that_is_not_up() -> None:
    runs = workload(SERVER)
    absent = loaded("MAM", state=LoadState.ABSENT)
    health = {runs.ref: failing("startup", failures=1, placements=(absent,))}
    assert plan_for([SERVER], observed(runs, health=health)).empty


# --- rollouts ---------------------------------------------------------------------------------

TRIO = [on("MAM", index) for index in range(3)]
NEXT = [changed(item, image="mam:2") for item in TRIO]


def turns(plan: object) -> list[str]:
    return [
        f"{item.kind} {item.instance}" + (" later" if item.waits else "")
        for item in plan.changes  # type: ignore[attr-defined]
    ]


def test_of_one_model_one_instance_changes_at_a_time() -> None:
    plan = plan_for(NEXT, observed(*(workload(item) for item in TRIO)))
    assert text(plan) == (
        "~ replace  MAM-aaaaaaaa  GPU 0  its specification changed: image\n"
        '    image: "mam:1" -> "mam:2"\n'
        "~ replace  MAM-bbbbbbbb  GPU 1  its specification changed: image\n"
        '    image: "mam:1" -> "mam:2"\n'
        "    waits for its turn: 1 instance of MAM at a time\n"
        "~ replace  MAM-cccccccc  GPU 2  its specification changed: image\n"
        '    image: "mam:1" -> "mam:2"\n'
        "    waits for its turn: 1 instance of MAM at a time\n"
        "\n"
        "Plan: 3 to replace.\n"
    )


def test_the_next_one_waits_until_the_one_before_is_ready() -> None:
    old = [workload(item) for item in TRIO]
    new = workload(NEXT[0], created_at=200.0)
    gone = replace(old[0], state=RunState.EXITED)
    starting = observed(new, gone, *old[1:], health={new.ref: failing("startup", failures=1)})
    assert turns(plan_for(NEXT, starting)) == [
        "replace MAM-bbbbbbbb later",
        "replace MAM-cccccccc later",
    ]
    ready = observed(new, gone, *old[1:])
    assert turns(plan_for(NEXT, ready)) == ["replace MAM-bbbbbbbb", "replace MAM-cccccccc later"]


def test_as_many_as_the_file_allows() -> None:
    wide = [replace(item, max_unavailable=2) for item in NEXT]
    plan = plan_for(wide, observed(*(workload(item) for item in TRIO)))
    assert turns(plan) == [
        "replace MAM-aaaaaaaa",
        "replace MAM-bbbbbbbb",
        "replace MAM-cccccccc later",
    ]
    assert str(plan.changes[2].waits) == "its turn: 2 instances of MAM at a time"


def test_what_is_down_does_not_wait_and_comes_before_those_that_serve() -> None:
    plan = plan_for(NEXT, observed(workload(TRIO[0]), workload(TRIO[1])))
    assert turns(plan) == [
        "replace MAM-aaaaaaaa later",
        "replace MAM-bbbbbbbb later",
        "create MAM-cccccccc",
    ]


def test_what_a_foreign_process_keeps_down_does_not_hold_up_the_others() -> None:
    held = [gpu(0), gpu(1), gpu(2, processes=(process(4121),))]
    plan = plan_for(NEXT, observed(workload(TRIO[0]), workload(TRIO[1]), gpus=held))
    assert turns(plan) == ["replace MAM-aaaaaaaa", "replace MAM-bbbbbbbb later"]


def test_what_fails_with_the_new_specification_holds_up_those_that_still_serve() -> None:
    bad = workload(NEXT[2], RunState.EXITED)
    memory = knows(MAM_cccccccc=InstanceMemory(failures=3, reason="x", retry_at=NOW + 60))
    plan = plan_for(NEXT, observed(workload(TRIO[0]), workload(TRIO[1]), bad), memory)
    assert turns(plan) == ["replace MAM-aaaaaaaa later", "replace MAM-bbbbbbbb later"]


def test_what_is_being_changed_counts_and_does_not_wait_for_itself() -> None:
    busy = replace(CONTEXT, busy=frozenset({"MAM-bbbbbbbb"}))
    plan = plan_for(NEXT, observed(*(workload(item) for item in TRIO)), context=busy)
    assert turns(plan) == [
        "replace MAM-aaaaaaaa later",
        "replace MAM-bbbbbbbb",
        "replace MAM-cccccccc later",
    ]


def test_another_model_has_its_own_turns() -> None:
    other = on("face", 3)
    plan = plan_for(
        [*NEXT[:2], changed(other, image="face:2")],
        observed(workload(TRIO[0]), workload(TRIO[1]), workload(other)),
    )
    assert turns(plan) == [
        "replace MAM-aaaaaaaa",
        "replace MAM-bbbbbbbb later",
        "replace face-dddddddd",
    ]


def test_restarts_that_are_asked_for_take_turns_and_those_of_the_unhealthy_do_not() -> None:
    found = [workload(item) for item in TRIO]
    forced = replace(CONTEXT, forced=frozenset(item.id for item in TRIO))
    assert turns(plan_for(TRIO, observed(*found), context=forced)) == [
        "restart MAM-aaaaaaaa",
        "restart MAM-bbbbbbbb later",
        "restart MAM-cccccccc later",
    ]
    sick = {item.ref: failing("liveness") for item in found[:2]}
    assert turns(plan_for(TRIO, observed(*found, health=sick))) == [
        "restart MAM-aaaaaaaa",
        "restart MAM-bbbbbbbb",
    ]


def test_an_unprobed_instance_that_runs_counts_as_serving() -> None:
    blind = [replace(item, probes=Probes()) for item in TRIO]
    plan = plan_for(
        [replace(item, probes=Probes()) for item in NEXT[:2]] + [blind[2]],
        observed(*(workload(item) for item in blind), health={}),
    )
    assert turns(plan) == ["replace MAM-aaaaaaaa", "replace MAM-bbbbbbbb later"]


def test_what_follows_on_the_gpu_of_one_that_waits_waits_as_well() -> None:
    # The group moves from 3,4 to 3,5 in its turn; what is to have GPU 4 cannot come before that.
    single, group = on("qwen", 0), on("qwen", 3, 4)
    wanted = [changed(single, image="mam:2"), on("qwen", 3, 5), on("face", 4)]
    plan = plan_for(wanted, observed(workload(single), workload(group)))
    assert turns(plan) == [
        "replace qwen-aaaaaaaa",
        "create face-eeeeeeee later",
        "replace qwen-ddddddddx2 later",
    ]
    assert str(plan.changes[1].waits) == "qwen-ddddddddx2, whose turn comes later"
