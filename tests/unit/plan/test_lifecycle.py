"""Whole plans, as people read them, and their steps: bringing up, replacing, taking down."""

from __future__ import annotations

from dataclasses import replace

from mic_supervisor.model import HttpCall, Placement, RunState, Stranger
from mic_supervisor.plan.actions import Drain, Stop
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.render import to_json
from tests.unit.plan.builders import (
    CONTEXT,
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
    program,
    shortly,
    text,
    trouble,
    uuid,
    workload,
)

MAM = on("MAM", 0)
FACE = on("face", 2, workload=program("/opt/face", "--port", "${port}"))


# --- nothing there, or nothing to do ----------------------------------------------------------


def test_three_instances_are_created_where_nothing_runs() -> None:
    plan = plan_for([FACE, on("MAM", 1), MAM], observed())
    assert text(plan) == (
        "+ create   MAM-aaaaaaaa   GPU 0  nothing runs for it yet\n"
        "+ create   MAM-bbbbbbbb   GPU 1  nothing runs for it yet\n"
        "+ create   face-cccccccc  GPU 2  nothing runs for it yet\n"
        "\n"
        "Plan: 3 to create.\n"
    )
    assert shortly(plan) == [
        "prepare MAM-aaaaaaaa",
        "create MAM-aaaaaaaa <- prepare MAM-aaaaaaaa",
        "start MAM-aaaaaaaa <- create MAM-aaaaaaaa",
        "prepare MAM-bbbbbbbb",
        "create MAM-bbbbbbbb <- prepare MAM-bbbbbbbb",
        "start MAM-bbbbbbbb <- create MAM-bbbbbbbb",
        "prepare face-cccccccc",
        "start face-cccccccc <- prepare face-cccccccc",
    ]
    assert len({change.lane for change in plan.changes}) == 3


def test_what_runs_as_desired_is_left_alone() -> None:
    plan = plan_for([MAM, FACE], observed(workload(MAM), workload(FACE)))
    assert text(plan) == "No changes.\n"
    assert plan.empty


def test_nothing_desired_and_nothing_there() -> None:
    assert text(plan_for([], observed())) == "No changes.\n"


def test_an_instance_that_memory_does_not_know_is_adopted_without_a_step() -> None:
    plan = plan_for([MAM], observed(workload(MAM)), Memory())
    assert text(plan) == (
        "= adopt    MAM-aaaaaaaa  GPU 0  it runs already, as the file asks\n"
        "\n"
        "No changes; 1 to adopt.\n"
    )
    assert plan.changes[0].steps == ()
    assert plan.count == 0
    assert plan.empty


def test_what_is_to_be_replaced_is_not_adopted() -> None:
    plan = plan_for([changed(MAM, image="mam:2")], observed(workload(MAM)), Memory())
    assert [change.kind for change in plan.changes] == ["replace"]


def test_an_instance_kept_down_by_nothing_but_its_state_is_one_json_document() -> None:
    plan = plan_for([changed(MAM, image="mam:2")], observed(workload(MAM)))
    document = to_json(plan, host="gpu-1", config_hash="c0ffee")
    assert document == {
        "version": 1,
        "host": "gpu-1",
        "config_hash": "c0ffee",
        "changes": 1,
        "actions": [
            {
                "action": "replace",
                "instance": "MAM-aaaaaaaa",
                "model": "MAM",
                "backend": "container",
                "gpus": [uuid(0)],
                "cause": "its specification changed: image",
                "waits": None,
                "diff": [{"path": "image", "before": "mam:1", "after": "mam:2"}],
                "steps": [step.id for step in plan.changes[0].steps],
            }
        ],
        "blocked": [],
        "warnings": [],
    }


# --- down -------------------------------------------------------------------------------------


def test_a_container_that_exited_is_started_again_as_it_is() -> None:
    was = workload(MAM, RunState.EXITED, exit_code=137)
    plan = plan_for([MAM], observed(was))
    assert text(plan) == (
        "+ start    MAM-aaaaaaaa  GPU 0  it exited with 137 (SIGKILL)\n\nPlan: 1 to start.\n"
    )
    assert shortly(plan, it=was) == [
        "release MAM-aaaaaaaa",
        "restart it <- release MAM-aaaaaaaa",
    ]


