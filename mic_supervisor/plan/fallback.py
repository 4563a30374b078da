"""What runs for an instance by an earlier specification: after a rollback, or before its turn.

It is asked with the probes that it was ready with, which are remembered; where none are, with those
of the file, as far as it has their ports. Of what it served with, its own record tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from mic_supervisor.model import (
    ContainerSpec,
    EngineCheck,
    ExecCheck,
    Health,
    Instance,
    ObservedWorkload,
    Port,
    Probe,
    Probes,
    ProcessSpec,
    Workload,
)
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.assess import Assessment
from mic_supervisor.plan.memory import InstanceMemory


def predecessor(entry: InstanceMemory, assessment: Assessment) -> ObservedWorkload | None:
    """The workload to go back to, if there is one."""
    if not assessment.instance.rollback or entry.ready_workload is None:
        return None
    if assessment.match is not None and assessment.match.name == entry.ready_workload:
        return None
    for workload in (*assessment.alive, *assessment.ended):
        if (
            workload.name == entry.ready_workload
            and workload.runtime == "docker"  # a process's secrets are not kept to start it again
            and workload.identity.gpus == assessment.instance.gpus
            and workload.identity.model == assessment.instance.model
        ):
            return workload
    return None


def fallback(entry: InstanceMemory, item: Assessment) -> Assessment | None:
    """The instance as what was rolled back to, running or not; None: it was not rolled back."""
    if entry.failed != item.hash:
        return None
    back = predecessor(entry, item)
    return _as(back, entry, item) if back is not None else None


def earlier(entry: InstanceMemory, item: Assessment) -> Assessment | None:
    """The instance as what runs for it by an earlier specification; None: nothing does."""
    if item.runs or not item.alive:
        return None
    names = [workload.name for workload in item.alive]
    known = entry.ready_workload
    return _as(item.alive[names.index(known) if known in names else 0], entry, item)


def as_it_runs(entry: InstanceMemory, item: Assessment) -> Assessment:
    """The instance as what really runs for it; as it should be, where nothing does."""
    return fallback(entry, item) or earlier(entry, item) or item


def _as(workload: ObservedWorkload, entry: InstanceMemory, item: Assessment) -> Assessment:
    """`item`, of which `workload` is the match."""
    others = [w for w in (item.match, *item.alive, *item.ended) if w not in (None, workload)]
    return replace(
        item,
        instance=_instance(workload, entry, item.instance),
        match=workload,
        alive=(),
        ended=tuple(w for w in others if w is not None),
        diff=(),
        health=item.healths.get(workload.ref, Health()),
    )


def _instance(workload: ObservedWorkload, entry: InstanceMemory, instance: Instance) -> Instance:
    """As far as it matters to whoever asks what runs: how it is reached, and what to ask."""
    identity = workload.identity
    probes = entry.ready_probes if workload.name == entry.ready_workload else None
    same = identity.backend == instance.backend
    return replace(
        instance,
        workload=_reached(workload, instance.workload),
        probes=probes or _that_fit(instance.probes, identity.ports),
        placements=instance.placements if same else (),
    )


def _reached(workload: ObservedWorkload, current: Workload) -> Workload:
    spec = specs.mapping(workload.identity.spec)
    recorded = specs.mapping(spec.get("ports"))
    ports = tuple(
        Port(name, number, _number(specs.mapping(recorded.get(name)).get("container")))
        for name, number in sorted(workload.identity.ports.items())
    )
    listen = specs.listen_address(spec)
    if workload.runtime != "docker":
        return ProcessSpec((), ports=ports, listen=listen, variables=current.variables)
    network: Literal["bridge", "host"] = "host" if spec.get("network") == "host" else "bridge"
    return ContainerSpec(
        "", ports=ports, listen=listen, network=network, variables=current.variables
    )


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _that_fit(probes: Probes, ports: Mapping[str, int]) -> Probes:
    def fits(probe: Probe | None) -> Probe | None:
        if probe is None or isinstance(probe.check, ExecCheck | EngineCheck):
            return probe
        return probe if probe.check.port in ports else None

    return Probes(fits(probes.startup), fits(probes.liveness), fits(probes.readiness))
