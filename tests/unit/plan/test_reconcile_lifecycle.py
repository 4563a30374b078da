"""Whole plans, as people read them, and their steps: bringing up and replacing."""

from __future__ import annotations

from dataclasses import asdict, replace

from mic_supervisor.model import HttpCall, Listener, RunState
from mic_supervisor.plan.actions import Drain, Start, Stop
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.views.plan import plan_document
from tests.unit.plan.builders import (
    FACE,
    MAM,
    changed,
    gpu,
    known,
    knows,
    observed,
    on,
    plan_for,
    program,
    shortly,
    text,
    uuid,
    workload,
)

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


def test_a_plan_is_one_json_document() -> None:
    plan = plan_for([changed(MAM, image="mam:2")], observed(workload(MAM)))
    document = plan_document(plan, host="gpu-1", config_hash="c0ffee")
    assert asdict(document) == {
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
                "code": "spec_changed",
                "waits": None,
                "diff": [{"path": "image", "before": "mam:1", "after": "mam:2"}],
                "steps": [step.id for step in plan.changes[0].steps],
            }
        ],
        "blocked": [],
        "left_out": [],
        "warnings": [],
        "profile": None,
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
    whole = text(plan) + str(plan_document(plan, host="", config_hash="")) + repr(plan)
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


def test_what_was_created_for_an_earlier_file_goes_before_anything_is_stopped_or_started() -> None:
    runs, new = workload(MAM), changed(MAM, image="mam:3")
    made = workload(changed(MAM, image="mam:2"), RunState.CREATED, created_at=200.0)
    plan = plan_for([new], observed(runs, made), known(runs))
    assert shortly(plan, runs=runs, made=made) == [
        "prepare MAM-aaaaaaaa",
        "create MAM-aaaaaaaa <- prepare MAM-aaaaaaaa",
        "remove made <- create MAM-aaaaaaaa",
        "stop runs <- remove made",
        "release MAM-aaaaaaaa <- stop runs, remove made",
        "start MAM-aaaaaaaa <- release MAM-aaaaaaaa",
    ]


def test_what_was_created_for_an_earlier_file_goes_before_an_ended_one_is_started_again() -> None:
    ended = workload(MAM, RunState.EXITED)
    made = workload(changed(MAM, image="mam:2"), RunState.CREATED, created_at=200.0)
    plan = plan_for([MAM], observed(ended, made))
    assert shortly(plan, ended=ended, made=made) == [
        "remove made",
        "release MAM-aaaaaaaa <- remove made",
        "restart ended <- release MAM-aaaaaaaa",
    ]


def test_two_that_were_created_for_one_specification_leave_one_that_is_started() -> None:
    first = workload(MAM, RunState.CREATED, ports={"http": 20001}, created_at=200.0)
    second = workload(MAM, RunState.CREATED, ports={"http": 20002}, created_at=100.0)
    plan = plan_for([MAM], observed(first, second))
    assert shortly(plan, first=first, second=second) == [
        "remove second",
        "restart first <- remove second",
    ]


def test_what_was_created_for_the_model_before_goes_before_the_next_one_starts() -> None:
    made = workload(on("old", 0), RunState.CREATED)
    plan = plan_for([MAM], observed(made))
    assert "start MAM-aaaaaaaa <- create MAM-aaaaaaaa, remove made" in shortly(plan, made=made)
    elsewhere = workload(on("old", 1), RunState.CREATED)
    plan = plan_for([MAM], observed(elsewhere))
    assert "start MAM-aaaaaaaa <- create MAM-aaaaaaaa" in shortly(plan, made=elsewhere)


def test_a_start_in_flight_keeps_its_port_and_nothing_is_made_beside_it() -> None:
    """Its listener is there long before the engine says that it runs."""
    flying = workload(MAM, RunState.UNKNOWN)
    (port,) = flying.identity.ports.values()
    seen = observed(flying, listeners=(Listener(port),))
    assert plan_for([MAM], seen, known(flying)).empty
    plan = plan_for([changed(MAM, image="mam:2")], seen, known(flying))
    assert shortly(plan, old=flying)[2] == "stop old <- create MAM-aaaaaaaa"
    (start,) = (step for change in plan.changes for step in change.steps if isinstance(step, Start))
    assert start.launch.identity.ports == flying.identity.ports


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
