"""Whole plans where a stranger stands in the way: on ports, names and GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor.model import (
    ForeignWorkload,
    Gpu,
    GpuMemory,
    GpuProcess,
    Limits,
    Listener,
    Near,
    ObservedState,
    ObservedWorkload,
    Owner,
    OwnerKind,
    Port,
    RunState,
)
from mic_supervisor.plan.actions import Create, Plan
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.obstacles import foreign_processes
from mic_supervisor.plan.spec import normalise
from mic_supervisor.plan.status import converged, instance_statuses
from mic_supervisor.plan.words import moment
from tests.unit.plan.builders import (
    CONTEXT,
    MAM,
    NOW,
    changed,
    container,
    desired,
    gpu,
    known,
    observed,
    on,
    plan_for,
    process,
    shortly,
    text,
    workload,
)

WHISPER = on("whisper", 0, workload=container("whisper:1", ports=(Port("http", 9000),)))


# --- an engine that ignores requests for GPUs -----------------------------------------------------


def test_what_asks_for_a_gpu_is_blocked_where_the_engine_ignores_that() -> None:
    asks = replace(MAM, workload=container(devices=MAM.gpus))
    simulated = on("face", 1)  # asks for no device
    state = observed(gpus=[gpu(0), gpu(1)])
    views = tuple(
        replace(view, ignores_gpus="Podman 4.3.1") if view.runtime == "docker" else view
        for view in state.runtimes
    )
    plan = plan_for([asks, simulated], replace(state, runtimes=views))
    (blocked,) = plan.blocked
    assert blocked.instance == MAM.id
    assert blocked.reason == "Podman 4.3.1 takes a request for a GPU and ignores it"
    assert str(blocked.hint).startswith("install Docker Engine, and have MIC_DOCKER_HOST name")
    assert [change.instance for change in plan.changes] == [simulated.id]


# --- slices of a GPU that has MIG on --------------------------------------------------------------


def test_a_foreign_process_on_one_slice_is_not_in_the_way_on_another() -> None:
    first, second = (f"MIG-{digit * 8}-0000-5000-8000-000000000000" for digit in "12")
    whole = gpu(0, mig=True)
    gpus = (
        whole,
        gpu(0, uuid=first, parent=whole.uuid, processes=(process(4121),)),
        gpu(0, uuid=second, parent=whole.uuid),
    )
    on_slices = [
        replace(MAM, id="MAM-11111111", gpus=(first,)),
        replace(WHISPER, id="whisper-22222222", gpus=(second,)),
    ]
    plan = plan_for(on_slices, observed(gpus=gpus))
    (blocked,) = plan.blocked
    assert blocked.instance == "MAM-11111111"
    assert blocked.reason.startswith(
        f"GPU {first} is held by PID 4121 (python, 18.2 GiB), not ours"
    )
    assert [change.instance for change in plan.changes] == ["whisper-22222222"]


# --- foreign ----------------------------------------------------------------------------------


def test_a_copy_of_ours_is_named_whatever_its_name_is_and_blocks_nothing() -> None:
    copy = ForeignWorkload("docker", "jupyter", "c1", reason="it is a copy", claims=MAM.id)
    mine = workload(MAM)
    assert text(plan_for([MAM], observed(mine, foreign_workloads=[copy]), known(mine))) == (
        "warning: docker jupyter looks like ours and is not: it is a copy\n\nNo changes.\n"
    )


def test_a_foreign_workload_with_our_name_blocks_what_would_have_it() -> None:
    name = workload(MAM).name
    foreign = ForeignWorkload("docker", name, "c1", reason="it has no labels of ours")
    assert text(plan_for([MAM], observed(foreign_workloads=[foreign]))) == (
        f"! blocked  MAM-aaaaaaaa on GPU 0: the name {name} is taken by a workload that is not "
        "ours: it has no labels of ours\n"
        f"    hint: rename or remove it: docker rm {name}\n"
        "\n"
        f"warning: docker {name} looks like ours and is not: it has no labels of ours\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


def test_a_foreign_workload_with_our_name_in_another_runtime_is_not_in_the_way() -> None:
    foreign = ForeignWorkload(
        "subprocess", workload(MAM).name, "r1", reason="it has no labels of ours"
    )
    assert plan_for([MAM], observed(foreign_workloads=[foreign])).count == 1


def test_a_fixed_port_that_a_foreign_process_listens_on_blocks() -> None:
    plan = plan_for([WHISPER], observed(listeners=[Listener(9000, 77, "nginx")]))
    assert text(plan) == (
        "! blocked  whisper-aaaaaaaa on GPU 0: port 9000 is taken by nginx (PID 77), not ours\n"
        "    hint: free the port, or give whisper another one\n"
        "\n"
        "No changes; 1 blocked.\n"
    )


@pytest.mark.parametrize(
    ("listen", "at", "blocks"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.5", False),
        ("127.0.0.1", "192.0.2.7", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "::", True),
        ("127.0.0.1", "::1", False),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("0.0.0.0", "127.0.0.5", True),
        ("0.0.0.0", "::1", False),
        ("::", "127.0.0.5", True),
        ("::1", "0.0.0.0", False),
        ("::1", "::1", True),
    ],
)
def test_a_port_is_taken_where_the_addresses_meet(listen: str, at: str, blocks: bool) -> None:
    wanted = replace(WHISPER, workload=replace(WHISPER.workload, listen=listen))
    state = observed(listeners=[Listener(9000, 77, "nginx", frozenset({at}))])
    assert bool(plan_for([wanted], state).blocked) is blocks
    both = observed(listeners=[Listener(9000, 77, "nginx", frozenset({at, "0.0.0.0"}))])
    assert bool(plan_for([wanted], both).blocked) is (blocks or ":" not in listen)


def test_the_name_of_a_foreign_process_is_shown_so_that_no_terminal_obeys_it() -> None:
    hostile = "\x1b[2J\u202eevil"
    state = observed(
        gpus=[gpu(0, processes=(process(77, name=hostile),))],
        listeners=[Listener(9000, 78, hostile)],
    )
    for wanted in (WHISPER, MAM):
        reason = plan_for([wanted], state).blocked[0].reason
        assert "evil" in reason and reason.isprintable()


def test_a_fixed_port_that_a_foreign_container_publishes_blocks() -> None:
    jupyter = ForeignWorkload("docker", "jupyter", "c1", ports=(9000,))
    plan = plan_for([WHISPER], observed(foreign_workloads=[jupyter]))
    assert "port 9000 is taken by docker jupyter, not ours\n" in text(plan)
    asleep = replace(jupyter, running=False)
    assert plan_for([WHISPER], observed(foreign_workloads=[asleep])).blocked == ()


def test_a_fixed_port_of_a_predecessor_that_leaves_is_waited_for() -> None:
    old = workload(WHISPER)
    moved = on("whisper", 1, workload=WHISPER.workload)
    plan = plan_for([moved], observed(old, listeners=[Listener(9000, 78, "docker-proxy")]))
    assert text(plan) == (
        "- remove   whisper-aaaaaaaa  GPU 0  the file no longer names it\n"
        "    removes mic-test-whisper-aaaaaaaa-598dbd60\n"
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
        "port 9000 is still held by MAM-aaaaaaaa, which keeps it\n"
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


def test_a_recorded_port_that_a_foreign_process_took_is_replaced_and_the_container_with_it() -> (
    None
):
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


def test_an_mps_server_blocks_unless_it_serves_the_instance_there() -> None:
    def seen(instance: str | None, *running: ObservedWorkload) -> ObservedState:
        owner = Owner(OwnerKind.UNIT, "nvidia-mps.service", instance)
        server = process(4121, name="nvidia-cuda-mps", owner=owner)
        return observed(*running, gpus=[gpu(0, processes=(server,))])

    assert plan_for([MAM], seen(MAM.id)).count == 1
    assert plan_for([MAM], seen(None)).blocked[0].reason.endswith(": unit nvidia-mps.service")
    assert plan_for([MAM], seen("other-1")).count == 0
    assert foreign_processes(desired(MAM), seen(MAM.id, workload(MAM))) == ()
    assert len(foreign_processes(desired(MAM), seen(None, workload(MAM)))) == 1


def test_a_foreign_process_does_not_block_where_it_is_to_be_ignored() -> None:
    held = [gpu(0, processes=(process(4121),))]
    assert plan_for([replace(MAM, on_foreign="ignore")], observed(gpus=held)).count == 1


def test_what_only_draws_blocks_from_a_threshold_on() -> None:
    def plan(used: int | None, **values: Any) -> Plan:
        desktop = replace(process(900, name="Xorg", kinds=("graphics",)), used_memory=used)
        return plan_for([replace(MAM, **values)], observed(gpus=[gpu(0, processes=(desktop,))]))

    assert plan(None).blocked == ()
    assert plan((512 << 20) - 1).blocked == ()
    assert plan(512 << 20).blocked[0].reason == (
        "GPU 0 is held by PID 900 (Xorg, 512 MiB), not ours"
    )
    assert plan(512 << 20, foreign_threshold=1 << 30).blocked == ()
    assert plan(1 << 20, foreign_threshold=0).blocked != ()


def test_it_says_whose_the_foreign_process_is_and_since_when() -> None:
    jupyter = ForeignWorkload("docker", "jupyter", "c" * 64)
    for owner, text_of in (
        (Owner(OwnerKind.CONTAINER, "c" * 64), "container jupyter"),
        (Owner(OwnerKind.CONTAINER, "d" * 64), "container dddddddddddd"),
        (Owner(OwnerKind.UNIT, "whisper.service"), "unit whisper.service"),
    ):
        found = process(4121, owner=owner, started_at=NOW - 60)
        plan = plan_for(
            [MAM], observed(gpus=[gpu(0, processes=(found,))], foreign_workloads=[jupyter])
        )
        since = moment(NOW - 60, NOW)
        assert plan.blocked[0].reason == (
            f"GPU 0 is held by PID 4121 (python, 18.2 GiB), not ours: {text_of}, since {since}"
        )


def test_one_that_is_told_to_wait_queues() -> None:
    held = observed(gpus=[gpu(0, processes=(process(4121),))])
    waits = replace(MAM, on_foreign="wait")
    plan = plan_for([waits], held)
    assert [(item.queued, item.reason) for item in plan.blocked] == [
        (True, "waiting for the GPU: GPU 0 is held by PID 4121 (python, 18.2 GiB), not ours")
    ]
    state = desired(waits)
    assessments = assess(state, held, CONTEXT)
    (row,) = instance_statuses(state, held, assessments, plan, Memory(), {})
    assert (row.phase, row.health) == (Phase.WAITING_VRAM, "progressing")
    args: dict[str, Any] = {"began": NOW}
    assert not converged(state, plan, [row], Memory(), now=NOW + 299, **args)
    assert converged(state, plan, [row], Memory(), now=NOW + 310, **args)  # its start_timeout


def test_a_card_that_is_too_small_blocks_before_anything_is_stopped() -> None:
    small = [gpu(0, memory=GpuMemory(16 << 30, 0, 16 << 30), name="T4")]
    old = workload(MAM)
    needy = replace(changed(MAM, image="mam:2"), vram=20 << 30)
    plan = plan_for([needy], observed(old, gpus=small))
    assert text(plan) == (
        "! blocked  MAM-aaaaaaaa on GPU 0: it needs 20.0 GiB, and GPU 0 (T4) has 16.0 GiB\n"
        "    hint: give it a larger GPU, or correct `vram` of MAM\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    assert plan_for([replace(needy, vram=16 << 30)], observed(old, gpus=small)).count == 1
    unknown = [gpu(0, memory=None)]
    assert plan_for([needy], observed(old, gpus=unknown)).count == 1


def test_a_gpu_that_foreign_processes_leave_too_little_of_blocks_even_where_they_are_ignored() -> (
    None
):
    held = [gpu(0, processes=(process(4121),))]
    needy = replace(MAM, vram=10 << 30, on_foreign="ignore")
    assert plan_for([needy], observed(gpus=held)).blocked[0].reason == (
        "it needs 10.0 GiB, and GPU 0 (H200) has 5.8 GiB beside PID 4121 (python, 18.2 GiB), "
        "not ours"
    )
    assert plan_for([replace(needy, vram=5 << 30)], observed(gpus=held)).count == 1


def test_a_foreign_process_that_comes_later_is_reported_and_disturbs_nothing() -> None:
    held = [gpu(0, processes=(process(4121), process(4122, of=MAM)))]
    plan = plan_for([MAM], observed(workload(MAM), gpus=held))
    assert text(plan) == (
        "warning: GPU 0 is for MAM-aaaaaaaa alone, and PID 4121 (python, 18.2 GiB) is on it as "
        "well\n"
        "\n"
        "No changes.\n"
    )
    # While Docker cannot be read it may be Docker's own, and while it starts, its newest process.
    state = observed(workload(MAM), gpus=held, errors={"subprocess": "gone"})
    assert foreign_processes(desired(MAM), state) == ()
    state = observed(workload(MAM), gpus=held)
    assert foreign_processes(desired(MAM), state, busy={MAM.id}) == ()
    assert [one.process.pid for one in foreign_processes(desired(MAM), state)] == [4121]


def test_a_process_that_has_ended_is_waited_for_and_not_taken_for_a_foreign_one() -> None:
    held = [gpu(0, processes=(process(4121, start_time=None),))]
    assert shortly(plan_for([MAM], observed(gpus=held))) == [
        "prepare MAM-aaaaaaaa",
        "create MAM-aaaaaaaa <- prepare MAM-aaaaaaaa",
        "release MAM-aaaaaaaa <- create MAM-aaaaaaaa",
        "start MAM-aaaaaaaa <- release MAM-aaaaaaaa",
    ]


def test_what_runs_is_not_stopped_because_a_foreign_process_came_to_its_gpu() -> None:
    held = [gpu(0, processes=(process(4121), process(4122, of=MAM)))]
    assert plan_for([MAM], observed(workload(MAM), gpus=held)).empty


def test_a_changed_specification_waits_while_a_foreign_process_is_on_the_gpu() -> None:
    held = [gpu(0, processes=(process(4121), process(4122, of=MAM)))]
    plan = plan_for([changed(MAM, image="mam:2")], observed(workload(MAM), gpus=held))
    assert plan.count == 0
    assert len(plan.blocked) == 1


# --- next to its GPUs ---------------------------------------------------------------------------

CLOSE = on("MAM", 0, 1, workload=container(limits=Limits(numa="near")))


def launched(*gpus: Gpu) -> Near | None:
    (change,) = plan_for([CLOSE], observed(gpus=gpus)).changes
    return next(step.launch.near for step in change.steps if isinstance(step, Create))


def test_it_is_confined_to_what_is_next_to_any_of_its_gpus() -> None:
    one, other = Near((0, 1), (0,)), Near((8, 1), (1,))
    assert launched(gpu(0, near=one), gpu(1, near=other)) == Near((0, 1, 8), (0, 1))
    assert launched(gpu(0, near=one), gpu(1, near=Near((8,)))) == Near((0, 1, 8))


def test_where_nobody_says_what_is_next_to_a_gpu_it_is_confined_to_nothing() -> None:
    near = Near((0,), (0,))
    some = gpu(0, near=near), gpu(1)
    assert launched(*some) is None
    warning = "limits.numa has no effect: the driver does not say which CPUs are next to its GPUs"
    assert plan_for([CLOSE], observed(gpus=some)).warnings == (f"{CLOSE.id}: {warning}",)
    both = gpu(0, near=near), gpu(1, near=near)
    assert plan_for([CLOSE], observed(gpus=both)).warnings == ()
    plain = on("MAM", 0, 1)
    (change,) = plan_for([plain], observed(gpus=both)).changes
    assert [step.launch.near for step in change.steps if isinstance(step, Create)] == [None]


def test_only_who_asks_for_it_has_another_specification() -> None:
    plain = on("MAM", 0, 1)
    assert "limits" not in normalise(plain.workload, CONTEXT.key)
    assert normalise(CLOSE.workload, CONTEXT.key)["limits"] == {"numa": "near"}
    mine = workload(plain)
    assert 'limits.numa: null -> "near"' in text(plan_for([CLOSE], observed(mine)))
