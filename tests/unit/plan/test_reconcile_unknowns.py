"""Whole plans where something cannot be read, or an entry of the file is unsatisfiable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor.model import (
    Doubt,
    GpuProcess,
    ObservedWorkload,
    Port,
    RunState,
    Unlisted,
    UnopenedGpu,
)
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.spec import SpecKey
from tests.unit.plan.builders import (
    CONTEXT,
    FACE,
    MAM,
    changed,
    container,
    desired,
    failing,
    gpu,
    gpus,
    known,
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

# --- unknown is never absent ------------------------------------------------------------------


def test_docker_that_cannot_be_read_freezes_its_instances_and_no_process_that_runs() -> None:
    mam, face = workload(MAM), workload(FACE)
    state = observed(mam, face, errors={"docker": "connection refused"})
    assert text(plan_for([MAM, FACE], state, known(mam, face))) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: what docker runs is unknown: connection refused\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_a_process_is_not_started_on_a_gpu_that_an_unreadable_docker_may_use() -> None:
    state = observed(errors={"docker": "connection refused"})
    plan = plan_for([FACE], state)
    assert plan.count == 0
    assert plan.blocked[0].reason == "what docker runs is unknown: connection refused"


def test_a_process_that_is_to_go_is_frozen_too_and_said_to_be() -> None:
    face = workload(FACE)
    state = observed(face, errors={"docker": "connection refused"})
    plan = plan_for(desired(kept_empty=(uuid(2),)), state)
    assert text(plan) == (
        "! blocked  face-cccccccc on GPU 2: what docker runs is unknown: connection refused\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_a_process_that_runs_is_still_looked_after_without_docker() -> None:
    face = workload(FACE)
    state = observed(
        face, health={face.ref: failing("liveness")}, errors={"docker": "connection refused"}
    )
    assert [change.kind for change in plan_for([FACE], state).changes] == ["restart"]


GONE = {"docker": "connection refused"}


@pytest.mark.parametrize("last", [[], [workload(MAM)]])
def test_a_process_that_ended_is_started_where_docker_had_nothing_when_it_could_be_read(
    last: list[ObservedWorkload],
) -> None:
    ended = workload(FACE, RunState.EXITED)
    plan = plan_for([MAM, FACE], observed(ended, errors=GONE, last=last))
    assert [(change.kind, change.instance) for change in plan.changes] == [("start", FACE.id)]
    assert [item.instance for item in plan.blocked] == [MAM.id]


@pytest.mark.parametrize(
    "last",
    [
        workload(on("old", 2)),
        workload(on("old", 2), RunState.UNKNOWN),
        workload(on("old", 1, 2)),
        workload(on("old", 1), identity={"gpus": ()}),
        workload(on("old", 1), ports={"http": 9000}),
    ],
)
def test_a_process_stays_down_where_docker_may_have_its_gpu_or_port(last: ObservedWorkload) -> None:
    face = on("face", 2, workload=program("/opt/face", ports=(Port("http", 9000),)))
    state = observed(workload(face, RunState.EXITED), errors=GONE, last=[last])
    plan = plan_for([face], state)
    assert plan.count == 0
    assert plan.blocked[0].reason == "what docker runs is unknown: connection refused"


@pytest.mark.parametrize("processes", [(process(4121),), None])
def test_a_process_stays_down_where_the_driver_lists_others_on_its_gpu_or_does_not_say(
    processes: tuple[GpuProcess, ...] | None,
) -> None:
    state = observed(errors=GONE, last=[], gpus=[gpu(2, processes=processes)])
    assert plan_for([FACE], state).count == 0


def test_a_container_is_started_where_an_unreadable_process_runtime_had_nothing() -> None:
    state = observed(errors={"subprocess": "no answer"}, last=[workload(FACE)])
    plan = plan_for([MAM, FACE], state)
    assert [(change.kind, change.instance) for change in plan.changes] == [("create", MAM.id)]


def test_nvml_that_cannot_be_read_stops_and_starts_nothing() -> None:
    runs, goes = workload(MAM), workload(on("old", 3))
    error = "cannot read the GPUs: Driver/library version mismatch"
    state = observed(runs, goes, nvml_error=error)
    assert text(plan_for([MAM, on("MAM", 1)], state)) == (
        f"! blocked  MAM-bbbbbbbb on GPU 1: {error}\n"
        f"! blocked  old-dddddddd on GPU 3: {error}\n"
        "\n"
        f"warning: {error}; nothing is started or stopped meanwhile\n"
        "\n"
        "No changes; 2 blocked.\n"
    )


def test_processes_that_cannot_be_read_block_a_start() -> None:
    plan = plan_for([MAM], observed(gpus=[gpu(0, processes=None)]))
    assert plan.blocked[0].reason == "the processes on GPU 0 cannot be read"


@pytest.mark.parametrize(
    ("unlisted", "reason"),
    [
        ("untold", "this platform does not report who is on GPU 0"),
        ("implausible", "what the driver lists on GPU 0 cannot be true"),
    ],
)
def test_holders_that_are_never_told_block_a_start_unless_it_is_said_to_ignore_them(
    unlisted: Unlisted, reason: str
) -> None:
    state = observed(gpus=[gpu(0, processes=None, unlisted=unlisted)])
    blocked = plan_for([MAM], state).blocked[0]
    assert blocked.reason == reason
    assert "`on_foreign: ignore` for MAM" in (blocked.hint or "")
    assert not plan_for([replace(MAM, on_foreign="ignore")], state).blocked


def test_holders_that_cannot_be_read_now_are_not_ignored() -> None:
    state = observed(gpus=[gpu(0, processes=None)])
    assert plan_for([replace(MAM, on_foreign="ignore")], state).blocked


def test_a_workload_whose_state_cannot_be_read_counts_as_holding_its_gpu() -> None:
    old = workload(on("face", 0), RunState.UNKNOWN)
    plan = plan_for([MAM], observed(old))
    assert "release MAM-aaaaaaaa <- stop old, create MAM-aaaaaaaa" in shortly(plan, old=old)


DOUBT = Doubt("its record is gone; PID 7 runs, and is left as it is", "kill 7")


def test_what_is_in_doubt_is_left_as_it_is_with_its_gpus() -> None:
    mine = replace(workload(changed(MAM, image="mam:0"), RunState.UNKNOWN), doubt=DOUBT)
    assert text(plan_for([MAM], observed(mine))) == (
        f"! blocked  MAM-aaaaaaaa on GPU 0: {DOUBT.reason}\n"
        "    hint: kill 7\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_what_is_in_doubt_keeps_another_model_from_its_gpu_and_from_no_other() -> None:
    old = replace(workload(on("face", 0), RunState.UNKNOWN), doubt=DOUBT)
    plan = plan_for([MAM, on("MAM", 1)], observed(old))
    told = {item.instance: item.reason for item in plan.blocked}
    assert told == {
        "face-aaaaaaaa": DOUBT.reason,
        "MAM-aaaaaaaa": f"GPU 0 is still held by face-aaaaaaaa: {DOUBT.reason}",
    }
    assert [change.instance for change in plan.changes] == ["MAM-bbbbbbbb"]


def test_of_two_the_one_that_is_in_no_doubt_is_the_instance() -> None:
    sure = workload(MAM)
    other = replace(workload(MAM, RunState.UNKNOWN), name="other", doubt=DOUBT, created_at=9e9)
    plan = plan_for([MAM], observed(sure, other))
    assert plan.count == 0
    (item,) = assess(desired(MAM), observed(sure, other), CONTEXT)
    assert item.match is sure


def test_an_earlier_one_whose_label_names_no_gpu_is_taken_to_hold_the_instances() -> None:
    old = workload(changed(MAM, image="mam:0"), identity={"gpus": ()})
    assert "release MAM-aaaaaaaa <- stop old, create MAM-aaaaaaaa" in shortly(
        plan_for([MAM], observed(old)), old=old
    )


def test_a_gpu_that_went_since_the_file_was_bound_blocks_its_own_instance() -> None:
    plan = plan_for([MAM, on("MAM", 1)], observed(workload(MAM), gpus=[gpu(0)]))
    assert text(plan, 1) == (
        f"! blocked  MAM-bbbbbbbb on {uuid(1)}: {uuid(1)} is not there\n\nNo changes; 1 blocked.\n"
    )


def test_an_unhealthy_instance_is_not_restarted_onto_a_gpu_that_is_not_there() -> None:
    runs = workload(MAM)
    state = observed(runs, health={runs.ref: failing("liveness")}, gpus=[gpu(1)])
    plan = plan_for([MAM], state)
    assert plan.count == 0
    assert plan.blocked[0].reason == f"{uuid(0)} is not there"


def test_a_label_that_cannot_be_read_is_told_of_and_replaces_nothing() -> None:
    runs = workload(MAM, identity={"spec": None})
    assert text(plan_for([MAM], observed(runs))) == (
        f"warning: {runs.name}: the record of its specification cannot be read, so whether it is "
        "what the file asks for is unknown\n"
        "\n"
        "No changes.\n"
    )


def test_secrets_recorded_with_a_lost_key_are_told_of_and_replace_nothing() -> None:
    secret = changed(MAM, env=(("TOKEN", "x"),))
    runs = workload(secret, context=replace(CONTEXT, key=SpecKey(b"lost")))
    assert text(plan_for([secret], observed(runs))) == (
        f"warning: {runs.name}: its secrets were recorded with another key, so whether they "
        "changed is unknown\n"
        "\n"
        "No changes.\n"
    )
    assert plan_for([MAM], observed(workload(MAM))).warnings == ()


def test_a_gpu_that_does_not_open_is_a_warning() -> None:
    state = observed(workload(MAM))
    inventory = replace(state.inventory, unopened=(UnopenedGpu(7, "cannot open it: GPU is lost"),))
    plan = plan_for([MAM], replace(state, inventory=inventory))
    assert text(plan) == "warning: GPU 7: cannot open it: GPU is lost\n\nNo changes.\n"


def test_texts_that_refer_to_a_port_that_is_not_there_block_one_instance() -> None:
    odd = on("odd", 1, workload=container("odd:1", command=("--grpc", "${port:grpc}")))
    plan = plan_for([MAM, odd], observed())
    assert [change.instance for change in plan.changes] == ["MAM-aaaaaaaa"]
    assert plan.blocked[0].reason == "its texts refer to 'grpc', which it does not have"


# --- unsatisfiable entries -----------------------------------------------------------------------


def test_an_entry_in_trouble_protects_what_runs_for_it() -> None:
    reason = "cannot read /srv/t.env: no such file"
    entry = trouble("MAM on GPU 0", reason, 0, instances=("MAM-aaaaaaaa",), hint="bring it back")
    assert text(plan_for(desired(unsatisfiable=(entry,)), observed(workload(MAM)))) == (
        f"! blocked  MAM-aaaaaaaa on GPU 0: {reason}\n"
        "    hint: bring it back\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_an_entry_in_trouble_protects_what_runs_on_its_gpus_and_nothing_else() -> None:
    entry = trouble("face on GPU 0", "no backend", 0)
    plan = plan_for(
        desired(unsatisfiable=(entry,)), observed(workload(MAM), workload(on("MAM", 1)))
    )
    assert [change.instance for change in plan.changes] == ["MAM-bbbbbbbb"]


def test_an_entry_in_trouble_protects_its_instance_although_its_gpus_are_not_known() -> None:
    entry = trouble("MAM on GPU 0", "it is not bound", instances=("MAM-aaaaaaaa",))
    assert plan_for(desired(unsatisfiable=(entry,)), observed(workload(MAM))).count == 0


def test_an_entry_of_which_no_gpu_is_known_protects_its_model_on_gpus_that_are_gone() -> None:
    entry = trouble("MAM on 00000000:3b:00.0", "no GPU has it", model="MAM")
    gone, there = workload(on("MAM", 5)), workload(on("MAM", 1))
    other = workload(on("face", 4))
    plan = plan_for(desired(unsatisfiable=(entry,)), observed(gone, there, other, gpus=gpus(3)))
    assert [change.instance for change in plan.changes] == ["MAM-bbbbbbbb", "face-eeeeeeee"]