def test_a_container_that_somebody_stopped_is_started_again() -> None:
    was = workload(MAM, RunState.EXITED, exit_code=143)
    plan = plan_for([MAM], observed(was))
    assert text(plan) == (
        "+ start    MAM-aaaaaaaa  GPU 0  it exited with 143 (SIGTERM)\n\nPlan: 1 to start.\n"
    )


def test_a_container_that_somebody_removed_is_made_anew() -> None:
    memory = knows(MAM_aaaaaaaa=InstanceMemory(ready="then"))
    plan = plan_for([MAM], observed(), memory)
    assert text(plan) == (
        "+ create   MAM-aaaaaaaa  GPU 0  it is missing: its workload was removed\n"
        "\n"
        "Plan: 1 to create.\n"
    )


def test_a_container_that_was_only_created_is_started() -> None:
    was = workload(MAM, RunState.CREATED)
    plan = plan_for([MAM], observed(was))
    assert text(plan) == (
        "+ start    MAM-aaaaaaaa  GPU 0  it was created and never started\n\nPlan: 1 to start.\n"
    )
    assert shortly(plan, it=was) == ["restart it"]


def test_what_the_runtime_says_of_an_end_is_the_cause() -> None:
    was = workload(MAM, RunState.EXITED, exit_code=None, error="no space left on device")
    assert "GPU 0  no space left on device\n" in text(plan_for([MAM], observed(was)))


def test_a_process_that_ended_is_started_anew_under_the_same_name() -> None:
    was = workload(FACE, RunState.EXITED, exit_code=0)
    plan = plan_for([FACE], observed(was))
    assert text(plan) == (
        "+ start    face-cccccccc  GPU 2  it exited with 0\n\nPlan: 1 to start.\n"
    )
    assert shortly(plan) == [
        "prepare face-cccccccc",
        "release face-cccccccc <- prepare face-cccccccc",
        "start face-cccccccc <- release face-cccccccc",
    ]


def test_a_simulated_gpu_has_nothing_to_release() -> None:
    was = workload(MAM, RunState.EXITED)
    plan = plan_for([MAM], observed(was, gpus=[gpu(0, simulated=True, processes=None)]))
    assert shortly(plan, it=was) == ["restart it"]


# --- replacing --------------------------------------------------------------------------------


def test_a_changed_container_is_prepared_and_created_before_the_old_one_stops() -> None:
    old = workload(changed(MAM, env=(("TOKEN", "s3cret"), ("MODE", "a"))))
    new = changed(MAM, image="mam:2", env=(("TOKEN", "0ther"), ("EXTRA", "x")))
    plan = plan_for([new], observed(old))
    assert text(plan) == (
        "~ replace  MAM-aaaaaaaa  GPU 0  "
        "its specification changed: env.EXTRA, env.MODE, env.TOKEN and 1 more\n"
        '    env.EXTRA: null -> "(hidden)"\n'
        '    env.MODE: "(hidden)" -> null\n'
        '    env.TOKEN: "(hidden)" -> "(hidden)"\n'
        '    image: "mam:1" -> "mam:2"\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    assert shortly(plan, old=old) == [
        "prepare MAM-aaaaaaaa",
        "create MAM-aaaaaaaa <- prepare MAM-aaaaaaaa",
        "stop old <- create MAM-aaaaaaaa",
        "release MAM-aaaaaaaa <- stop old, create MAM-aaaaaaaa",
        "start MAM-aaaaaaaa <- release MAM-aaaaaaaa",
    ]
    whole = text(plan) + str(to_json(plan, host="", config_hash="")) + repr(plan)
    assert "s3cret" not in whole
    assert "0ther" not in whole


def test_a_changed_process_is_prepared_before_the_old_one_stops() -> None:
    old = workload(FACE)
    new = changed(FACE, command=("/opt/face", "--port", "${port}", "--highvram"))
    plan = plan_for([new], observed(old))
    assert text(plan) == (
        "~ replace  face-cccccccc  GPU 2  its specification changed: command\n"
        '    command: ["/opt/face", "--port", "${port}"]'
        ' -> ["/opt/face", "--port", "${port}", "--highvram"]\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    assert shortly(plan, old=old) == [
        "prepare face-cccccccc",
        "stop old <- prepare face-cccccccc",
        "release face-cccccccc <- stop old, prepare face-cccccccc",
        "start face-cccccccc <- release face-cccccccc",
    ]


