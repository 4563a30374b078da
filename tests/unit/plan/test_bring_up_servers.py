"""Whole plans for a server that has several models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mic_supervisor.errors import LoadFailed
from mic_supervisor.model import (
    Health,
    HttpCall,
    Instance,
    LoadState,
    ObservedState,
    ObservedWorkload,
    Placement,
    PlacementState,
    RunState,
)
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import Load, Plan
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.health import Activity, Phase
from mic_supervisor.plan.look import look
from mic_supervisor.plan.memory import Memory, memory_key
from mic_supervisor.plan.status import by_model, converged, instance_statuses
from tests.unit.plan.builders import (
    CONTEXT,
    NOW,
    PROBED,
    assessment,
    desired,
    gpu,
    known,
    loaded,
    observed,
    on,
    passed,
    placement,
    plan_for,
    process,
    reread,
    shortly,
    text,
    uuid,
    workload,
)

ID = "server-shared"


def server(*placements: Placement, gpus: tuple[int, ...] = (0, 1, 2), **values: Any) -> Instance:
    return on(
        ID,
        *gpus,
        id=ID,
        backend="server",
        probes=replace(PROBED, readiness=None),
        placements=placements,
        shared=True,
        inventory=HttpCall("POST", "/index"),
        **values,
    )


A, B = placement("A", 0), placement("B", 1)
BOTH = server(A, B)
IT = workload(BOTH)


def says(*states: PlacementState, surplus: tuple[Placement, ...] = ()) -> Health:
    return replace(passed(*states), surplus=surplus)


def runs(health: Health, it: ObservedWorkload = IT, **values: Any) -> ObservedState:
    return observed(it, health={it.ref: health}, **values)


def test_models_are_loaded_each_for_itself() -> None:
    plan = plan_for([BOTH], runs(says(loaded("A", state=LoadState.ABSENT), loaded("B", 4))))
    assert text(plan) == (
        "~ load     server-shared  GPU 0  A: the server does not have A loaded\n"
        "~ load     server-shared  GPU 1  B: instances_per_gpu changed\n"
        '    instances_per_gpu: "4" -> "8"\n'
        "\n"
        "Plan: 2 to load.\n"
    )
    assert [(change.model, change.gpus) for change in plan.changes] == [
        ("A", (uuid(0),)),
        ("B", (uuid(1),)),
    ]
    assert plan_for([BOTH], runs(says(loaded("A"), loaded("B")))).empty


def test_what_the_file_no_longer_has_is_unloaded_once_that_is_confirmed() -> None:
    one = server(A)
    state = runs(says(loaded("A"), surplus=(B,)), workload(one))
    assert text(plan_for([one], state)) == (
        "- unload   server-shared  GPU 1  the file no longer has B in this server\n"
        "\n"
        "Plan: 1 to unload.\n"
    )
    watching = replace(CONTEXT, confirmed=False)
    assert text(plan_for([one], state, context=watching)) == (
        "! blocked  server-shared on GPU 0,1,2: the file no longer names B; its removal waits to "
        "be confirmed\n"
        "    hint: confirm with `mic-supervisor apply` or `mic-supervisor reload`\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    emptied = desired(one, kept_empty=(uuid(1),))
    assert plan_for(emptied, state, context=watching).count == 1  # `none` acts at once
    off = desired(one, aside=((uuid(1), "B"),))  # and so does a profile that was put off
    assert [change.kind for change in plan_for(off, state, context=watching).changes] == ["unload"]
    other = desired(one, aside=((uuid(1), "C"),))
    assert plan_for(other, state, context=watching).changes == ()


def test_a_server_whose_entry_is_missing_is_replaced_once_that_is_confirmed() -> None:
    both = server(A, B, gpus=(0, 1))
    it = workload(both)
    state = observed(it, health={it.ref: says(loaded("A"), loaded("B"))})
    smaller = server(A, gpus=(0,))
    watching = replace(CONTEXT, confirmed=False)
    assert text(plan_for([smaller], state, context=watching)) == (
        "! blocked  server-shared on GPU 0: the file no longer names GPU 1 of it; its replacement "
        "waits to be confirmed\n"
        "    hint: confirm with `mic-supervisor apply` or `mic-supervisor reload`\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    assert plan_for([smaller], state).changes[0].kind == "replace"
    # `none`, another model there and a profile that was put off act at once.
    off = desired(smaller, aside=((uuid(1), ID),))
    assert plan_for(off, state, context=watching).changes[0].kind == "replace"
    emptied = desired(smaller, kept_empty=(uuid(1),))
    assert plan_for(emptied, state, context=watching).changes[0].kind == "replace"
    other = plan_for([smaller, on("other", 1)], state, context=watching)
    assert {change.kind for change in other.changes} == {"replace", "create"}


def test_another_set_of_gpus_replaces_the_server_and_names_what_goes_down() -> None:
    plan = plan_for([server(A, B, gpus=(0, 1))], runs(says(loaded("A"), loaded("B"))))
    assert text(plan).splitlines()[0] == (
        "~ replace  server-shared  GPU 0,1  its set of GPUs changed; A and B go down with it"
    )
    assert shortly(plan, it=IT) == [
        "prepare server-shared",
        "create server-shared <- prepare server-shared",
        "stop it <- create server-shared",
        "release server-shared <- stop it, create server-shared",
        "start server-shared <- release server-shared",
    ]


# --- a model that does not load ---------------------------------------------------------------


def failed(model: Placement, count: int = 1) -> Memory:
    memory = known(IT)
    error = LoadFailed("cannot load A: told to fail")
    for _ in range(count):
        step = Load("load", ID, IT, model)
        memory = ledger.failed(memory, step, error, assessment(BOTH, IT), NOW, 0.0)
    return memory


def test_one_that_does_not_load_waits_alone() -> None:
    state = runs(says(loaded("A", state=LoadState.ABSENT), loaded("B", 4)))
    plan = plan_for([BOTH], state, failed(A))
    assert [(change.kind, change.model) for change in plan.changes] == [("load", "B")]
    (item,) = plan.blocked
    assert item.reason == "A: backoff: cannot load A: told to fail"
    assert item.until == NOW + 5
    later = plan_for([BOTH], state, failed(A), now=NOW + 6)
    assert [change.model for change in later.changes] == ["A", "B"]


def test_a_model_that_is_to_be_restarted_is_unloaded_and_then_loaded_again() -> None:
    forced = replace(CONTEXT, forced=frozenset({memory_key(ID, "A")}))
    plan = plan_for([BOTH], runs(says(loaded("A"), loaded("B"))), context=forced)
    assert text(plan) == ("- unload   server-shared  GPU 0  asked for\n\nPlan: 1 to unload.\n")
    absent = loaded("A", state=LoadState.ABSENT)
    plan = plan_for([BOTH], runs(says(absent, loaded("B"))), context=forced)
    assert [(change.kind, change.model) for change in plan.changes] == [("load", "A")]
    assert plan_for([BOTH], runs(Health()), context=forced).count == 0  # nothing answers yet


def status(state: ObservedState, memory: Memory, wanted: Instance = BOTH) -> Any:
    plan = plan_for([wanted], state, memory)
    assessments = assess(desired(wanted), state, CONTEXT)
    return plan, instance_statuses(desired(wanted), state, assessments, plan, memory, {})


def test_the_others_serve_and_the_server_is_degraded() -> None:
    state = runs(says(loaded("A", state=LoadState.ABSENT), loaded("B")))
    plan, (row,) = status(state, failed(A))
    assert (row.phase, row.health, row.sync) == (Phase.DEGRADED, "degraded", "out_of_sync")
    assert row.reason == "A: backoff: cannot load A: told to fail"
    assert [(one.model, one.gpus, one.phase, one.as_desired) for one in by_model(row)] == [
        ("A", (uuid(0),), Phase.BACKOFF, False),
        ("B", (uuid(1),), Phase.READY, True),
    ]
    assert converged(desired(BOTH), plan, [row], Memory(), began=NOW, now=NOW + 1)


def test_that_a_model_is_tried_again_changes_nothing_for_the_server() -> None:
    state = runs(says(loaded("A", state=LoadState.ABSENT), loaded("B")))
    first = look(desired(BOTH), state, failed(A), NOW, CONTEXT)
    (waits,) = first.statuses
    late = look(desired(BOTH), state, failed(A), NOW + 60, CONTEXT)
    assert [change.kind for change in late.plan.changes] == ["load"]
    for seen in (late, late.doing({ID: Activity(Phase.LOADING, "loading A")})):
        (row,) = seen.statuses
        assert (row.phase, row.reason) == (waits.phase, waits.reason)
        assert row.phase is Phase.DEGRADED


def test_all_loaded_is_ready() -> None:
    _, (row,) = status(runs(says(loaded("A"), loaded("B"))), known(IT))
    assert (row.phase, row.as_desired) == (Phase.READY, True)
    assert all(one.as_desired for one in by_model(row))


def test_a_failure_is_forgotten_with_the_configuration_and_with_success() -> None:
    def kept(wanted: Instance, *states: PlacementState) -> bool:
        state = runs(says(*states))
        assessments = assess(desired(wanted), state, CONTEXT)
        memory = ledger.observed(failed(A, 3), assessments, NOW, jitter=0.0)
        return memory_key(ID, "A") in memory.instances

    absent = loaded("A", state=LoadState.ABSENT)
    assert kept(BOTH, absent, loaded("B"))
    assert not kept(BOTH, loaded("A"), loaded("B"))
    assert not kept(server(placement("A", 0, 4), B), absent, loaded("B"))
    assert not kept(server(B), loaded("B"))
    assert failed(A, 3).of(memory_key(ID, "A")).retry_at == NOW + 10
    assert reread(failed(A)) == failed(A)


# --- memory that stays ------------------------------------------------------------------------


def test_memory_that_an_unload_left_behind_is_told_of() -> None:
    gpus = [gpu(0), gpu(1), gpu(2, processes=(process(9, of=BOTH),))]
    plan = plan_for([BOTH], runs(says(loaded("A"), loaded("B")), gpus=gpus))
    assert plan.warnings == (
        "GPU 2: server-shared still holds 18.2 GiB there although nothing is placed on it; only "
        "a restart releases it: mic-supervisor restart server-shared",
    )
    small = replace(process(9, of=BOTH), used_memory=512 << 20)
    idle = [gpu(0), gpu(1), gpu(2, processes=(small,))]
    assert plan_for([BOTH], runs(says(loaded("A"), loaded("B")), gpus=idle)).warnings == ()


# --- from one way to another ------------------------------------------------------------------


def changes(plan: Plan) -> list[tuple[str, str]]:
    return [(change.kind, change.instance) for change in plan.changes]


def test_servers_of_their_own_become_one_and_the_other_way_round() -> None:
    a = on("A", 0, backend="server", placements=(placement("A", 0),))
    b = on("B", 1, backend="server", placements=(placement("B", 1),))
    plan = plan_for([BOTH], observed(workload(a), workload(b)))
    assert changes(plan) == [
        ("remove", "A-aaaaaaaa"),
        ("remove", "B-bbbbbbbb"),
        ("create", ID),
    ]
    start = next(step for change in plan.changes for step in change.steps if "start" in step.id)
    assert [one.split()[0] for one in start.depends_on] == ["release"]
    plan = plan_for([a, b], runs(says(loaded("A"), loaded("B"))))
    assert changes(plan) == [("create", "A-aaaaaaaa"), ("create", "B-bbbbbbbb"), ("remove", ID)]


def test_what_goes_is_told_of_by_what_runs_of_it() -> None:
    """What ended earlier had another set of GPUs, whichever of the two comes first by name."""
    for first, second in (((0, 1), (0, 2)), ((0, 2), (0, 1))):
        ended = workload(server(A, gpus=first), RunState.EXITED)
        it = workload(server(A, gpus=second))
        plan = plan_for([on("web", 0)], observed(ended, it))
        (gone,) = [change for change in plan.changes if change.kind == "remove"]
        assert gone.gpus == it.identity.gpus
