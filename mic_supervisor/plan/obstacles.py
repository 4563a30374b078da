"""What stands in the way of a start: strangers on GPUs, ports and names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mic_supervisor.model import DesiredState, Gpu, Instance, ObservedState, OwnerKind
from mic_supervisor.plan.amounts import SLACK, lets_go, size
from mic_supervisor.plan.assess import Assessment, is_alive, workloads
from mic_supervisor.plan.spec import SpecKey, keys_of
from mic_supervisor.plan.strangers import (
    belongs,
    describe,
    intruders,
    is_foreign,
    memory_of,
    sentence,
)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """`queued`: the file says to wait until it is gone."""

    reason: str
    hint: str | None = None
    queued: bool = False


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
        for who, numbers in sorted(
            (f"{view.runtime} {stranger.name}", stranger.ports)
            for view in observed.runtimes
            for stranger in view.strangers
            if stranger.running
        ):
            self._strangers.update(dict.fromkeys(numbers, who))

    def taken(self, instance: str) -> set[int]:
        """Numbers that `instance` cannot have. Its own workloads' ports are free to it."""
        ours = {number for number, owners in self._ours.items() if owners - {instance}}
        return ours | set(self._strangers)

    def stranger(self, number: int) -> str | None:
        return self._strangers.get(number)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a start has to fit into.

    `numbers` are the host ports of every desired instance, by its id. `leaving` are the instances
    that are on their way out: what they hold will be free in time.
    """

    observed: ObservedState
    gpus: Mapping[str, Gpu]
    ports: Ports
    numbers: Mapping[str, Mapping[str, int] | None]
    leaving: Collection[str] = ()


def in_the_way(
    instance: Instance, runtime: str, name: str, numbers: Collection[int], around: Surroundings
) -> Obstacle | None:
    """The first thing that keeps a workload called `name` from starting, or None."""
    for view in around.observed.runtimes:
        if view.runtime == runtime and view.off is not None:
            return Obstacle(view.off, view.hint)
    for number in sorted(numbers):
        who = around.ports.stranger(number)
        if who is not None:
            return _port_taken(instance, number, f"{who}, not ours")
        holders = [id_ for id_, held in around.numbers.items() if number in (held or {}).values()]
        if min(holders, default=instance.id) < instance.id:
            return _port_taken(instance, number, min(holders))
    for view in around.observed.runtimes:
        for stranger in view.strangers:
            if view.runtime == runtime and stranger.name == name:
                return Obstacle(
                    f"the name {name} is taken by a workload that is not ours: {stranger.reason}",
                    f"rename or remove it: docker rm {name}" if runtime == "docker" else None,
                )
    return _too_small(instance, around) or _strangers(instance, around)


def _too_small(instance: Instance, around: Surroundings) -> Obstacle | None:
    """Where the card cannot hold what the model says it needs, whoever leaves it."""
    if instance.vram is None:
        return None
    for uuid in instance.gpus:
        gpu = around.gpus[uuid]
        if gpu.memory is None:
            continue
        each = " on each GPU" if len(instance.gpus) > 1 else ""
        needs = f"it needs {size(instance.vram)}{each}, and GPU {gpu.index} ({gpu.name})"
        if instance.vram > gpu.memory.total:
            return Obstacle(
                f"{needs} has {size(gpu.memory.total)}",
                f"give it a larger GPU, or correct `vram` of {instance.model}",
            )
        others = [
            process
            for process in gpu.processes or ()
            if process.owner is None or process.owner.kind is not OwnerKind.MANAGED
        ]
        taken = memory_of(process for process in others if not lets_go(process))
        if taken and instance.vram > gpu.memory.total - taken:
            listed = ", ".join(describe(process) for process in others if process.used_memory)
            return Obstacle(
                f"{needs} has {size(gpu.memory.total - taken)} beside {listed}, not ours",
                "end what uses the GPU, or move the model to another one",
                queued=instance.on_foreign == "wait",
            )
    return None


def _strangers(instance: Instance, around: Surroundings) -> Obstacle | None:
    expected = {instance.id, *around.leaving}
    for uuid in instance.gpus:
        gpu = around.gpus[uuid]
        if gpu.simulated:
            continue
        if gpu.processes is None:
            return Obstacle(f"the processes on GPU {gpu.index} cannot be read")
        if instance.on_foreign == "ignore":
            continue
        for process in sorted(gpu.processes, key=lambda item: item.pid):
            if is_foreign(process, expected, instance.foreign_threshold):
                whose = belongs(process, around.observed)
                waits = instance.on_foreign == "wait"
                return Obstacle(
                    f"{'waiting for the GPU: ' if waits else ''}GPU {gpu.index} is held by "
                    f"{describe(process)}, not ours" + (f": {whose}" if whose else ""),
                    "end that process, or move the model to another GPU",
                    queued=waits,
                )
    return None


def warnings(
    desired: DesiredState, observed: ObservedState, scope: str, busy: Collection[str] = ()
) -> list[str]:
    """What an operator should know and no plan changes. Another scope's workloads are no news."""
    out = [*desired.warnings]
    out += [f"GPU {gpu.index} cannot be opened: {gpu.error}" for gpu in observed.inventory.unopened]
    out += [sentence(one, observed) for one in intruders(desired, observed, busy)]
    out += _of_gpus(desired, observed)
    for view in observed.runtimes:
        out += [
            f"{view.runtime} {stranger.name} looks like ours and is not: {stranger.reason}"
            for stranger in view.strangers
            if stranger.claims is not None
            or (stranger.name.startswith(f"mic-{scope}-") and "scope" not in stranger.reason)
        ]
    return sorted(out)