def test_one_argument_of_a_command_is_shown_alone() -> None:
    new = changed(FACE, command=("/opt/face", "--port", "8000"))
    assert '    command[2]: "${port}" -> "8000"\n' in text(
        plan_for([new], observed(workload(FACE)))
    )


def test_what_is_replaced_is_drained_first_and_stopped_as_the_file_says_now() -> None:
    call = HttpCall("POST", "/drain")
    slow = changed(MAM, image="mam:2", stop_timeout=90.0, stop_signal="SIGINT")
    slow = replace(slow, drain=call, drain_timeout=20.0)
    old = workload(MAM)
    plan = plan_for([slow], observed(old))
    assert shortly(plan, old=old)[2:4] == [
        "drain old <- create MAM-aaaaaaaa",
        "stop old <- drain old",
    ]
    drain, stop = plan.changes[0].steps[2:4]
    assert isinstance(drain, Drain)
    assert (drain.call, drain.timeout) == (call, 20.0)
    assert isinstance(stop, Stop)
    assert (stop.signal, stop.grace) == ("SIGINT", 90.0)


def test_what_the_file_no_longer_names_is_stopped_as_it_was_recorded() -> None:
    old = workload(changed(MAM, stop_timeout=90.0, stop_signal="SIGINT"))
    (stop, _) = plan_for([], observed(old)).changes[0].steps
    assert isinstance(stop, Stop)
    assert (stop.signal, stop.grace) == ("SIGINT", 90.0)


def test_how_it_is_stopped_is_no_reason_to_replace_it() -> None:
    new = changed(MAM, stop_timeout=90.0, stop_signal="SIGINT")
    assert plan_for([new], observed(workload(MAM))).empty


def test_a_replacement_that_was_interrupted_goes_on_where_it_was() -> None:
    new = changed(MAM, image="mam:2")
    old, made = workload(MAM), workload(new, RunState.CREATED, created_at=200.0)
    plan = plan_for([new], observed(old, made), known(old))
    assert text(plan) == (
        "~ replace  MAM-aaaaaaaa  GPU 0  its replacement was interrupted\n"
        '    image: "mam:1" -> "mam:2"\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    assert shortly(plan, old=old, new=made) == [
        "prepare new",
        "stop old <- prepare new",
        "release MAM-aaaaaaaa <- stop old, prepare new",
        "restart new <- release MAM-aaaaaaaa",
    ]


def test_going_back_to_an_earlier_specification_is_a_replacement_that_reuses_its_container() -> (
    None
):
    first = workload(MAM, RunState.EXITED, exit_code=143)
    second = workload(changed(MAM, image="mam:2"), created_at=200.0)
    plan = plan_for([MAM], observed(first, second), known(second))
    assert text(plan) == (
        "~ replace  MAM-aaaaaaaa  GPU 0  its specification changed: image\n"
        '    image: "mam:2" -> "mam:1"\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    assert shortly(plan, first=first, second=second) == [
        "prepare first",
        "stop second <- prepare first",
        "release MAM-aaaaaaaa <- stop second, prepare first",
        "restart first <- release MAM-aaaaaaaa",
    ]


def test_a_change_of_what_does_not_run_says_so() -> None:
    old = workload(MAM, RunState.EXITED)
    plan = plan_for([changed(MAM, image="mam:2")], observed(old))
    assert text(plan) == (
        "+ create   MAM-aaaaaaaa  GPU 0  "
        "its specification changed: image, and the earlier one does not run\n"
        '    image: "mam:1" -> "mam:2"\n'
        "\n"
        "Plan: 1 to create.\n"
    )


def test_a_process_takes_the_place_of_a_container_of_the_same_instance() -> None:
    old = workload(MAM)
    new = replace(MAM, workload=program("/opt/mam"))
    plan = plan_for([new], observed(old))
    assert text(plan) == (
        "~ replace  MAM-aaaaaaaa  GPU 0  its specification changed: runtime\n"
        '    runtime: "docker" -> "subprocess"\n'
        "\n"
        "Plan: 1 to replace.\n"
    )
    assert shortly(plan, old=old)[:2] == [
        "prepare MAM-aaaaaaaa",
        "stop old <- prepare MAM-aaaaaaaa",
    ]


