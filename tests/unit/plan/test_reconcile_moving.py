"""Whole plans where models move, leave, share GPUs or are there twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor.model import ForeignWorkload, HttpCall, Placement, RunState
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.memory import InstanceMemory, Memory
from tests.unit.plan.builders import (
    CONTEXT,
    FACE,
    MAM,
    changed,
    container,
    desired,
    gpu,
    gpus,
    known,
    knows,
    observed,
    on,
    plan_for,
    process,
    shortly,
    text,
    trouble,
    uuid,
    workload,
)

# --- moving, and other models -----------------------------------------------------------------


def test_what_a_person_takes_down_is_not_said_to_be_missing_in_the_file() -> None:
    old = workload(MAM)
    plan = plan_for(replace(desired(), down=True), observed(old))
    assert text(plan).startswith(
        "- remove   MAM-aaaaaaaa  GPU 0  somebody said `mic-supervisor down`\n"
    )


def test_a_model_that_moves_is_removed_here_and_created_there() -> None:
    old = workload(MAM)
    plan = plan_for([on("MAM", 1)], observed(old))
    assert text(plan) == (
        "- remove   MAM-aaaaaaaa  GPU 0  the file no longer names it\n"
        "    removes mic-test-MAM-aaaaaaaa-5ef7f6c7\n"
        "+ create   MAM-bbbbbbbb  GPU 1  nothing runs for it yet\n"
        "\n"
        "Plan: 1 to create, 1 to remove.\n"
    )
    assert shortly(plan, old=old) == [
        "stop old",
        "remove old <- stop old",
        "prepare MAM-bbbbbbbb",
        "create MAM-bbbbbbbb <- prepare MAM-bbbbbbbb",
        "start MAM-bbbbbbbb <- create MAM-bbbbbbbb",
    ]


def test_another_model_on_the_same_gpu_waits_for_the_first_to_be_gone() -> None:
    old = workload(MAM)
    plan = plan_for([on("face", 0)], observed(old))
    assert text(plan) == (
        "- remove   MAM-aaaaaaaa   GPU 0  the file has face on its GPU\n"
        "    removes mic-test-MAM-aaaaaaaa-5ef7f6c7\n"
        "+ create   face-aaaaaaaa  GPU 0  nothing runs for it yet\n"
        "\n"
        "Plan: 1 to create, 1 to remove.\n"
    )
    assert shortly(plan, old=old) == [
        "stop old <- create face-aaaaaaaa",
        "remove old <- stop old",
        "prepare face-aaaaaaaa",
        "create face-aaaaaaaa <- prepare face-aaaaaaaa",
        "release face-aaaaaaaa <- stop old, create face-aaaaaaaa",
        "start face-aaaaaaaa <- release face-aaaaaaaa",
    ]
    assert len({change.lane for change in plan.changes}) == 1


def test_the_processes_of_the_model_that_leaves_do_not_keep_the_other_from_coming() -> None:
    old = workload(MAM)
    held = [gpu(0, processes=(process(4121, of=MAM),))]
    plan = plan_for([on("face", 0)], observed(old, gpus=held))
    assert plan.count == 2
    assert plan.blocked == ()


def test_none_empties_the_gpu_at_once() -> None:
    old = workload(MAM)
    wanted = desired(kept_empty=(uuid(0),))
    plan = plan_for(wanted, observed(old), context=replace(CONTEXT, confirmed=False))
    assert text(plan) == (
        "- remove   MAM-aaaaaaaa  GPU 0  the file keeps its GPU empty\n"
        "    removes mic-test-MAM-aaaaaaaa-5ef7f6c7\n"
        "\n"
        "Plan: 1 to remove.\n"
    )
    assert shortly(plan, old=old) == ["stop old", "remove old <- stop old"]


def test_a_foreign_process_on_a_gpu_that_is_to_be_kept_empty_is_reported() -> None:
    wanted = desired(kept_empty=(uuid(0),))
    plan = plan_for(wanted, observed(gpus=[gpu(0, processes=(process(4121),))]))
    assert text(plan) == (
        "warning: GPU 0 should be empty, but PID 4121 (python, 18.2 GiB) holds it\n\nNo changes.\n"
    )


def test_what_the_file_no_longer_names_is_removed_once_that_is_confirmed() -> None:
    old = workload(MAM)
    assert text(plan_for([], observed(old))) == (
        "- remove   MAM-aaaaaaaa  GPU 0  the file no longer names it\n"
        "    removes mic-test-MAM-aaaaaaaa-5ef7f6c7\n"
        "\n"
        "Plan: 1 to remove.\n"
    )
    held = plan_for([], observed(old), context=replace(CONTEXT, confirmed=False))
    assert text(held) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: "
        "the file no longer names it; its removal waits to be confirmed\n"
        "    hint: confirm with `mic-supervisor apply` or `mic-supervisor reload`\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_a_gpu_of_a_profile_that_is_off_needs_no_confirmation() -> None:
    wanted = desired(aside=((uuid(0), "MAM"),))
    for old in (workload(MAM), workload(MAM, RunState.EXITED)):
        plan = plan_for(wanted, observed(old), context=replace(CONTEXT, confirmed=False))
        assert [(one.kind, one.cause) for one in plan.changes] == [
            ("remove", "the profile that has its GPU is not on")
        ]
        assert plan.blocked == ()


def test_a_model_that_no_profile_has_there_waits_to_be_confirmed() -> None:
    """A file cut at the end of a line under `gpus:` lacks it, and still has the profiles above."""
    wanted = desired(aside=((uuid(0), "face"), (uuid(1), "MAM")))
    old = observed(workload(MAM))
    plan = plan_for(wanted, old, context=replace(CONTEXT, confirmed=False))
    assert (plan.changes, [one.why.code for one in plan.blocked]) == ((), ["unconfirmed"])
    assert [one.cause for one in plan_for(wanted, old).changes] == ["the file no longer names it"]
    group = observed(workload(on("qwen", 3, 4)))
    part = desired(aside=((uuid(3), "qwen"),))
    assert plan_for(part, group, context=replace(CONTEXT, confirmed=False)).changes == ()


def test_what_runs_for_a_claim_goes_with_the_profile_that_handed_its_gpu_over() -> None:
    wanted = desired(aside=((uuid(0), "fleet"),))
    old = workload(MAM)
    held = plan_for(wanted, observed(old), context=replace(CONTEXT, confirmed=False))
    assert (held.changes, [one.why.code for one in held.blocked]) == ((), ["unconfirmed"])
    claimed = replace(old, identity=replace(old.identity, origin="claim"))
    plan = plan_for(wanted, observed(claimed), context=replace(CONTEXT, confirmed=False))
    assert [one.cause for one in plan.changes] == ["the profile that has its GPU is not on"]


def test_an_ended_container_of_a_removed_entry_is_removed_too() -> None:
    old = workload(MAM, RunState.EXITED)
    assert shortly(plan_for([], observed(old)), old=old) == ["remove old"]
    held = plan_for([], observed(old), context=replace(CONTEXT, confirmed=False))
    assert held.count == 0


def test_naming_the_gpu_for_another_model_is_clear_without_confirmation() -> None:
    plan = plan_for(
        [on("face", 0)], observed(workload(MAM)), context=replace(CONTEXT, confirmed=False)
    )
    assert plan.count == 2
    assert plan.blocked == ()


def test_nothing_starts_on_a_gpu_of_a_group_whose_removal_is_not_confirmed() -> None:
    group = workload(on("qwen", 3, 4))
    plan = plan_for([on("MAM", 3)], observed(group), context=replace(CONTEXT, confirmed=False))
    assert text(plan) == (
        "! blocked  MAM-dddddddd on GPU 3: GPU 3 is still held by qwen-ddddddddx2, "
        "whose removal waits to be confirmed\n"
        "! blocked  qwen-ddddddddx2 on GPU 3,4: "
        "the file no longer names it; its removal waits to be confirmed\n"
        "    hint: confirm with `mic-supervisor apply` or `mic-supervisor reload`\n"
        "\n"
        "No changes; 2 blocked.\n"
    )


def test_a_gpu_that_is_not_listed_and_has_nothing_of_ours_is_left_alone() -> None:
    held = [gpu(0, processes=(process(4121),))]
    foreign = ForeignWorkload("docker", "jupyter", "c1", ports=(8888,))
    assert text(plan_for([], observed(gpus=held, foreign_workloads=[foreign]))) == "No changes.\n"


# --- groups -----------------------------------------------------------------------------------


def test_changing_one_gpu_of_a_group_replaces_it() -> None:
    old = workload(on("qwen", 3, 4))
    plan = plan_for([on("qwen", 3, 5)], observed(old))
    assert text(plan) == (
        "~ replace  qwen-ddddddddx2  GPU 3,5  its set of GPUs changed\n"
        f"    gpus: {uuid(4)} -> {uuid(5)}\n"
        "\n"
        "Plan: 1 to replace.\n"
    )
    assert shortly(plan, old=old) == [
        "prepare qwen-ddddddddx2",
        "create qwen-ddddddddx2 <- prepare qwen-ddddddddx2",
        "stop old <- create qwen-ddddddddx2",
        "release qwen-ddddddddx2 <- stop old, create qwen-ddddddddx2",
        "start qwen-ddddddddx2 <- release qwen-ddddddddx2",
    ]


def test_a_group_grows_into_the_gpu_of_another_model() -> None:
    group, single = workload(on("qwen", 3, 4)), workload(on("MAM", 5))
    plan = plan_for([on("qwen", 3, 5)], observed(group, single))
    assert "start qwen-ddddddddx2 <- release qwen-ddddddddx2" in shortly(plan)
    assert "release qwen-ddddddddx2 <- stop group, stop single, create qwen-ddddddddx2" in shortly(
        plan, group=group, single=single
    )


def test_a_group_falls_apart_into_singles_that_all_wait_for_it() -> None:
    group = workload(on("qwen", 3, 4))
    plan = plan_for([on("qwen", 3), on("MAM", 4)], observed(group))
    assert text(plan) == (
        "+ create   MAM-eeeeeeee     GPU 4    nothing runs for it yet\n"
        "+ create   qwen-dddddddd    GPU 3    nothing runs for it yet\n"
        "- remove   qwen-ddddddddx2  GPU 3,4  the file has MAM on its GPU\n"
        "    removes mic-test-qwen-ddddddddx2-189060af\n"
        "\n"
        "Plan: 2 to create, 1 to remove.\n"
    )
    lines = shortly(plan, group=group)
    assert "stop group <- create MAM-eeeeeeee, create qwen-dddddddd" in lines
    assert "release MAM-eeeeeeee <- stop group, create MAM-eeeeeeee" in lines
    assert "release qwen-dddddddd <- stop group, create qwen-dddddddd" in lines


def test_a_group_stays_while_one_of_those_that_follow_it_cannot_start() -> None:
    group = workload(on("qwen", 3, 4))
    held = [gpu(3), gpu(4, processes=(process(4121),))]
    plan = plan_for([on("qwen", 3), on("MAM", 4)], observed(group, gpus=held))
    assert text(plan) == (
        "! blocked  MAM-eeeeeeee on GPU 4: GPU 4 is held by PID 4121 (python, 18.2 GiB), not ours\n"
        "    hint: end that process, or move the model to another GPU\n"
        "! blocked  qwen-dddddddd on GPU 3: GPU 3 is still held by qwen-ddddddddx2, "
        "which stays because an instance that follows it cannot start\n"
        "\n"
        "warning: GPU 4 is for qwen-ddddddddx2 alone, and PID 4121 (python, 18.2 GiB) is on it as "
        "well\n"
        "\n"
        "No changes; 2 blocked.\n"
    )


def test_nothing_starts_beside_a_group_that_an_entry_in_trouble_may_mean() -> None:
    group = workload(on("qwen", 3, 4))
    wanted = desired(on("MAM", 3), unsatisfiable=(trouble("GPU 4", "it cannot be opened", 4),))
    plan = plan_for(wanted, observed(group))
    assert text(plan) == (
        "! blocked  GPU 4 on GPU 4: it cannot be opened\n"
        "! blocked  MAM-dddddddd on GPU 3: GPU 3 is still held by qwen-ddddddddx2, "
        "and an entry of the file that cannot be followed now may mean it\n"
        "\n"
        "No changes; 2 blocked.\n"
    )


# --- two of one -------------------------------------------------------------------------------


def test_the_second_of_one_instance_is_stopped() -> None:
    second = workload(changed(MAM, image="mam:0"), created_at=50.0)
    one = workload(MAM)
    plan = plan_for([MAM], observed(one, second), known(one))
    assert text(plan) == (
        "- stop     MAM-aaaaaaaa  GPU 0  it runs twice\n"
        "    stops mic-test-MAM-aaaaaaaa-770599a3\n"
        "\n"
        "Plan: 1 to stop.\n"
    )
    assert shortly(plan, second=second) == ["stop second"]
    # As it is looked at while its replacement is under way.
    busy = replace(CONTEXT, busy=frozenset({MAM.id}))
    assert plan_for([MAM], observed(one, second), known(one), context=busy).count == 0


def test_of_two_as_the_file_says_the_known_one_stays() -> None:
    """The newer one stays only where nothing is remembered."""
    one = workload(MAM)
    old = replace(one, name="mic-test-a", ref="a", created_at=1.0)
    new = replace(one, name="mic-test-b", ref="b", created_at=2.0)
    for kept, other in ((old, new), (new, old)):
        plan = plan_for([MAM], observed(old, new), known(kept))
        assert [step.id for step in plan.changes[0].steps] == [f"stop {other.name}"]
    plan = plan_for([MAM], observed(old, new))
    assert [step.id for step in plan.changes[0].steps] == [f"stop {old.name}"]


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("spec", ["as desired", "an earlier one"])
def test_nothing_runs_twice_while_it_is_not_known_of_both_whether_they_run(
    spec: str, remembers: bool
) -> None:
    """The engine does not answer about what it lists as ended, or as not started yet."""
    one = workload(MAM, created_at=80.0)
    other = workload(MAM if spec == "as desired" else changed(MAM, image="mam:0"), created_at=90.0)
    other = replace(other, name="mic-test-other", ref="other", state=RunState.UNKNOWN)
    memory = known(one) if remembers else Memory()
    look = observed(one, other)
    (assessment,) = assess(desired(MAM), look, CONTEXT, memory)
    assert assessment.match == one
    assert [one.kind for one in plan_for([MAM], look, memory).changes if one.steps] == []
    # A replacement that was interrupted: what serves is not stopped for what may not run.
    new = replace(one, name="mic-test-new", ref="new", state=RunState.UNKNOWN, created_at=95.0)
    old = workload(changed(MAM, image="mam:0"))
    assert plan_for([MAM], observed(old, new), memory).count == 0
    new = replace(new, state=RunState.CREATED)
    steps = shortly(plan_for([MAM], observed(old, new), memory), old=old, new=new)
    assert any(step.startswith("stop old") for step in steps)


def test_of_two_that_are_alike_the_newer_one_stays() -> None:
    new, old = workload(MAM, created_at=90.0), workload(MAM, ports={"http": 20001}, created_at=80.0)
    plan = plan_for([MAM], observed(new, old), known(new))
    assert shortly(plan, new=new, old=old) == ["stop old"]


def test_nothing_is_created_while_two_earlier_ones_run_until_both_are_stopped() -> None:
    a = workload(changed(MAM, image="mam:a"), created_at=80.0)
    b = workload(changed(MAM, image="mam:b"), created_at=90.0)
    plan = plan_for([MAM], observed(a, b), known(b))
    assert "release MAM-aaaaaaaa <- stop b, stop a, create MAM-aaaaaaaa" in shortly(plan, a=a, b=b)


# --- what is left over ------------------------------------------------------------------------


def test_of_what_ended_the_last_good_one_is_kept() -> None:
    runs = workload(MAM)
    good = workload(changed(MAM, image="good"), RunState.EXITED, created_at=10.0)
    bad = workload(changed(MAM, image="bad"), RunState.EXITED, created_at=20.0)
    never = workload(changed(MAM, image="never"), RunState.CREATED, created_at=30.0)
    memory = knows(MAM_aaaaaaaa=InstanceMemory(started=runs.name, ready_workload=good.name))
    plan = plan_for([MAM], observed(runs, good, bad, never), memory)
    assert text(plan) == (
        "- remove   MAM-aaaaaaaa  GPU 0  left over from an earlier specification\n"
        "    removes mic-test-MAM-aaaaaaaa-1511c785\n"
        "    removes mic-test-MAM-aaaaaaaa-fec0092f\n"
        "\n"
        "Plan: 1 to remove.\n"
    )
    assert shortly(plan, good=good, bad=bad, never=never) == ["remove never", "remove bad"]


def test_of_what_ended_the_newest_that_ran_is_kept_where_none_is_known_to_be_good() -> None:
    runs = workload(MAM)
    older = workload(changed(MAM, image="older"), RunState.EXITED, created_at=10.0)
    newer = workload(changed(MAM, image="newer"), RunState.EXITED, created_at=20.0)
    plan = plan_for([MAM], observed(runs, older, newer), known(runs))
    assert shortly(plan, older=older, newer=newer) == ["remove older"]
    assert plan_for([MAM], observed(runs, newer), known(runs)).empty


def test_a_replacement_removes_what_was_kept_before_only_after_its_own_start() -> None:
    serves = workload(MAM)
    kept = workload(changed(MAM, image="mam:0"), RunState.EXITED, created_at=10.0)
    plan = plan_for([changed(MAM, image="mam:2")], observed(serves, kept), known(serves))
    assert shortly(plan, kept=kept)[-1] == "remove kept <- start MAM-aaaaaaaa"


def test_a_failing_container_does_not_push_out_the_good_one() -> None:
    good = workload(MAM, RunState.EXITED, created_at=10.0)
    bad = workload(changed(MAM, image="bad"), RunState.EXITED, created_at=20.0)
    memory = knows(MAM_aaaaaaaa=InstanceMemory(ready_workload=good.name, ready="then"))
    plan = plan_for([changed(MAM, image="mam:3")], observed(good, bad), memory)
    assert shortly(plan, good=good, bad=bad)[-1] == "remove bad <- start MAM-aaaaaaaa"


def test_the_state_is_the_same_whichever_way_it_is_listed() -> None:
    a, b, c = workload(MAM), workload(FACE), workload(on("MAM", 1))
    wanted = desired(changed(MAM, image="mam:2"), FACE)
    one = observed(a, b, c, gpus=gpus(3))
    other = observed(c, b, a, gpus=reversed(gpus(3)))
    other = replace(other, runtimes=other.runtimes[::-1])
    memory = known(a, b, c)
    assert plan_for(wanted, one, memory) == plan_for(wanted, other, memory)
    assert plan_for(wanted, one, memory).count == 2


def test_a_placement_is_no_part_of_the_specification() -> None:
    call = HttpCall("GET", "/")
    item = Placement("MAM", (uuid(0),), "d", call, call, call)
    assert not [
        change
        for change in plan_for([replace(MAM, placements=(item,))], observed(workload(MAM))).changes
        if change.kind == "replace"
    ]


def test_container_ports_are_not_needed() -> None:
    quiet = on("quiet", 0, workload=container("quiet:1", ports=()))
    assert (
        shortly(plan_for([quiet], observed()))[-1]
        == "start quiet-aaaaaaaa <- create quiet-aaaaaaaa"
    )


def test_a_group_that_moves_leaves_its_gpu_to_another_model() -> None:
    """Its processes there are no stranger's: they end before the other one starts."""
    was, now, mam = on("qwen", 3, 4), on("qwen", 3, 5), on("MAM", 4)
    old = workload(was)
    held = [
        gpu(index, processes=(process(100 + index, of=was),) if index in (3, 4) else ())
        for index in range(6)
    ]
    plan = plan_for([now, mam], observed(old, gpus=held))
    assert plan.blocked == ()
    assert [(change.kind, change.model) for change in plan.changes] == [
        ("create", "MAM"),
        ("replace", "qwen"),
    ]
    steps = {step.id: step for change in plan.changes for step in change.steps}
    start = next(step for name, step in steps.items() if name.startswith("start mic-test-MAM"))
    (release,) = start.depends_on
    assert f"stop {old.name}" in steps[release].depends_on
    assert old.name == steps[f"stop {old.name}"].workload.name  # type: ignore[attr-defined]


def test_what_waits_to_be_confirmed_is_not_foreign_either() -> None:
    group = on("qwen", 3, 4)
    held = [gpu(3, processes=(process(103, of=group),)), gpu(4)]
    context = replace(CONTEXT, confirmed=False)
    plan = plan_for([on("MAM", 3)], observed(workload(group), gpus=held), context=context)
    assert [item.why.code for item in plan.blocked] == ["held_unconfirmed", "unconfirmed"]
