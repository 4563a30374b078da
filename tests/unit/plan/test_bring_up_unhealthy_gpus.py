"""Whole plans on GPUs that are in trouble, and for containers that lost theirs."""

from __future__ import annotations

from dataclasses import replace

from mic_supervisor.gpu.events import (
    XID_COUNTS,
    RecoveryAction,
    XidRecord,
    XidSeverity,
    trouble_of,
    with_xids,
)
from mic_supervisor.model import (
    Gpu,
    GpuInventory,
    GpuTelemetry,
    Health,
    ObservedState,
    ProbeResult,
    RunState,
    UnopenedGpu,
)
from mic_supervisor.plan import ledger
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.memory import InstanceMemory
from mic_supervisor.views.status import gpu_rows
from tests.unit.plan.builders import (
    CONTEXT,
    NOW,
    changed,
    desired,
    failing,
    gpu,
    known,
    observed,
    on,
    passed,
    plan_for,
    shortly,
    text,
    uuid,
    workload,
)

MAM, WEB = on("MAM", 0), on("web", 1)
TROUBLE = "Xid 79; the driver asks for a reset of the GPU"
UNHEALTHY = (gpu(0, trouble=TROUBLE), gpu(1))
HINT = "    hint: stop what uses it, then: nvidia-smi --gpu-reset -i 0; or reboot\n"


def test_nothing_is_started_on_an_unhealthy_gpu_and_others_go_on() -> None:
    ended = workload(MAM, RunState.EXITED)
    for state in (observed(gpus=UNHEALTHY), observed(ended, gpus=UNHEALTHY)):
        assert text(plan_for([MAM, WEB], state)) == (
            "+ create   web-bbbbbbbb  GPU 1  nothing runs for it yet\n"
            "\n"
            f"! blocked  MAM-aaaaaaaa on GPU 0: GPU 0 is unhealthy: {TROUBLE}\n"
            f"{HINT}"
            "\n"
            f"warning: GPU 0 is unhealthy: {TROUBLE}\n"
            "\n"
            "Plan: 1 to create; 1 blocked.\n"
        )


def test_what_runs_well_on_it_is_left_alone_and_what_does_not_is_not_restarted() -> None:
    it = workload(MAM)
    assert plan_for([MAM], observed(it, gpus=UNHEALTHY)).empty
    sick = observed(it, gpus=UNHEALTHY, health={it.ref: failing("liveness")})
    plan = plan_for([MAM], sick)
    assert (plan.count, plan.blocked[0].reason) == (0, f"GPU 0 is unhealthy: {TROUBLE}")
    well = observed(it, health={it.ref: failing("liveness")})
    assert [change.kind for change in plan_for([MAM], well).changes] == ["restart"]


def test_what_runs_is_not_replaced_on_it() -> None:
    plan = plan_for([changed(MAM, image="mam:2")], observed(workload(MAM), gpus=UNHEALTHY))
    assert plan.count == 0
    assert plan.blocked[0].reason == f"GPU 0 is unhealthy: {TROUBLE}"


def test_an_end_on_it_is_not_counted_then_or_later() -> None:
    ended = workload(MAM, RunState.EXITED)
    assessments = assess(desired(MAM), observed(ended), CONTEXT)
    memory = known(ended)
    quiet = ledger.observed(memory, assessments, NOW, jitter=0.0, unhealthy_gpus={uuid(0)})
    assert quiet.of(MAM.id).failures == 0
    later = ledger.observed(quiet, assessments, NOW + 60, jitter=0.0)
    assert later.of(MAM.id).failures == 0
    counted = ledger.observed(memory, assessments, NOW, jitter=0.0, unhealthy_gpus={uuid(1)})
    assert counted.of(MAM.id).failures == 1


def test_a_rollback_waits_for_the_gpu_too() -> None:
    old, new = workload(MAM, RunState.EXITED), changed(MAM, image="mam:2")
    failed = workload(new, RunState.EXITED)
    state = observed(old, failed, gpus=UNHEALTHY)
    (item,) = assess(desired(new), state, CONTEXT)
    entry = InstanceMemory(
        failed=item.hash, failed_reason="it exited with 1", ready="x", ready_workload=old.name
    )
    memory = replace(known(), instances={MAM.id: entry})
    plan = plan_for([new], state, memory)
    assert (plan.count, plan.blocked[0].reason) == (0, f"GPU 0 is unhealthy: {TROUBLE}")
    assert plan_for([new], observed(old, failed), memory).count == 1


def test_its_state_says_so_wherever_it_stands_in_the_file() -> None:
    gpus = (*UNHEALTHY, gpu(2, trouble="x"), gpu(3))
    state = observed(workload(MAM), gpus=gpus)
    rows = gpu_rows(desired(MAM, kept_empty=(uuid(3),)), state)
    assert [(row.state, row.trouble) for row in rows] == [
        ("unhealthy", TROUBLE),
        ("idle", None),
        ("unhealthy", "x"),
        ("kept_empty", None),
    ]
    assert plan_for(desired(MAM), state).warnings == (f"GPU 0 is unhealthy: {TROUBLE}",)


