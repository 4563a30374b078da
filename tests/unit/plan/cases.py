"""States of every kind, those that can come about and those that should not, for properties."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property

from hypothesis import strategies as st

from mic_supervisor.model import (
    DesiredState,
    ForeignWorkload,
    Gpu,
    Health,
    Instance,
    Listener,
    ObservedState,
    ObservedWorkload,
    Port,
    RunState,
    Unsatisfiable,
)
from mic_supervisor.plan.actions import (
    Plan,
)
from mic_supervisor.plan.assess import Context, assess, is_alive
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.reconcile import reconcile
from tests.unit.plan.builders import (
    CONTEXT,
    NOW,
    container,
    desired,
    failing,
    gpu,
    loaded,
    observed,
    on,
    passed,
    placement,
    process,
    program,
    trouble,
    uuid,
    workload,
)

GPUS = 4


# --- states -----------------------------------------------------------------------------------


@cache
def build(name: str, indices: tuple[int, ...], version: int) -> Instance:
    """A of GPU 0 is a container, P a process, F has a fixed port, S is a server with a model."""
    image = f"{name}:{version}"
    if name == "P":
        return on(name, *indices, workload=program("/opt/p", str(version)))
    if name == "F":
        return on(name, *indices, workload=container(image, ports=(Port("http", 9000 + version),)))
    if name == "S":
        server = on(name, *indices, workload=container("server:1"))
        return replace(server, placements=(placement("S", indices[0], version),))
    return on(name, *indices, workload=container(image))


SETS = [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (0, 1, 2)]


def rarely(draw: st.DrawFn, times: int) -> bool:
    """Once in so many times. Not where a number is 0: hypothesis is fond of that."""
    return draw(st.integers(0, times - 1)) == times // 2


VARIANTS = st.builds(build, st.sampled_from("ABPFS"), st.sampled_from(SETS), st.integers(1, 2))


@cache
def launched(instance: Instance, port: int) -> ObservedWorkload:
    return workload(instance, ports={"http": port})


STATES = st.sampled_from(
    [RunState.RUNNING] * 4
    + [RunState.EXITED] * 2
    + [RunState.CREATED, RunState.PAUSED, RunState.REMOVING, RunState.UNKNOWN]
)


@st.composite
def found_workloads(draw: st.DrawFn) -> ObservedWorkload:
    instance, state = draw(VARIANTS), draw(STATES)
    made = launched(instance, draw(st.sampled_from([20000, 20001, 20002, 9001, 9002])))
    if rarely(draw, 10):
        made = replace(made, identity=replace(made.identity, spec=None))
    return replace(made, state=state, created_at=float(draw(st.integers(1, 5))))


@st.composite
def desired_states(draw: st.DrawFn) -> DesiredState:
    """Disjoint sets of GPUs, each with an instance, to be kept empty, in trouble, or not listed."""
    free = set(range(GPUS))
    names = st.sampled_from(draw(st.sampled_from(["A", "S", "ABPFS"])))
    instances: list[Instance] = []
    empty: list[str] = []
    lost: list[Unsatisfiable] = []
    for indices in draw(st.lists(st.sampled_from(SETS), min_size=1, max_size=6)):
        if not set(indices) <= free:
            continue
        free -= set(indices)
        if rarely(draw, 8):
            empty += [uuid(index) for index in indices]
        elif rarely(draw, 8):
            lost.append(trouble(f"entry {indices}", "it is in trouble", *indices))
        else:
            instances.append(build(draw(names), indices, draw(st.integers(1, 2))))
    return desired(*instances, kept_empty=tuple(empty), unsatisfiable=tuple(lost))


HEALTH = st.sampled_from(
    [
        *[passed(loaded("S", 1)), passed(loaded("S", 2)), passed()] * 2,
        Health(),
        failing("liveness"),
        failing("startup"),
        failing("readiness"),
        failing("startup", failures=1),
    ]
)


@dataclass(frozen=True)
class Case:
    desired: DesiredState
    observed: ObservedState
    memory: Memory
    context: Context

    @cached_property
    def plan(self) -> Plan:
        return reconcile(self.desired, self.observed, self.memory, NOW, self.context)


@st.composite
def gpus_as_found(draw: st.DrawFn, found: Iterable[ObservedWorkload]) -> list[Gpu]:
    """What runs computes on its GPUs, mostly; so may a stranger; and reading may fail."""
    out = []
    for index in range(GPUS):
        inside = [
            process(100 + place, of=build("A", (index,), 1), name=item.name)
            for place, item in enumerate(found)
            if is_alive(item) and uuid(index) in item.identity.gpus
        ]
        inside = [
            replace(one, owner=replace(one.owner, instance=item.identity.instance))
            for one in inside
            for item in found
            if item.name == one.name and one.owner is not None
        ]
        if rarely(draw, 10):
            inside.append(process(4121))
        readable = not rarely(draw, 20)
        if not rarely(draw, 30):
            out.append(gpu(index, processes=tuple(inside) if readable else None))
    return out


@st.composite
def cases(draw: st.DrawFn) -> Case:
    wanted = draw(desired_states())
    drawn = draw(st.lists(found_workloads(), max_size=3))
    for instance in wanted.instances:  # what is there is often what is wanted, or nearly
        for version in draw(st.sampled_from([(), (1,), (1,), (2,), (2,), (1, 2)])):
            near = launched(build(instance.model, _indices(instance), version), 20004)
            drawn.append(replace(near, state=draw(STATES)))
    found = list({(item.runtime, item.name): item for item in drawn}.values())
    failing_runtimes = ["docker", "subprocess"] if rarely(draw, 8) else []
    listeners = draw(st.sets(st.sampled_from([20000, 20003, 9001]), max_size=1))
    state = observed(
        *found,
        gpus=draw(gpus_as_found(found)),
        health={item.ref: draw(HEALTH) for item in found},
        errors={name: "refused" for name in failing_runtimes if draw(st.booleans())},
        listeners=[Listener(port) for port in listeners],
        last=draw(st.sampled_from([None, found])),
        nvml_error="no driver" if rarely(draw, 25) else None,
        foreign_workloads=[ForeignWorkload("docker", "jupyter", "j", (9002,))]
        if draw(st.booleans())
        else (),
    )
    entries = {}
    for item in assess(wanted, state, CONTEXT):
        names = [w.name for w in found if w.identity.instance == item.instance.id]
        entries[item.instance.id] = InstanceMemory(
            failures=draw(st.integers(0, 3)),
            reason="it failed",
            retry_at=NOW + 60 if rarely(draw, 6) else draw(st.sampled_from([None, NOW - 1])),
            failed=item.hash if rarely(draw, 4) else None,
            failed_reason="it failed",
            ready_workload=draw(st.sampled_from([None, *names])),
            started=draw(st.sampled_from([None, *names])),
        )
    context = replace(
        CONTEXT,
        confirmed=draw(st.booleans()),
        forced=frozenset(name for name in sorted(entries) if rarely(draw, 4)),
    )
    return Case(wanted, state, Memory(entries), context)


def _indices(item: Instance) -> tuple[int, ...]:
    return tuple(index for index in range(GPUS) if uuid(index) in item.gpus)
