"""Small builders, so that a test reads as states in, a plan out.

GPUs are numbered; GPU 0 has the UUID GPU-aaaaaaaa-…, GPU 1 GPU-bbbbbbbb-…, so that the id of MAM
on GPU 0 is MAM-aaaaaaaa. Times are small numbers of seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mic_supervisor import codec
from mic_supervisor.desired.bind import instance_id
from mic_supervisor.model import (
    ContainerSpec,
    DesiredState,
    ForeignWorkload,
    Gpu,
    GpuInventory,
    GpuMemory,
    GpuProcess,
    Health,
    HttpCall,
    HttpCheck,
    Instance,
    Listener,
    LoadState,
    ObservedState,
    ObservedWorkload,
    Owner,
    OwnerKind,
    Placement,
    PlacementState,
    Port,
    Probe,
    ProbeResult,
    Probes,
    ProcessSpec,
    RunState,
    RuntimeView,
    Unsatisfiable,
    Workload,
)
from mic_supervisor.plan.actions import Plan
from mic_supervisor.plan.assess import Assessment, Context, assess
from mic_supervisor.plan.launch import choose, launch
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.reconcile import reconcile
from mic_supervisor.plan.spec import SpecKey
from mic_supervisor.views.plan import to_text

HTTP = Port("http")
PROBE = Probe(HttpCheck("/health"))
PROBED = Probes(startup=PROBE, liveness=PROBE, readiness=PROBE)
NOW = 1000.0
MADE = 100.0  # when workloads were created and started, unless told otherwise
CONTEXT = Context(
    scope="test",
    host="h0",
    key=SpecKey(b"key"),
    port_range=(20000, 20009),
    process_runtime="subprocess",
)


def uuid(index: int) -> str:
    return f"GPU-{f'{index + 10:x}' * 8}-0000-4000-8000-{index:012x}"


def gpu(index: int, *, name: str = "", **values: Any) -> Gpu:
    values.setdefault("uuid", uuid(index))
    values.setdefault("processes", ())
    values.setdefault("memory", GpuMemory(total=24 << 30, used=0, free=24 << 30))
    return Gpu(index=index, name=name or "H200", **values)


def gpus(count: int, **values: Any) -> tuple[Gpu, ...]:
    return tuple(gpu(index, **values) for index in range(count))


def process(
    pid: int, *, of: Instance | None = None, name: str = "python", **values: Any
) -> GpuProcess:
    """A process on a GPU, computing, using 18.2 GiB; nobody's unless `of` says whose."""
    owner = Owner(OwnerKind.MANAGED, "ref", of.id) if of else Owner(OwnerKind.ORPHAN)
    values.setdefault("owner", owner)
    values.setdefault("kinds", ("compute",))
    values.setdefault("start_time", 77)
    return GpuProcess(pid, name, int(18.2 * (1 << 30)), **values)


def container(image: str = "mam:1", **values: Any) -> ContainerSpec:
    values.setdefault("ports", (HTTP,))
    return ContainerSpec(image=image, **values)


def program(*command: str, **values: Any) -> ProcessSpec:
    values.setdefault("ports", (HTTP,))
    return ProcessSpec(command=command or ("/opt/serve", "--port", "${port}"), **values)


def on(model: str, *indices: int, workload: Workload | None = None, **values: Any) -> Instance:
    """`model` on these GPUs: a probed container of image "mam:1" unless told otherwise."""
    uuids = tuple(uuid(index) for index in indices)
    if workload is None:
        workload = container()
    values.setdefault("id", instance_id(model, [item.split("-")[1] for item in uuids]))
    values.setdefault("probes", PROBED)
    values.setdefault("backend", "container" if isinstance(workload, ContainerSpec) else "process")
    return Instance(model=model, gpus=uuids, workload=workload, **values)


def changed(instance: Instance, **values: Any) -> Instance:
    """The same instance with other fields in its workload."""
    return replace(instance, workload=replace(instance.workload, **values))


def placement(model: str, index: int, count: int = 8) -> Placement:
    call = HttpCall("POST", f"/load/{model}/{count}")
    return Placement(
        model=model,
        gpus=(uuid(index),),
        digest=f"digest-{model}-{count}",
        load=call,
        unload=call,
        verify=HttpCall("GET", f"/config/{model}"),
        summary=(("instances_per_gpu", str(count)),),
    )


def loaded(
    model: str, count: int = 8, state: LoadState = LoadState.LOADED, **values: Any
) -> PlacementState:
    """What a server says that was sent `placement(model, …, count)`."""
    values.setdefault("digest", f"digest-{model}-{count}")
    values.setdefault("summary", (("instances_per_gpu", str(count)),))
    return PlacementState(model, state, **values)


# Models that most tests have: a container on GPU 0, what is to be in its place, a process on GPU 2.
MAM = on("MAM", 0)
NEW = changed(MAM, image="mam:2")
FACE = on("face", 2, workload=program("/opt/face", "--port", "${port}"))


def assessment(
    instance: Instance, *found: ObservedWorkload, health: Health | None = None, **values: Any
) -> Assessment:
    """What `assess` makes of one instance and the workloads that are there."""
    given = {found[0].ref: health} if found and health is not None else {}
    state = observed(*found, health=given, **values)
    return assess(desired(instance), state, CONTEXT)[0]


