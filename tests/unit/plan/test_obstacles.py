"""Whole plans where something stands in the way, cannot be read, or is to be patient about."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor.model import (
    GpuProcess,
    Health,
    Listener,
    LoadState,
    Owner,
    OwnerKind,
    Port,
    Probes,
    RunState,
    Stranger,
    UnopenedGpu,
)
from mic_supervisor.plan.memory import InstanceMemory
from mic_supervisor.plan.spec import SpecKey
from tests.unit.plan.builders import (
    CONTEXT,
    NOW,
    assessment,
    changed,
    container,
    desired,
    failing,
    gpu,
    gpus,
    known,
    knows,
    loaded,
    observed,
    on,
    passed,
    placement,
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
WHISPER = on("whisper", 0, workload=container("whisper:1", ports=(Port("http", 9000),)))


# --- strangers --------------------------------------------------------------------------------


def test_a_stranger_with_our_name_blocks_what_would_have_it() -> None:
    name = workload(MAM).name
    stranger = Stranger("docker", name, "c1", reason="it has no labels of ours")
    assert text(plan_for([MAM], observed(strangers=[stranger]))) == (
        f"! blocked  MAM-aaaaaaaa on GPU 0: the name {name} is taken by a workload that is not "
        "ours: it has no labels of ours\n"
        f"    hint: rename or remove it: docker rm {name}\n"
        "\n"
        f"warning: docker {name} looks like ours and is not: it has no labels of ours\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_a_stranger_with_our_name_in_another_runtime_is_not_in_the_way() -> None:
    stranger = Stranger("subprocess", workload(MAM).name, "r1", reason="it has no labels of ours")
    assert plan_for([MAM], observed(strangers=[stranger])).count == 1


def test_a_fixed_port_that_a_stranger_listens_on_blocks() -> None:
    plan = plan_for([WHISPER], observed(listeners=[Listener(9000, 77, "nginx")]))
    assert text(plan) == (
        "! blocked  whisper-aaaaaaaa on GPU 0: port 9000 is taken by nginx (PID 77), not ours\n"
        "    hint: free the port, or give whisper another one\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_a_fixed_port_that_a_strangers_container_publishes_blocks() -> None:
    jupyter = Stranger("docker", "jupyter", "c1", ports=(9000,))
    plan = plan_for([WHISPER], observed(strangers=[jupyter]))
    assert "port 9000 is taken by docker jupyter, not ours\n" in text(plan)
    asleep = replace(jupyter, running=False)
    assert plan_for([WHISPER], observed(strangers=[asleep])).blocked == ()


def test_a_fixed_port_of_a_predecessor_that_leaves_is_waited_for() -> None:
    old = workload(WHISPER)
    moved = on("whisper", 1, workload=WHISPER.workload)
    plan = plan_for([moved], observed(old, listeners=[Listener(9000, 78, "docker-proxy")]))
    assert text(plan) == (
        "- remove   whisper-aaaaaaaa  GPU 0  the file no longer names it\n"
        "+ create   whisper-bbbbbbbb  GPU 1  nothing runs for it yet\n"
        "\n"
        "Plan: 1 to create, 1 to remove.\n"
    )
    assert shortly(plan, old=old) == [
        "stop old <- create whisper-bbbbbbbb",
        "remove old <- stop old",
        "prepare whisper-bbbbbbbb",
        "create whisper-bbbbbbbb <- prepare whisper-bbbbbbbb",
        "start whisper-bbbbbbbb <- stop old, create whisper-bbbbbbbb",
    ]
    assert len({change.lane for change in plan.changes}) == 1


def test_two_that_swap_their_fixed_ports_wait_for_each_other() -> None:
    a, b = on("A", 0), on("B", 1)
    low, high = (Port("http", 9000),), (Port("http", 9001),)
    old_a, old_b = workload(changed(a, ports=low)), workload(changed(b, ports=high))
    plan = plan_for([changed(a, ports=high), changed(b, ports=low)], observed(old_a, old_b))
    lines = shortly(plan, a=old_a, b=old_b)
    assert "stop a <- create A-aaaaaaaa, create B-bbbbbbbb" in lines
    assert "release A-aaaaaaaa <- stop a, stop b, create A-aaaaaaaa" in lines
    assert "release B-bbbbbbbb <- stop a, stop b, create B-bbbbbbbb" in lines


def test_a_fixed_port_that_another_of_ours_goes_on_to_use_blocks() -> None:
    first = workload(MAM, ports={"http": 9000})
    wanted = on("whisper", 1, workload=WHISPER.workload)
    plan = plan_for([MAM, wanted], observed(first))
    assert text(plan) == (
        "! blocked  whisper-bbbbbbbb on GPU 1: port 9000 is taken by MAM-aaaaaaaa\n"
        "    hint: free the port, or give whisper another one\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    earlier = on("ALPHA", 1, workload=WHISPER.workload)
    assert text(plan_for([MAM, earlier], observed(first))) == (
        "! blocked  ALPHA-bbbbbbbb on GPU 1: "
        "port 9000 is still held by MAM-aaaaaaaa, which is to keep it\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_of_two_that_want_one_fixed_port_the_first_gets_it() -> None:
    other = on("whisper", 1, workload=WHISPER.workload)
    plan = plan_for([WHISPER, other], observed())
    assert [change.instance for change in plan.changes] == ["whisper-aaaaaaaa"]
    assert plan.blocked[0].reason == "port 9000 is taken by whisper-aaaaaaaa"


def test_a_port_range_without_a_free_port_blocks() -> None:
    small = replace(CONTEXT, port_range=(20000, 20000))
    assert text(plan_for([MAM, on("MAM", 1)], observed(), context=small)) == (
        "+ create   MAM-aaaaaaaa  GPU 0  nothing runs for it yet\n"
        "\n"
        "! blocked  MAM-bbbbbbbb on GPU 1: no port is free from 20000 to 20000\n"
        "    hint: widen MIC_PORT_RANGE\n"
        "\n"
        "Plan: 1 to create; 1 blocked.\n"
    )


def test_the_port_that_a_container_records_is_kept() -> None:
    was = workload(MAM, RunState.EXITED, ports={"http": 29999})
    assert shortly(plan_for([MAM], observed(was)), it=was)[-1] == (
        "restart it <- release MAM-aaaaaaaa"
    )


def test_a_recorded_port_that_a_stranger_took_is_replaced_and_the_container_with_it() -> None:
    was = workload(MAM, RunState.EXITED, ports={"http": 20003})
    plan = plan_for([MAM], observed(was, listeners=[Listener(20003, 5, "nginx")]))
    assert shortly(plan, it=was) == [
        "prepare MAM-aaaaaaaa",
        "create MAM-aaaaaaaa <- prepare MAM-aaaaaaaa",
        "release MAM-aaaaaaaa <- create MAM-aaaaaaaa",
        "start MAM-aaaaaaaa <- release MAM-aaaaaaaa",
        "remove it <- start MAM-aaaaaaaa",
    ]


def test_a_container_that_has_the_free_port_already_is_started_and_not_made_twice() -> None:
    newer = workload(MAM, RunState.EXITED, ports={"http": 20003}, created_at=200.0)
    older = workload(MAM, RunState.EXITED)
    plan = plan_for([MAM], observed(newer, older, listeners=[Listener(20003, 5, "nginx")]))
    assert shortly(plan, newer=newer, older=older)[-1] == "restart older <- release MAM-aaaaaaaa"


def test_a_replacement_keeps_the_port_of_what_it_replaces() -> None:
    old = workload(MAM, ports={"http": 20007})
    plan = plan_for([changed(MAM, image="mam:2")], observed(old))
    (start,) = (step for step in plan.changes[0].steps if step.id.startswith("start "))
    assert start.launch.identity.ports == {"http": 20007}  # type: ignore[attr-defined]


def test_a_foreign_process_on_the_gpu_blocks_and_holds_nobody_else_up() -> None:
    held = [gpu(0, processes=(process(4121),)), gpu(1)]
    assert text(plan_for([MAM, on("MAM", 1)], observed(gpus=held))) == (
        "+ create   MAM-bbbbbbbb  GPU 1  nothing runs for it yet\n"
        "\n"
        "! blocked  MAM-aaaaaaaa on GPU 0: GPU 0 is held by PID 4121 (python, 18.2 GiB), not ours\n"
        "    hint: end that process, or move the model to another GPU\n"
        "\n"
        "Plan: 1 to create; 1 blocked.\n"
    )


@pytest.mark.parametrize(
    "found",
    [
        process(4121, owner=Owner(OwnerKind.CONTAINER, "c1")),
        process(4121, owner=Owner(OwnerKind.UNKNOWN)),
        process(4121, owner=None),
        process(4121, owner=Owner(OwnerKind.MANAGED, "r", "MAM-ffffffff")),
        process(4121, kinds=()),
        process(4121, kinds=("graphics", "compute")),
        process(4121, kinds=("mps",)),
        process(4121, owner=Owner(OwnerKind.UNKNOWN), start_time=None),
    ],
    ids=lambda item: f"{item.owner.kind if item.owner else None}-{item.kinds}-{item.start_time}",
)
def test_what_else_counts_as_foreign(found: GpuProcess) -> None:
    plan = plan_for([MAM], observed(gpus=[gpu(0, processes=(found,))]))
    assert plan.count == 0
    assert plan.blocked[0].reason.startswith("GPU 0 is held by PID 4121 (python")


def test_a_foreign_process_does_not_block_where_it_is_to_be_ignored() -> None:
    held = [gpu(0, processes=(process(4121),))]
    assert plan_for([replace(MAM, on_foreign="ignore")], observed(gpus=held)).count == 1


def test_what_only_draws_does_not_block() -> None:
    held = [gpu(0, processes=(process(900, name="Xorg", kinds=("graphics",)),))]
    assert plan_for([MAM], observed(gpus=held)).blocked == ()


def test_a_process_that_has_ended_is_waited_for_and_not_taken_for_a_stranger() -> None:
    held = [gpu(0, processes=(process(4121, start_time=None),))]
    assert shortly(plan_for([MAM], observed(gpus=held))) == [
        "prepare MAM-aaaaaaaa",
        "create MAM-aaaaaaaa <- prepare MAM-aaaaaaaa",
        "release MAM-aaaaaaaa <- create MAM-aaaaaaaa",
        "start MAM-aaaaaaaa <- release MAM-aaaaaaaa",
    ]


def test_what_runs_is_not_stopped_because_a_stranger_came_to_its_gpu() -> None:
    held = [gpu(0, processes=(process(4121), process(4122, of=MAM)))]
    assert plan_for([MAM], observed(workload(MAM), gpus=held)).empty


def test_a_changed_specification_waits_while_a_stranger_is_on_the_gpu() -> None:
    held = [gpu(0, processes=(process(4121), process(4122, of=MAM)))]
    plan = plan_for([changed(MAM, image="mam:2")], observed(workload(MAM), gpus=held))
    assert plan.count == 0
    assert len(plan.blocked) == 1


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


def test_a_workload_whose_state_cannot_be_read_counts_as_holding_its_gpu() -> None:
    old = workload(on("face", 0), RunState.UNKNOWN)
    plan = plan_for([MAM], observed(old))
    assert "release MAM-aaaaaaaa <- stop old, create MAM-aaaaaaaa" in shortly(plan, old=old)


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
    inventory = replace(state.inventory, unopened=(UnopenedGpu(7, "GPU is lost"),))
    plan = plan_for([MAM], replace(state, inventory=inventory))
    assert text(plan) == "warning: GPU 7 cannot be opened: GPU is lost\n\nNo changes.\n"


def test_texts_that_refer_to_a_port_that_is_not_there_block_one_instance() -> None:
    odd = on("odd", 1, workload=container("odd:1", command=("--grpc", "${port:grpc}")))
    plan = plan_for([MAM, odd], observed())
    assert [change.instance for change in plan.changes] == ["MAM-aaaaaaaa"]
    assert plan.blocked[0].reason == "its texts refer to 'grpc', which it does not have"


# --- entries in trouble -----------------------------------------------------------------------


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
        "    hint: change the file, or: mic-supervisor retry\n"
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
        "    hint: change the file, or: mic-supervisor retry\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_a_good_one_that_fails_in_its_turn_is_started_with_patience() -> None:
    new = changed(MAM, image="mam:2")
    good = workload(MAM, RunState.EXITED, exit_code=139)
    entry = failed_once(failures=2, reason="it exited with 139 (SIGSEGV)", retry_at=NOW + 5)
    plan = plan_for([new], observed(good), knows(MAM_aaaaaaaa=entry))
    assert text(plan) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: the new specification failed (it exited with 1); "
        "the last good one runs; backoff: it exited with 139 (SIGSEGV); next try at 00:16:45\n"
        "    hint: change the file, or: mic-supervisor retry\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    assert plan.next_wake == NOW + 5
    assert plan_for([new], observed(good), knows(MAM_aaaaaaaa=entry), now=NOW + 5).count == 1


def test_a_rollback_does_not_start_beside_a_stranger() -> None:
    new, good = changed(MAM, image="mam:2"), workload(MAM, RunState.EXITED)
    held = [gpu(0, processes=(process(4121),))]
    plan = plan_for([new], observed(good, gpus=held), knows(MAM_aaaaaaaa=failed_once()))
    assert plan.count == 0
    assert [item.reason for item in plan.blocked] == [
        "the new specification failed (it exited with 1); the last good one runs; "
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
        "    hint: change the file, or: mic-supervisor retry\n"
        "! blocked  MAM-bbbbbbbb on GPU 1: "
        "the new specification failed on MAM-aaaaaaaa; the earlier one runs\n"
        "    hint: change the file, or: mic-supervisor retry\n"
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
    assert plan.changes[2].waits == "its turn: 2 instances of MAM at a time"


def test_what_is_down_does_not_wait_and_comes_before_those_that_serve() -> None:
    plan = plan_for(NEXT, observed(workload(TRIO[0]), workload(TRIO[1])))
    assert turns(plan) == [
        "replace MAM-aaaaaaaa later",
        "replace MAM-bbbbbbbb later",
        "create MAM-cccccccc",
    ]


def test_what_a_stranger_keeps_down_does_not_hold_up_the_others() -> None:
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
    assert plan.changes[1].waits == "qwen-ddddddddx2, whose turn comes later"