def test_memory_errors_are_reported_and_decide_nothing() -> None:
    odd = gpu(0, telemetry=GpuTelemetry(ecc_errors=(("uncorrected", 2),)))
    plan = plan_for([MAM], observed(workload(MAM), gpus=[odd]))
    assert plan.warnings == (
        "GPU 0 has had 2 uncorrected memory errors since the driver was loaded",
    )
    assert plan.empty


# --- what makes a GPU unhealthy
# --------------------------------------------------------------------


def record(xid: int, at: float = NOW, **values: object) -> XidRecord:
    fields = {"severity": XidSeverity.CRITICAL, "action": None, **values}
    return XidRecord(uuid(0), xid, 1, at, **fields)  # type: ignore[arg-type]


def troubled(item: Gpu, *records: XidRecord, now: float = NOW) -> str | None:
    return with_xids(GpuInventory("nvml", (item,)), records, now).gpus[0].trouble


def test_the_drivers_word_counts_most() -> None:
    assert trouble_of(None, False) is None
    assert trouble_of(RecoveryAction.NONE, False) is None
    assert trouble_of(RecoveryAction.REBOOT, True) == (
        "the driver asks for a reboot; a row of its memory could not be replaced, and the card is "
        "to be"
    )
    sick = gpu(0, trouble="the driver asks for a reset of the GPU", recovery_action="reset")
    assert troubled(sick, record(31, severity=XidSeverity.APP)) == sick.trouble
    assert troubled(sick, record(62, NOW - 9), record(79)) == TROUBLE
    assert troubled(gpu(0, recovery_action="none"), record(79)) is None


def test_where_the_driver_does_not_say_a_critical_xid_counts_for_a_while() -> None:
    assert troubled(gpu(0), record(79)) == "Xid 79; the driver does not say what it needs"
    assert troubled(gpu(0), record(79), now=NOW + XID_COUNTS) is None
    assert troubled(gpu(1), record(79)) is None
    assert troubled(gpu(0), record(13, severity=XidSeverity.APP)) is None


def test_a_gpu_that_fell_off_the_bus_tells_why_its_entry_is_blocked() -> None:
    from mic_supervisor.config.document import GpuEntry, GpuKey, Location
    from mic_supervisor.desired.bind import bind

    error = ("cannot read it: the GPU fell off the bus", "reboot")
    inventory = GpuInventory("nvml", (gpu(1),), unopened=(UnopenedGpu(0, *error, uuid(0)),))
    for key in (GpuKey("index", "0"), GpuKey("uuid", uuid(0))):
        entry = GpuEntry((key,), "MAM", Location("f", 1, 1))
        (lost,) = bind([entry], inventory, {"0": uuid(0)}).unsatisfiable
        assert (lost.reason, lost.instances) == ("; ".join(error), ("MAM-aaaaaaaa",))


# --- containers that lost their GPUs ----------------------------------------------------------


def blind(ref: str, failures: int = 2, ok: bool | None = False) -> dict[str, Health]:
    said = "nvidia-smi says there: Failed to initialize NVML: Unknown Error"
    return {ref: replace(passed(), devices=ProbeResult(ok, said, NOW, failures))}


def state_of(*gpus: Gpu, **values: object) -> ObservedState:
    it = workload(MAM)
    return observed(it, gpus=gpus or None, health=blind(it.ref, **values))  # type: ignore[arg-type]


def test_a_container_that_lost_its_gpu_is_made_anew() -> None:
    plan = plan_for([MAM], state_of())
    assert text(plan) == (
        "~ replace  MAM-aaaaaaaa  GPU 0  it lost its GPU inside the container, as a systemd "
        "daemon-reload does in legacy mode: nvidia-smi says there: Failed to initialize NVML: "
        "Unknown Error\n"
        "    removes mic-test-MAM-aaaaaaaa-5ef7f6c7\n"
        "\n"
        "Plan: 1 to replace.\n"
    )
    assert shortly(plan) == [
        "prepare MAM-aaaaaaaa",
        "stop MAM-aaaaaaaa <- prepare MAM-aaaaaaaa",
        "release MAM-aaaaaaaa <- stop MAM-aaaaaaaa, prepare MAM-aaaaaaaa",
        "remove MAM-aaaaaaaa <- release MAM-aaaaaaaa",
        "create MAM-aaaaaaaa <- remove MAM-aaaaaaaa",
        "start MAM-aaaaaaaa <- create MAM-aaaaaaaa",
    ]


def test_once_or_unknown_is_not_enough_and_nor_is_a_gpu_that_is_unhealthy_itself() -> None:
    assert plan_for([MAM], state_of(failures=1)).empty
    assert plan_for([MAM], state_of(ok=None)).empty
    assert plan_for([MAM], state_of(*UNHEALTHY)).empty


def test_it_is_no_failure_of_the_model() -> None:
    assessments = assess(desired(MAM), state_of(), CONTEXT)
    memory = ledger.observed(known(workload(MAM)), assessments, NOW, jitter=0.0)
    assert memory.of(MAM.id).failures == 0
