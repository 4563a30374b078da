"""What stands in the way of a start: strangers on GPUs, ports and names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mic_supervisor.model import (
    DesiredState,
    Gpu,
    GpuProcess,
    Instance,
    Launch,
    ObservedState,
    OwnerKind,
)
from mic_supervisor.plan.assess import is_alive, workloads


@dataclass(frozen=True, slots=True)
class Obstacle:
    reason: str
    hint: str | None = None


class Ports:
    """Who has which port of this machine."""

    def __init__(self, observed: ObservedState) -> None:
        self._ours: dict[int, set[str]] = {}
        self._serving: set[int] = set()
        for workload in workloads(observed):
            for number in workload.identity.ports.values():
                self._ours.setdefault(number, set()).add(workload.identity.instance)
                if is_alive(workload):
                    self._serving.add(number)
        self._strangers: dict[int, str] = {}
        for listener in observed.listeners or ():
            if listener.port not in self._serving:
                who = f"{listener.name} (PID {listener.pid})" if listener.pid else "another program"
                self._strangers[listener.port] = who
        for view in observed.runtimes:
            for stranger in view.strangers:
                if stranger.running:
                    for number in stranger.ports:
                        self._strangers[number] = f"{view.runtime} {stranger.name}"

    def taken(self, instance: str) -> set[int]:
        """Numbers that `instance` cannot have. Its own workloads' ports are free to it."""
        ours = {number for number, owners in self._ours.items() if owners - {instance}}
        return ours | set(self._strangers)

    def stranger(self, number: int) -> str | None:
        return self._strangers.get(number)


def in_the_way(
    instance: Instance,
    launch: Launch,
    gpus: Mapping[str, Gpu],
    observed: ObservedState,
    ports: Ports,
    leaving: Collection[str],
) -> Obstacle | None:
    """The first thing that keeps a launch from starting, or None.

    `leaving` are the instances that this plan stops: what they hold will be free in time.
    """
    for port in instance.workload.ports:
        who = ports.stranger(port.host) if port.host is not None else None
        if who is not None:
            return Obstacle(
                f"port {port.host} is taken by {who}, not ours",
                f"free the port, or give {instance.model} another one",
            )
    for view in observed.runtimes:
        for stranger in view.strangers:
            if view.runtime == launch.runtime and stranger.name == launch.name:
                return Obstacle(
                    f"the name {launch.name} is taken by a workload that is not ours: "
                    f"{stranger.reason}",
                    f"rename or remove it: docker rm {launch.name}",
                )
    if instance.on_foreign == "ignore":
        return None
    for uuid in instance.gpus:
        gpu = gpus[uuid]
        if gpu.processes is None:
            return Obstacle(f"the processes on GPU {gpu.index} cannot be read")
        for process in gpu.processes:
            if _is_foreign(process, {instance.id, *leaving}):
                return Obstacle(
                    f"GPU {gpu.index} is held by {describe(process)}, not ours",
                    "end that process, or move the model to another GPU",
                )
    return None


def warnings(desired: DesiredState, observed: ObservedState) -> list[str]:
    """What an operator should know and no plan changes."""
    out = [*desired.warnings]
    out += [f"GPU {gpu.index} cannot be opened: {gpu.error}" for gpu in observed.inventory.unopened]
    for gpu in observed.inventory.gpus:
        if gpu.uuid not in desired.kept_empty:
            continue
        for process in gpu.processes or ():
            if _is_foreign(process, ()):
                out.append(f"GPU {gpu.index} is to be kept empty, and {describe(process)} holds it")
    for view in observed.runtimes:
        out += [
            f"{view.runtime} {stranger.name} looks like ours and is not: {stranger.reason}"
            for stranger in view.strangers
            if stranger.name.startswith("mic-") and stranger.reason
        ]
    return out


def describe(process: GpuProcess) -> str:
    """ "PID 4121 (python, 18.2 GiB)" """
    used = "memory unknown" if process.used_memory is None else _gib(process.used_memory)
    return f"PID {process.pid} ({process.name or 'gone'}, {used})"


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def _is_foreign(process: GpuProcess, expected: Collection[str]) -> bool:
    """Desktop programs draw on a GPU without owning it; only who computes there is in the way."""
    if process.kinds and not {"compute", "mps"} & set(process.kinds):
        return False
    owner = process.owner
    if owner is not None and owner.kind is OwnerKind.MANAGED:
        return owner.instance not in expected
    return True