def test_the_record_of_an_earlier_process_goes_before_the_name_is_used_again() -> None:
    # Of a unit, the name is the instance's, whatever its specification.
    was = workload(changed(FACE, command=("/opt/old",)), RunState.EXITED, created_at=50.0)
    older = workload(changed(FACE, command=("/opt/older",)), RunState.EXITED, created_at=40.0)
    plan = plan_for([FACE], observed(was, older), known(was))
    assert shortly(plan, was=was, older=older) == [
        "prepare face-cccccccc",
        "remove older <- prepare face-cccccccc",
        "start face-cccccccc <- prepare face-cccccccc, remove older",
    ]


# --- moving, and other models -----------------------------------------------------------------


def test_a_model_that_moves_is_removed_here_and_created_there() -> None:
    old = workload(MAM)
    plan = plan_for([on("MAM", 1)], observed(old))
    assert text(plan) == (
        "- remove   MAM-aaaaaaaa  GPU 0  the file no longer names it\n"
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
        "- remove   MAM-aaaaaaaa  GPU 0  its GPU is to be kept empty\n\nPlan: 1 to remove.\n"
    )
    assert shortly(plan, old=old) == ["stop old", "remove old <- stop old"]


def test_a_stranger_on_a_gpu_that_is_to_be_kept_empty_is_told_of() -> None:
    wanted = desired(kept_empty=(uuid(0),))
    plan = plan_for(wanted, observed(gpus=[gpu(0, processes=(process(4121),))]))
    assert text(plan) == (
        "warning: GPU 0 is to be kept empty, and PID 4121 (python, 18.2 GiB) holds it\n"
        "\n"
        "No changes.\n"
    )


def test_what_the_file_no_longer_names_is_removed_once_that_is_confirmed() -> None:
    old = workload(MAM)
    assert text(plan_for([], observed(old))) == (
        "- remove   MAM-aaaaaaaa  GPU 0  the file no longer names it\n\nPlan: 1 to remove.\n"
    )
    held = plan_for([], observed(old), context=replace(CONTEXT, confirmed=False))
    assert text(held) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: "
        "the file no longer names it; its removal waits to be confirmed\n"
        "    hint: confirm with `mic-supervisor apply` or `systemctl reload mic`\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


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
        "    hint: confirm with `mic-supervisor apply` or `systemctl reload mic`\n"
        "\n"
        "No changes; 2 blocked.\n"
    )


def test_a_gpu_that_is_not_listed_and_has_nothing_of_ours_is_left_alone() -> None:
    held = [gpu(0, processes=(process(4121),))]
    stranger = Stranger("docker", "jupyter", "c1", ports=(8888,))
    assert text(plan_for([], observed(gpus=held, strangers=[stranger]))) == "No changes.\n"


# --- groups -----------------------------------------------------------------------------------


def test_changing_one_gpu_of_a_group_replaces_it() -> None:
    old = workload(on("qwen", 3, 4))
    plan = plan_for([on("qwen", 3, 5)], observed(old))
    assert text(plan) == (
        "~ replace  qwen-ddddddddx2  GPU 3,5  its set of GPUs changed\n"
        f'    gpus: ["{uuid(3)}", "{uuid(4)}"] -> ["{uuid(3)}", "{uuid(5)}"]\n'
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
        "which stays because not all that follows it can start\n"
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
        "which an entry that cannot be followed now may mean\n"
        "\n"
        "No changes; 2 blocked.\n"
    )


# --- two of one -------------------------------------------------------------------------------


def test_the_second_of_one_instance_is_stopped() -> None:
    second = workload(changed(MAM, image="mam:0"), created_at=50.0)
    one = workload(MAM)
    plan = plan_for([MAM], observed(one, second), known(one))
    assert text(plan) == "- stop     MAM-aaaaaaaa  GPU 0  it runs twice\n\nPlan: 1 to stop.\n"
    assert shortly(plan, second=second) == ["stop second"]


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
    item = Placement("MAM", uuid(0), "d", call, call, call)
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
