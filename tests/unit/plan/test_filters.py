"""What is paused, and what was not chosen, is left as it is, whatever the rest of a plan does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_supervisor import codec
from mic_supervisor.model import LoadState, RunState
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import Restart, Start
from mic_supervisor.plan.assess import Selection, workloads
from mic_supervisor.plan.memory import InstanceMemory, Memory, Pause, Paused
from tests.support.examples import examples
from tests.unit.plan.builders import (
    CONTEXT,
    NOW,
    assessment,
    changed,
    container,
    desired,
    failing,
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
    text,
    trouble,
    uuid,
    workload,
)
from tests.unit.plan.cases import GPUS, Case, cases
from tests.unit.plan.test_reconcile_invariants import INVARIANTS, starts, steps_of, subject

MAM, FACE = on("MAM", 0), on("face", 2)
AT = Pause(600.0)


def paused(
    *found: object, models: tuple[str, ...] = (), indices: tuple[int, ...] = (), reason: str = ""
) -> Memory:
    """A memory that saw these run, with pauses."""
    pause = replace(AT, reason=reason or None)
    memory = known(*found)  # type: ignore[arg-type]
    return replace(
        memory,
        paused=Paused(dict.fromkeys(models, pause), {uuid(index): pause for index in indices}),
    )


# --- a pause: whole plans -----------------------------------------------------------------------


def test_what_is_paused_and_as_it_should_be_is_told_all_the_same() -> None:
    runs = workload(MAM)
    plan = plan_for([MAM], observed(runs), paused(runs, models=("MAM",), reason="a new riser"))
    assert text(plan) == (
        "! paused   MAM-aaaaaaaa on GPU 0: paused since 00:10:00 (a new riser)\n"
        "    hint: mic-supervisor resume MAM\n"
        "\n"
        "No changes; 1 paused.\n"
    )
    assert not plan.empty


def test_a_paused_model_is_not_replaced_and_the_plan_says_what_would_be() -> None:
    runs = workload(MAM)
    new = changed(MAM, image="mam:2")
    plan = plan_for([new], observed(runs), paused(runs, models=("MAM",)))
    assert text(plan) == (
        "! paused   MAM-aaaaaaaa on GPU 0: "
        "paused since 00:10:00; would replace: its specification changed: image\n"
        "    hint: mic-supervisor resume MAM\n"
        "\n"
        "No changes; 1 paused.\n"
    )


def test_a_pause_of_another_day_has_its_date() -> None:
    later = replace(observed(), at=NOW + 86400)
    plan = plan_for([MAM], later, paused(models=("MAM",)))
    assert [item.reason for item in plan.blocked] == [
        "paused since 1970-01-01 00:10:00; would create: nothing runs for it yet"
    ]


def test_a_paused_gpu_keeps_what_is_on_it_and_others_wait_for_it() -> None:
    """A move on to a paused GPU, of a model that is not paused itself."""
    runs = workload(MAM)
    wide = on("wide", 0, 1)
    plan = plan_for([wide, FACE], observed(runs), paused(runs, models=("MAM",)))
    assert text(plan) == (
        "+ create   face-cccccccc  GPU 2  nothing runs for it yet\n"
        "\n"
        "! paused   MAM-aaaaaaaa on GPU 0: "
        "paused since 00:10:00; would remove: the file has wide on its GPU\n"
        "    hint: mic-supervisor resume MAM\n"
        "! blocked  wide-aaaaaaaax2 on GPU 0,1: "
        "GPU 0 is still held by MAM-aaaaaaaa, paused since 00:10:00\n"
        "    hint: mic-supervisor resume MAM\n"
        "\n"
        "Plan: 1 to create; 1 blocked; 1 paused.\n"
    )


def test_what_would_start_on_a_paused_gpu_is_paused_itself() -> None:
    plan = plan_for([MAM, FACE], observed(), paused(indices=(0,)))
    assert text(plan).splitlines()[:4] == [
        "+ create   face-cccccccc  GPU 2  nothing runs for it yet",
        "",
        "! paused   MAM-aaaaaaaa on GPU 0: "
        "paused since 00:10:00; would create: nothing runs for it yet",
        "    hint: mic-supervisor resume 0",
    ]


def test_a_port_that_a_paused_one_has_is_waited_for() -> None:
    fixed = container(ports=(replace(MAM.workload.ports[0], host=8000),))
    runs = workload(on("MAM", 0, workload=fixed), ports={"http": 8000})
    other = on("face", 2, workload=fixed)
    plan = plan_for([MAM, other], observed(runs), paused(runs, indices=(0,)))
    assert [(item.instance, item.reason, item.hint) for item in plan.blocked] == [
        (
            "MAM-aaaaaaaa",
            "paused since 00:10:00; would replace: its specification changed: ports.http.host",
            "mic-supervisor resume 0",
        ),
        (
            "face-cccccccc",
            "port 8000 is still held by MAM-aaaaaaaa, paused since 00:10:00",
            "mic-supervisor resume 0",
        ),
    ]


@pytest.mark.parametrize("empty", [(), (uuid(0),)])
def test_an_undesired_one_and_a_gpu_to_be_emptied_stay(empty: tuple[str, ...]) -> None:
    runs = workload(MAM)
    wanted = desired(kept_empty=empty)
    plan = plan_for(wanted, observed(runs), paused(runs, indices=(0,)))
    why = "the file keeps its GPU empty" if empty else "the file no longer names it"
    assert plan.changes == ()
    assert [item.reason for item in plan.blocked] == [f"paused since 00:10:00; would remove: {why}"]


def test_what_ended_stays_down() -> None:
    was = workload(MAM, RunState.EXITED, exit_code=137)
    plan = plan_for([MAM], observed(was), paused(was, models=("MAM",)))
    assert plan.changes == ()
    assert [item.reason for item in plan.blocked] == [
        "paused since 00:10:00; would start: it exited with 137 (SIGKILL)"
    ]


def test_what_is_not_alive_is_not_restarted() -> None:
    runs = workload(MAM)
    state = observed(runs, health={runs.ref: failing("liveness")})
    plan = plan_for([MAM], state, paused(runs, models=("MAM",)))
    assert plan.changes == ()
    assert plan.blocked[0].reason.endswith("would restart: not alive: GET /health answers 503")


def test_a_model_that_runs_is_not_stopped_for_a_paused_one() -> None:
    """A model that runs is worth more than an empty GPU."""
    runs = workload(MAM)
    plan = plan_for([on("face", 0)], observed(runs), paused(runs, models=("face",)))
    assert plan.changes == ()


def test_both_pauses_have_to_be_ended() -> None:
    runs = workload(MAM)
    plan = plan_for([MAM], observed(runs), paused(runs, models=("MAM",), indices=(0,)))
    assert plan.blocked[0].hint == "mic-supervisor resume MAM; mic-supervisor resume 0"


def test_a_pause_of_one_gpu_does_not_hold_up_the_model_on_others() -> None:
    new = [changed(on("MAM", index), image="mam:2") for index in (0, 1)]
    down = workload(on("MAM", 0), RunState.EXITED)
    runs = workload(on("MAM", 1))
    plan = plan_for(new, observed(down, runs), paused(down, runs, indices=(0,)))
    assert [(change.kind, change.instance, change.waits) for change in plan.changes] == [
        ("replace", "MAM-bbbbbbbb", None)
    ]


def test_a_paused_model_in_a_server_with_others_is_not_loaded() -> None:
    server = replace(
        on("S", 0, workload=container("server:1"), backend="server"),
        placements=(placement("A", 0), placement("B", 0)),
    )
    runs = workload(server)
    absent = [loaded(name, state=LoadState.ABSENT) for name in "AB"]
    state = observed(runs, health={runs.ref: passed(*absent)})
    plan = plan_for([server], state, paused(runs, models=("A",)))
    assert [step.placement.model for c in plan.changes for step in c.steps] == ["B"]  # type: ignore[attr-defined]
    assert [item.reason for item in plan.blocked] == [
        "A is paused since 00:10:00; would load: the server does not have A loaded"
    ]


def test_an_unreadable_runtime_does_not_hide_a_pause() -> None:
    plan = plan_for([MAM], observed(errors={"docker": "refused"}), paused(models=("MAM",)))
    assert [(item.paused, item.reason) for item in plan.blocked] == [
        (
            True,
            "paused since 00:10:00; would be blocked: what docker runs is unknown: refused",
        )
    ]


def test_what_follows_a_model_that_stays_for_a_paused_one_is_blocked_by_it() -> None:
    """The paused one has yet to have nothing done for it, the other needs what the first keeps."""
    old = workload(on("old", 0, 1))
    wanted = [MAM, on("face", 1)]
    plan = plan_for(wanted, observed(old), paused(old, models=("MAM",)))
    assert plan.changes == ()
    assert [(item.instance, item.why.code) for item in plan.blocked] == [
        ("MAM-aaaaaaaa", "paused"),
        ("face-bbbbbbbb", "held_for_others"),
    ]
    assert plan.blocked[0].reason == "paused since 00:10:00; would create: nothing runs for it yet"


def test_a_model_stays_for_a_paused_one_that_would_be_started_as_it_is() -> None:
    """To start what ended needs no step before the stop: no dependency tells of the follower."""
    old, ended = workload(on("old", 0)), workload(MAM, RunState.EXITED)
    plan = plan_for([MAM], observed(old, ended), paused(old, ended, models=("MAM",)))
    assert plan.changes == ()


def test_a_pause_says_nothing_of_a_next_try_that_it_holds_up() -> None:
    was = workload(MAM, RunState.EXITED)
    memory = paused(was, models=("MAM",))
    entry = replace(memory.of(MAM.id), reason="it broke", retry_at=NOW + 60)
    plan = plan_for([MAM], observed(was), memory.with_instance(MAM.id, entry))
    assert [(item.reason, item.until) for item in plan.blocked] == [
        ("paused since 00:10:00; would be blocked: backoff: it broke", None)
    ]
    assert plan.next_wake is None


def test_what_was_not_chosen_and_waits_for_a_paused_one_is_not_left_out() -> None:
    runs = workload(MAM)
    context = replace(CONTEXT, targets=Selection(models=frozenset({"face"})))
    memory = paused(runs, models=("MAM",))
    plan = plan_for([on("wide", 0, 1), FACE], observed(runs), memory, context=context)
    assert [change.model for change in plan.changes] == ["face"]
    assert plan.left_out == ()


def test_none_on_a_chosen_gpu_is_done_though_another_follower_cannot_start() -> None:
    old = workload(on("old", 0, 1))
    there = [gpu(0), gpu(1, processes=(process(4121),))]
    context = replace(CONTEXT, targets=Selection(gpus=frozenset({uuid(0)})))
    wanted = desired(on("face", 1), kept_empty=(uuid(0),))
    plan = plan_for(wanted, observed(old, gpus=there), context=context)
    assert [(change.kind, change.model) for change in plan.changes] == [("remove", "old")]


# --- a pause: what is remembered ----------------------------------------------------------------


def test_no_failure_is_counted_then_or_later() -> None:

    runs, ended = workload(MAM), workload(MAM, RunState.EXITED)
    before = paused(runs, models=("MAM",))
    during = ledger.observed(before, [assessment(MAM, ended)], NOW, jitter=0.0)
    assert (during.of(MAM.id).failures, during.of(MAM.id).started) == (0, None)
    free = replace(during, paused=during.paused.without({"MAM"}, ()))
    after = ledger.observed(free, [assessment(MAM, ended)], NOW, jitter=0.0)
    assert (after.of(MAM.id).failures, after.of(MAM.id).failed) == (0, None)
    assert text(plan_for([MAM], observed(ended), after)).startswith(
        "+ start    MAM-aaaaaaaa  GPU 0  it exited with 1\n"
    )


def test_a_pause_survives_in_the_memory() -> None:
    memory = Memory(
        {"a": InstanceMemory()}, {"0": "u"}, Paused({"MAM": Pause(1.0, "x")}, {"u": Pause(2.0)})
    )
    assert reread(memory) == memory
    newer = {"paused": {"models": {"MAM": {"since": 1, "by": "ada"}}, "fleets": {"x": {}}}}
    assert codec.decode(Memory, newer).paused == Paused({"MAM": Pause(1.0)})


def test_to_pause_twice_keeps_the_time_and_takes_the_newer_reason() -> None:
    once = Paused().including(["MAM"], [], Pause(1.0, "a"))
    assert once.including(["MAM"], [], Pause(2.0)) == once
    assert once.including(["MAM"], ["u"], Pause(2.0, "b")) == Paused(
        {"MAM": Pause(1.0, "b")}, {"u": Pause(2.0, "b")}
    )


# --- targets: whole plans -----------------------------------------------------------------------


def limited(*wanted: object, to: Selection, found: tuple[object, ...] = (), **values: object):  # type: ignore[no-untyped-def]
    context = replace(CONTEXT, targets=to)
    return plan_for(desired(*wanted, **values), observed(*found), context=context)  # type: ignore[arg-type]


def test_only_the_chosen_change_and_the_rest_is_told() -> None:
    old = workload(FACE)
    gone = workload(on("old", 4))
    plan = limited(
        MAM,
        changed(FACE, image="face:2"),
        on("MAM", 1),
        to=Selection(gpus=frozenset({uuid(0)})),
        found=(old, gone),
    )
    assert text(plan) == (
        "+ create   MAM-aaaaaaaa  GPU 0  nothing runs for it yet\n"
        "\n"
        "left out: MAM-bbbbbbbb (create: nothing runs for it yet)\n"
        "left out: face-cccccccc (replace: its specification changed: image)\n"
        "left out: old-eeeeeeee (remove: the file no longer names it)\n"
        "\n"
        "Plan: 1 to create; 3 left out.\n"
    )


def test_what_has_to_leave_the_gpu_of_a_chosen_one_goes() -> None:
    old = workload(on("old", 0, 1))
    plan = limited(MAM, on("face", 1), to=Selection(models=frozenset({"MAM"})), found=(old,))
    assert text(plan) == (
        "+ create   MAM-aaaaaaaa    GPU 0    nothing runs for it yet\n"
        "- remove   old-aaaaaaaax2  GPU 0,1  the file has MAM on its GPU\n"
        "    removes mic-test-old-aaaaaaaax2-b5cfe517\n"
        "\n"
        "left out: face-bbbbbbbb (create: nothing runs for it yet)\n"
        "\n"
        "Plan: 1 to create, 1 to remove; 1 left out.\n"
    )


def test_none_on_a_chosen_gpu_is_done() -> None:
    old, other = workload(on("old", 0)), workload(on("old", 1))
    plan = limited(
        to=Selection(gpus=frozenset({uuid(0)})),
        found=(old, other),
        kept_empty=(uuid(0), uuid(1)),
    )
    assert text(plan) == (
        "- remove   old-aaaaaaaa  GPU 0  the file keeps its GPU empty\n"
        "    removes mic-test-old-aaaaaaaa-b6761d69\n"
        "\n"
        "left out: old-bbbbbbbb (remove: the file keeps its GPU empty)\n"
        "\n"
        "Plan: 1 to remove; 1 left out.\n"
    )


def test_what_the_file_merely_lacks_stays_on_a_chosen_gpu_too() -> None:
    old = workload(on("old", 0))
    plan = limited(to=Selection(gpus=frozenset({uuid(0)})), found=(old,))
    assert plan.changes == ()
    assert [change.instance for change in plan.left_out] == ["old-aaaaaaaa"]


def test_entries_in_trouble_are_told_where_they_are_chosen() -> None:
    lost = (trouble("MAM on GPU 9", "there is no GPU 9", model="MAM"),)
    chosen = limited(FACE, to=Selection(models=frozenset({"MAM"})), unsatisfiable=lost)
    assert [item.instance for item in chosen.blocked] == ["MAM on GPU 9"]
    other = limited(FACE, to=Selection(models=frozenset({"face"})), unsatisfiable=lost)
    assert other.blocked == ()


def test_a_chosen_one_that_is_paused_is_paused() -> None:
    context = replace(CONTEXT, targets=Selection(models=frozenset({"MAM"})))
    memory = paused(models=("MAM",))
    plan = plan_for([MAM, FACE], observed(), memory, context=context)
    assert plan.changes == ()
    assert [item.instance for item in plan.blocked] == [MAM.id]
    assert [change.instance for change in plan.left_out] == [FACE.id]


def test_a_port_of_one_that_was_not_chosen_is_waited_for() -> None:
    fixed = container(ports=(replace(MAM.workload.ports[0], host=8000),))
    runs = workload(on("MAM", 0, workload=fixed), ports={"http": 8000})
    other = on("face", 2, workload=fixed)
    plan = limited(MAM, other, to=Selection(models=frozenset({"face"})), found=(runs,))
    assert plan.changes == ()
    assert [item.reason for item in plan.blocked] == [
        "port 8000 is still held by MAM-aaaaaaaa, not one of the targets"
    ]


# --- any state ----------------------------------------------------------------------------------

SELECTIONS = st.builds(
    Selection,
    st.frozensets(st.sampled_from("ABPFS"), max_size=2),
    st.frozensets(st.sampled_from([uuid(index) for index in range(GPUS)]), max_size=2),
)


@settings(max_examples=examples(200))
@given(cases(), SELECTIONS)
def test_a_paused_one_is_in_no_step_whatever_the_rest_does(case: Case, chosen: Selection) -> None:
    pauses = Paused(dict.fromkeys(chosen.models, AT), dict.fromkeys(chosen.gpus, AT))
    case = replace(case, memory=replace(case.memory, paused=pauses))
    steps = steps_of(case.plan)
    models = {item.id: item.model for item in case.desired.instances}
    for step in steps.values():
        found = subject(step)
        held = {*found.identity.gpus} if found is not None else set()
        assert not held & chosen.gpus
        model = found.identity.model if found is not None else models[step.instance]
        assert model not in chosen.models
    for _, used, _ in starts(case.plan).values():
        assert not used & chosen.gpus
    # And to the rest applies what applies without pauses.
    for check in INVARIANTS:
        check(case)


@settings(max_examples=examples(200))
@given(cases(), SELECTIONS)
def test_a_limited_plan_touches_nothing_else(case: Case, chosen: Selection) -> None:
    case = replace(case, context=replace(case.context, targets=chosen))
    ids = {item.id for item in case.desired.instances if chosen.has(item)}
    needed = {one for item in case.desired.instances if item.id in ids for one in item.gpus}
    empty = {*case.desired.kept_empty} & chosen.gpus
    undesired = {w.identity.instance for w in workloads(case.observed)} - {
        item.id for item in case.desired.instances
    }
    for step in steps_of(case.plan).values():
        if step.instance in ids:
            continue
        assert step.instance in undesired
        assert not isinstance(step, Start | Restart)
        found = subject(step)
        assert found is not None
        assert {*found.identity.gpus} & (needed | empty)
    changed_ones = {change.instance for change in case.plan.changes}
    assert not changed_ones & {change.instance for change in case.plan.left_out}
    for check in INVARIANTS:
        if check.__name__ not in (
            # What was not chosen does not keep a GPU from what was.
            "while_one_that_follows_cannot_start_what_runs_stays",
        ):
            check(case)


@given(cases())
def test_to_choose_everything_is_to_choose_nothing(case: Case) -> None:
    every = Selection(frozenset("ABPFS"), frozenset(uuid(index) for index in range(GPUS)))
    named = {one for item in case.desired.instances for one in item.gpus}
    named |= {*case.desired.kept_empty}
    if any(not {*w.identity.gpus} & named for w in workloads(case.observed)):
        return  # what the file merely lacks is left out
    whole = case.plan
    chosen = replace(case, context=replace(case.context, targets=every)).plan
    assert (chosen.changes, chosen.left_out) == (whole.changes, ())