def _of_gpus(desired: DesiredState, observed: ObservedState) -> Iterable[str]:
    """What is amiss with GPUs that the file names, or that something of ours runs on."""
    named = {uuid: item.id for item in desired.instances for uuid in item.gpus}
    for gpu in observed.inventory.gpus:
        if gpu.uuid not in named and gpu.uuid not in desired.kept_empty:
            continue
        if gpu.trouble is not None:
            yield f"GPU {gpu.index} is unhealthy: {gpu.trouble}"
        if gpu.mig and gpu.uuid in named:
            yield (
                f"GPU {gpu.index} has MIG on, which is reported and not managed: "
                f"{named[gpu.uuid]} gets the whole GPU, or nothing of it"
            )
        errors = dict(gpu.telemetry.ecc_errors) if gpu.telemetry is not None else {}
        if count := errors.get("uncorrected"):
            yield (
                f"GPU {gpu.index} has had {count} uncorrected memory error{'s'[: count > 1]} since "
                "the driver was loaded"
            )


def left_behind(assessments: Iterable[Assessment], observed: ObservedState) -> list[str]:
    """Memory that a server keeps on GPUs where nothing is placed any more: an unload need not give
    it back, only the end of the process does.
    """
    gpus = {gpu.uuid: gpu for gpu in observed.inventory.gpus}
    out = []
    for item in assessments:
        if not item.instance.shared or not item.runs:
            continue
        for uuid in item.instance.gpus:
            gpu = gpus.get(uuid)
            if gpu is None or uuid in item.placed_gpus:
                continue
            count = memory_of(
                process
                for process in gpu.processes or ()
                if process.owner is not None and process.owner.instance == item.instance.id
            )
            if count > SLACK:
                out.append(
                    f"GPU {gpu.index}: {item.instance.id} still holds {size(count)} there although "
                    "nothing is placed on it; only its end gives that back: mic-supervisor restart "
                    f"{item.instance.id}"
                )
    return out


def adoption_warnings(assessments: Iterable[Assessment], key: SpecKey) -> list[str]:
    """Where a workload runs on trust: what it was started with cannot be compared in full."""
    out = []
    for item in assessments:
        if item.match is None or not item.runs:
            continue
        spec = item.match.identity.spec
        if spec is None:
            out.append(
                f"{item.match.name}: the record of its specification cannot be read, so whether it "
                "is what the file asks for is unknown"
            )
        elif keys_of(spec) - {key.id}:
            out.append(
                f"{item.match.name}: its secrets were recorded with another key, so whether they "
                "changed is unknown"
            )
    return out


def _port_taken(instance: Instance, number: int, who: str) -> Obstacle:
    return Obstacle(
        f"port {number} is taken by {who}", f"free the port, or give {instance.model} another one"
    )
