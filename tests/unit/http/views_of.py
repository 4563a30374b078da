"""Published views for tests, made by the real planner from states that the planner's builders make.

`good()` is a machine as it should be, `bad()` one on which much is wrong at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from mic_supervisor.converge.events import Event
from mic_supervisor.converge.hooks import HookState
from mic_supervisor.converge.snapshot import ConfigState, Snapshot
from mic_supervisor.http.access import Scrubber
from mic_supervisor.http.documents import LoopState, Published
from mic_supervisor.http.views import Views
from mic_supervisor.model import (
    Claim,
    DesiredState,
    FleetEntry,
    Gpu,
    GpuMemory,
    GpuProcess,
    GpuTelemetry,
    Hook,
    ObservedState,
    Owner,
    OwnerKind,
    Port,
    RunState,
    UnopenedGpu,
)
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.reconcile import reconcile
from mic_supervisor.plan.status import instance_statuses
from mic_supervisor.views.endpoints import serving
from tests.unit.plan import builders as b

NOW = 1_795_300_000.0  # a Sunday in November 2026
GIB = 1 << 30
PORTS = (Port("http"), Port("metrics"))

NO_ENGINE = "cannot connect to the Docker Engine at unix:///var/run/docker.sock"
SAYS_WHY = "is not valid; `mic-supervisor check` says why"
REPORT = f"""\
/etc/mic/gpus.yaml:12:5: error: models.whisper.backend: {SAYS_WHY}
/etc/mic/gpus.yaml:19:11: error: models.whisper.env.API_KEY: {SAYS_WHY}
"""


WAITS = "/etc/mic/gpus.yaml is not applied yet (MIC_WATCH=plan)"
SECRET = "s3cret-of-the-file"  # in a file that waits


def gpu(index: int, used: float | None = 0.0, **values: Any) -> Gpu:
    """`used` in GiB; everything that NVML measures is there unless told otherwise."""
    total = 80 * GIB
    taken = None if used is None else int(used * GIB)
    given: dict[str, Any] = {
        "memory": GpuMemory(total, taken, None if taken is None else total - taken, 300 << 20),
        "power_draw": 71.3 + index,
        "power_limit": 700.0,
        "utilization": 0.37,
        "temperature": 36.0 + index,
        "pci_bus_id": f"00000000:{0x3B + index:02X}:00.0",
        "telemetry": GpuTelemetry(
            energy=123456.789,
            clocks=(("sm", 1.98e9), ("memory", 3.2e9)),
            clock_events=(("sw_power_cap", True), ("hw_slowdown", False)),
            ecc_errors=(("corrected", 3), ("uncorrected", 0)),
        ),
    }
    return b.gpu(index, name="NVIDIA H200", **{**given, **values})


def holder(pid: int, used: float, instance: str | None = None, **values: Any) -> GpuProcess:
    values.setdefault(
        "owner",
        Owner(OwnerKind.MANAGED, "ref", instance)
        if instance is not None
        else Owner(OwnerKind.ORPHAN),
    )
    return GpuProcess(pid, values.pop("name", "python"), int(used * GIB), start_time=77, **values)


def snapshot(
    desired: DesiredState, observed: ObservedState, memory: Memory | None = None, at: float = NOW
) -> Snapshot:
    """What a round makes of these states."""
    context = b.CONTEXT
    memory = Memory() if memory is None else memory
    observed = replace(observed, at=at)
    assessments = tuple(assess(desired, observed, context))
    plan = reconcile(desired, observed, memory, at, context, assessments)
    return Snapshot(
        now=at,
        offset=0.0,
        desired=desired,
        observed=observed,
        context=context,
        before=memory,
        assessments=assessments,
        memory=memory,
        plan=plan,
        statuses=instance_statuses(desired, observed, assessments, plan, memory, {}),
        busy=frozenset(),
        round=7,
        seconds=0.012,
    )


def published(found: Snapshot | None, **values: Any) -> Published:
    config: dict[str, Any] = {
        "path": "/etc/mic/gpus.yaml",
        "hash": "f00d" * 16,
        "generation": 5,
        "loaded_at": NOW - 7200,
        "last_reload_ok": True,
        "error": None,
        "error_at": None,
        "models": {"MAM": "triton", "qwen": "vllm", "whisper": "process"},
        **values.pop("config", {}),
    }
    loop = LoopState(rounds=7, errors=1, last_duration=0.012, last_success_at=NOW)
    return Published(
        scrubber=Scrubber() if found is None else Scrubber().including(found.desired),
        host="gpu-01.example",
        version="0.1.0",
        config=ConfigState(**config),
        loop=values.pop("loop", loop),
        snapshot=found,
        **values,
    )


def remembered(*ids: str, phase: str = "ready", since: float = NOW - 3600, **values: Any) -> Memory:
    entries = {
        name: InstanceMemory(
            phase=phase, since=since, started_at=since, ready_since=since, **values
        )
        for name in ids
    }
    return Memory(instances=entries)


def good(**values: Any) -> Published:
    """Two models on three GPUs, a fourth GPU kept empty, a fifth left alone."""
    mam = b.on("MAM", 0, backend="triton", workload=b.container(ports=PORTS))
    qwen = b.on("qwen", 1, 2, backend="vllm")
    work = [
        b.workload(mam, ports={"http": 20000, "metrics": 20002}, pid=4121, started_at=NOW - 3600),
        b.workload(qwen, ports={"http": 20001}, pid=4122, started_at=NOW - 3600),
    ]
    observed = b.observed(
        *work,
        gpus=(
            gpu(0, 18.2, processes=(holder(4121, 18.2, mam.id),)),
            gpu(1, 70.1, processes=(holder(4122, 70.1, qwen.id),)),
            gpu(2, 69.9, processes=(holder(4122, 69.9, qwen.id),)),
            gpu(3),
            gpu(4),
        ),
    )
    observed = replace(
        observed,
        inventory=replace(observed.inventory, driver="575.57.08", nvml="12.575.57.08", cuda="12.9"),
    )
    hook = Hook(("/etc/mic/endpoints-changed",))
    desired = b.desired(mam, qwen, kept_empty=(b.uuid(3),), config_hash="f00d" * 16, hook=hook)
    found = snapshot(desired, observed, remembered(mam.id, qwen.id))
    found = replace(
        found,
        hook=HookState(runs=3, failures=1, last_success_at=NOW - 60),
        endpoints=serving(found.statuses, (), {}),
    )
    values.setdefault("history", (event("phase", mam.id, phase="ready", was="starting"),))
    return published(found, **values)


def waiting() -> Published:
    """As `good`, and the file as it is now waits: without qwen, with embed, and MAM is changed."""
    found = good(config={"unconfirmed": WAITS})
    assert found.snapshot is not None
    desired = found.snapshot.desired
    (mam,) = (one for one in desired.instances if one.model == "MAM")
    changed, new = b.changed(mam, command=("serve", SECRET)), b.on("embed", 3)
    other = b.desired(changed, new, config_hash="beef" * 16)
    snapshot = replace(found.snapshot, desired=replace(desired, waiting=other))
    scrubber = found.scrubber.including(snapshot.desired)
    return replace(found, snapshot=snapshot, scrubber=scrubber)


def claimed() -> Published:
    """Four GPUs handed over: one claim is ready, one vanished, one waits, and two GPUs are free."""
    mam = replace(b.on("MAM", 0, backend="triton"), origin="claim")
    qwen = replace(b.on("qwen", 1), origin="claim")
    entries = tuple(FleetEntry((b.uuid(n),), (f"{n}" * 8,), 1) for n in range(4))
    has = Claim("1", "MAM", 1, NOW - 900, by="alice", got_at=NOW - 600)
    claims = (
        replace(has, holder="task 3", gpus=mam.gpus, instance=mam.id),
        replace(
            has,
            token="2",
            model="qwen",
            gpus=qwen.gpus,
            instance=qwen.id,
            vanished_at=NOW - 20,
        ),
        Claim("3", "whisper", 1, NOW - 60, by="bob", holder="<b>"),
    )
    observed = b.observed(
        b.workload(mam, pid=4121), b.workload(qwen, pid=4122), gpus=tuple(map(gpu, range(4)))
    )
    desired = b.desired(
        mam,
        qwen,
        kept_empty=(b.uuid(2), b.uuid(3)),
        fleet=entries,
        claimable=frozenset({"MAM", "qwen", "whisper"}),
        claims=claims,
        claim_grace=120,
        config_hash="f00d",
    )
    return published(snapshot(desired, observed, remembered(mam.id, qwen.id)))


def bad(*, engine_gone: bool = False, **values: Any) -> Published:
    """A crash loop, a start, foreign processes, a GPU gone, a broken file; maybe no engine."""
    mam = b.on("MAM", 0, backend="triton", workload=b.program())
    slow = b.on("slow", 1, backend="vllm", workload=b.program())
    wants = b.on("whisper", 2, backend="process", workload=b.program())
    ended = b.workload(mam, RunState.EXITED, finished_at=NOW - 30)
    starting = b.workload(slow, pid=5001, started_at=NOW - 42)
    observed = b.observed(
        ended,
        starting,
        gpus=(
            gpu(0),
            gpu(1, 3.1, processes=(holder(5001, 3.1, slow.id),)),
            gpu(2, 18.2, processes=(holder(4121, 18.2),)),
            gpu(3, 1.0, processes=(foreign(999),)),
            gpu(4, None, processes=None, power_draw=None, temperature=None, utilization=None),
        ),
        errors={"docker": NO_ENGINE} if engine_gone else {},
        health={starting.ref: b.failing("startup", 1)},
    )
    observed = replace(
        observed,
        inventory=replace(
            observed.inventory,
            unopened=(UnopenedGpu(6, "cannot open it: the GPU fell off the bus", "then reboot"),),
        ),
    )
    desired = b.desired(
        mam,
        slow,
        wants,
        kept_empty=(b.uuid(3),),
        unsatisfiable=(b.trouble("GPU 5", "GPU 5 is not there", 5, model="embed"),),
        config_hash="f00d" * 16,
    )
    memory = remembered(mam.id, phase="backoff", since=NOW - 90)
    entry = replace(
        memory.of(mam.id),
        failures=4,
        reason="it exited with 1",
        retry_at=NOW + 25,
        restarts=4,
        started=ended.name,
    )
    memory = memory.with_instance(mam.id, entry)
    memory = memory.with_instance(
        slow.id,
        InstanceMemory(
            phase="starting", since=NOW - 42, started=starting.name, started_at=NOW - 42
        ),
    )
    values.setdefault("config", {"last_reload_ok": False, "error": REPORT, "error_at": NOW - 600})
    values.setdefault(
        "history",
        (
            event("failed", mam.id, phase="start", text="it exited with 1"),
            event("phase", mam.id, phase="backoff", was="starting"),
            event("config", "configuration", text="rejected (the file changed)"),
        ),
    )
    return published(snapshot(desired, observed, memory), **values)


def foreign(pid: int) -> GpuProcess:
    return holder(
        pid, 1.0, name="blender", owner=Owner(OwnerKind.CONTAINER, "c0ffee" * 10 + "c0ff")
    )


def event(kind: Any, instance: str, **values: Any) -> Event:
    values.setdefault("text", "")
    return Event(kind, NOW - 60, instance, **values)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def views(
    *shown: Published, stall_after: float = 60.0, clock: Callable[[], float] | None = None
) -> Views:
    """Views over the last of these, each of which was looked at in turn."""
    box = [shown[0]]
    made = Views(lambda: box[0], stall_after=stall_after, clock=clock or Clock(), wall=lambda: NOW)
    for item in shown:
        box[0] = item
        made.current()
    return made


def measured(count: int = 40) -> Iterable[Published]:
    """The good machine as it was in the last minutes: what the sparklines are drawn from."""
    last = good()
    assert last.snapshot is not None
    for step in range(count):
        at = NOW - 10.0 * (count - step)
        wave = (step * 7) % 23
        gpus = tuple(
            replace(
                item,
                memory=replace(item.memory, used=int((item.memory.used or 0) * (0.3 + wave / 33))),
                power_draw=90.0 + 20 * ((step * (item.index + 3)) % 17),
            )
            for item in last.snapshot.observed.inventory.gpus
            if item.memory is not None
        )
        inventory = replace(last.snapshot.observed.inventory, gpus=gpus)
        observed = replace(last.snapshot.observed, inventory=inventory, at=at)
        yield replace(last, snapshot=replace(last.snapshot, observed=observed, now=at))
    yield last