def workload(
    instance: Instance,
    state: RunState = RunState.RUNNING,
    *,
    ports: Mapping[str, int] | None = None,
    context: Context = CONTEXT,
    identity: Mapping[str, Any] | None = None,
    **values: Any,
) -> ObservedWorkload:
    """What runs, or ran, for an instance that was launched as the planner launches it."""
    wanted = assess(desired(instance), ObservedState(GpuInventory("nvml"), ()), context)[0]
    if ports is None:
        ports = choose(
            instance.id,
            instance.workload.ports,
            recorded={},
            taken=(),
            port_range=context.port_range,
        )
    assert ports is not None
    made = launch(wanted, ports, {item: index for index, item in enumerate(instance.gpus)}, context)
    values.setdefault("created_at", MADE)
    if state is not RunState.CREATED:
        values.setdefault("started_at", MADE)
    if state is RunState.EXITED:
        values.setdefault("exit_code", 1)
    return ObservedWorkload(
        runtime=made.runtime,
        name=made.name,
        ref=f"ref of {made.name}",
        identity=replace(made.identity, **(identity or {})),
        state=state,
        **values,
    )


def passed(*placements: PlacementState) -> Health:
    """Every probe says yes."""
    yes = ProbeResult(True, "", NOW)
    return Health(startup=yes, liveness=yes, readiness=yes, placements=placements)


def failing(kind: str, failures: int = 3, ok: bool | None = False, **values: Any) -> Health:
    """A healthy instance, but for one probe."""
    result = ProbeResult(ok, "GET /health answers 503", NOW, failures)
    fields: dict[str, Any] = {kind: result, **values}
    return replace(passed(), **fields)


def desired(*instances: Instance, **values: Any) -> DesiredState:
    return DesiredState(tuple(sorted(instances, key=lambda item: item.id)), **values)


def observed(
    *workloads: ObservedWorkload,
    gpus: Iterable[Gpu] | None = None,
    health: Mapping[str, Health] | None = None,
    foreign_workloads: Iterable[ForeignWorkload] = (),
    errors: Mapping[str, str] | None = None,
    last: Iterable[ObservedWorkload] | None = None,
    listeners: Iterable[Listener] = (),
    nvml_error: str | None = None,
    process_runtime: str = "subprocess",
) -> ObservedState:
    """Six idle GPUs and these workloads. What runs is healthy, unless `health` says otherwise.

    A runtime named in `errors` cannot be read, and what it runs is then not to be seen; `last` is
    what was known of it before.
    """
    errors = errors or {}
    views = tuple(
        RuntimeView(
            runtime,
            ()
            if runtime in errors
            else tuple(item for item in workloads if item.runtime == runtime),
            tuple(item for item in foreign_workloads if item.runtime == runtime),
            error=errors.get(runtime),
            last=tuple(item for item in last if item.runtime == runtime)
            if last is not None and runtime in errors
            else None,
        )
        for runtime in ("docker", process_runtime)
    )
    well = {
        item.ref: passed(
            *(loaded(item.identity.model),) if item.identity.backend == "server" else ()
        )
        for item in workloads
        if item.state is RunState.RUNNING
    }
    return ObservedState(
        inventory=GpuInventory(
            "nvml",
            () if nvml_error else tuple(_six() if gpus is None else gpus),
            error=nvml_error,
        ),
        runtimes=views,
        health={**well, **(health or {})},
        listeners=tuple(listeners),
        at=NOW,
    )


def _six() -> tuple[Gpu, ...]:
    return gpus(6)


def reread(memory: Memory) -> Memory:
    """As it comes back from the disk."""
    return codec.decode(Memory, codec.parse(json.dumps(codec.encode(memory))))


def knows(**entries: InstanceMemory) -> Memory:
    """A memory of these; `_` in a keyword stands for `-`, which no keyword can have."""
    return Memory({name.replace("_", "-"): entry for name, entry in entries.items()})


def known(*workloads: ObservedWorkload, **values: Any) -> Memory:
    """A memory that saw these run, and be ready."""
    return Memory(
        {
            item.identity.instance: InstanceMemory(
                started=item.name, started_at=MADE, ready_workload=item.name, ready="then", **values
            )
            for item in workloads
        }
    )


def plan_for(
    wanted: DesiredState | Iterable[Instance],
    state: ObservedState,
    memory: Memory | None = None,
    *,
    now: float = NOW,
    context: Context = CONTEXT,
) -> Plan:
    """The plan; without a memory, one that knows everything that runs."""
    if not isinstance(wanted, DesiredState):
        wanted = desired(*wanted)
    if memory is None:
        memory = known(*(item for view in state.runtimes for item in view.workloads))
    return reconcile(wanted, state, memory, now, context)


def text(plan: Plan, count: int = 6) -> str:
    return to_text(plan, {uuid(index): index for index in range(count)})


def steps(plan: Plan) -> list[str]:
    """ "start X <- create X, stop Y": every step with what it depends on, in the plan's order."""
    return [
        f"{step.id} <- {', '.join(step.depends_on)}" if step.depends_on else step.id
        for change in plan.changes
        for step in change.steps
    ]


def shortly(plan: Plan, **names: ObservedWorkload) -> list[str]:
    """The steps in words that fit a line.

    A workload given by keyword goes by that keyword; what is launched, by its instance's id.
    """
    out = []
    for line in steps(plan):
        for word, item in names.items():
            line = line.replace(item.name, word)
        out.append(re.sub(r"mic-test-(\S+)-[0-9a-f]{8}\b", r"\1", line))
    return out


def trouble(subject: str, reason: str, *indices: int, **values: Any) -> Unsatisfiable:
    return Unsatisfiable(subject, reason, tuple(uuid(index) for index in indices), **values)
