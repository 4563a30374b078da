"""What runs for an instance by an earlier specification: after a rollback, or before its turn.

It is asked with the probes that it was ready with, which are remembered; where none are, with those
of the file, as far as it has their ports. Of what it served with, its own record tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from mic_supervisor.model import (
    ContainerSpec,
    Health,
    HttpCheck,
    Identity,
    Instance,
    Launch,
    Limits,
    ObservedWorkload,
    Pairs,
    Port,
    Probe,
    Probes,
    ProcessSpec,
    Progress,
    TcpCheck,
    Workload,
)
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.assess import Assessment
from mic_supervisor.plan.launch import fill, listed
from mic_supervisor.plan.memory import InstanceMemory, Recorded


def can_roll_back(entry: InstanceMemory, item: Assessment) -> bool:
    """Whether there is something to go back to, when the desired specification has failed."""
    if not item.instance.rollback or entry.ready_workload is None:
        return False
    if item.match is not None and item.match.name == entry.ready_workload:
        return False
    back = _predecessor(entry, item)
    kept = back is not None and back.runtime == "docker"  # it can itself be started again
    return kept or rebuilt(entry.ready_record, item) is not None


def fallback(entry: InstanceMemory, item: Assessment) -> Assessment | None:
    """The instance as what was rolled back to; None: it was not rolled back.

    Its `match` is None as long as a process has yet to be started again.
    """
    if entry.failed != item.hash or not can_roll_back(entry, item):
        return None
    return _as(_predecessor(entry, item), entry, item)


def _predecessor(entry: InstanceMemory, item: Assessment) -> ObservedWorkload | None:
    """The workload that was ready, running or not, by the specification before this one."""
    for workload in (*item.alive, *item.ended):
        if (
            workload.name == entry.ready_workload
            and workload.identity.gpus == item.instance.gpus
            and workload.identity.model == item.instance.model
        ):
            return workload
    return None


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


def _as(workload: ObservedWorkload | None, entry: InstanceMemory, item: Assessment) -> Assessment:
    """`item`, of which `workload` is the match; of None it is what is remembered of it."""
    record = entry.ready_record
    runtime, instance = item.runtime, item.instance
    if workload is not None:
        runtime = workload.runtime
        instance = _instance(runtime, workload.name, workload.identity, entry, instance)
    elif record is not None:
        instance = _instance(runtime, record.name, record.identity, entry, instance)
    return replace(
        item,
        instance=instance,
        runtime=runtime,
        match=workload,
        alive=(),
        ended=tuple(other for other in item.ours if other != workload),
        diff=(),
        health=item.healths.get(workload.ref, Health()) if workload is not None else Health(),
    )


def _instance(
    runtime: str, name: str, identity: Identity, entry: InstanceMemory, instance: Instance
) -> Instance:
    """As far as it matters to whoever asks what runs: how it is reached, and what to ask."""
    probes = entry.ready_probes if name == entry.ready_workload else None
    same = identity.backend == instance.backend
    return replace(
        instance,
        workload=_reached(runtime, identity, instance.workload),
        probes=probes or _that_fit(instance.probes, identity.ports),
        warm_up=None,  # the file's is for another specification
        placements=instance.placements if same else (),
    )


def _reached(runtime: str, identity: Identity, current: Workload) -> Workload:
    spec = specs.mapping(identity.spec)
    recorded = specs.mapping(spec.get("ports"))
    ports = tuple(
        Port(name, number, _number(specs.mapping(recorded.get(name)).get("container")))
        for name, number in sorted(identity.ports.items())
    )
    listen = specs.listen_address(spec)
    if runtime != "docker":
        return ProcessSpec(
            (),
            env=current.env,
            file_env=current.file_env,
            variables=current.variables,
            ports=ports,
            listen=listen,
        )
    network: Literal["bridge", "host"] = "host" if spec.get("network") == "host" else "bridge"
    return ContainerSpec(
        "", ports=ports, listen=listen, network=network, variables=current.variables
    )


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _that_fit(probes: Probes, ports: Mapping[str, int]) -> Probes:
    def fits(probe: Probe | None) -> Probe | None:
        if probe is None:
            return None
        asked = (probe.check, probe.progress)
        named = {it.port for it in asked if isinstance(it, HttpCheck | TcpCheck | Progress)}
        return probe if named <= ports.keys() else None

    return Probes(fits(probes.startup), fits(probes.liveness), fits(probes.readiness))


# --- of a process, by its record alone ----------------------------------------------------------
#
# Nothing of an ended process remains but what is remembered of it: the record it carried. In that
# its secrets stand as digests. A secret whose digest is the same in the file as it is now is known
# again; where one has changed, or is gone, there is no way back.

_SECRETS = ("env", "file_env", "variables")
_NOT_OF_THE_PROCESS = frozenset({"kind", "drain"})


def rebuilt(record: Recorded | None, item: Assessment) -> ProcessSpec | None:
    """The specification that it was ready with; None: it is not known in full."""
    if record is None or record.runtime != item.runtime:
        return None
    identity, instance = record.identity, item.instance
    if (identity.gpus, identity.model) != (instance.gpus, instance.model):
        return None
    spec = {k: v for k, v in specs.mapping(identity.spec).items() if k not in _NOT_OF_THE_PROCESS}
    if not spec or {*spec} - {known.name for known in fields(ProcessSpec)}:
        return None  # a later version's
    try:
        secrets: dict[str, Any] = {name: _known(name, spec, item) for name in _SECRETS}
        return ProcessSpec(**{name: _value(name, spec[name]) for name in spec} | secrets)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def relaunch(record: Recorded, spec: ProcessSpec, indices: Mapping[str, int]) -> Launch:
    """What to start: the same in every respect, on the ports that it had."""
    identity = record.identity
    filled = fill(spec, identity.ports, listed(identity.gpus, indices))
    return Launch(record.name, record.runtime, identity, filled)


def _known(name: str, spec: Mapping[str, Any], item: Assessment) -> Pairs:
    """The values of what was recorded as digests. Raises KeyError where one is not known."""
    now = specs.mapping(item.spec.get(name))
    values = dict(getattr(item.instance.workload, name))
    out = []
    for key, digest in specs.mapping(spec.get(name)).items():
        if now[key] != digest:
            raise KeyError(key)
        out.append((str(key), values[key]))
    return tuple(out)


def _value(name: str, value: Any) -> Any:
    if name == "ports":
        return tuple(Port(port, **numbers) for port, numbers in value.items())
    if name == "limits":
        return Limits(**value)
    return tuple(value) if isinstance(value, list) else value
