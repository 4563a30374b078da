"""What is remembered of a host process that was ready; plan/rebuild.py says what for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mic_supervisor.model import Identity, ObservedWorkload


@dataclass(frozen=True, slots=True)
class Recorded:
    """A workload that was ready, by what it carried."""

    runtime: str
    name: str
    identity: Identity


def recorded(workload: ObservedWorkload) -> Recorded | None:
    """What to remember of a workload that is ready; None where a container remains anyway."""
    spec = workload.identity.spec
    if not isinstance(spec, Mapping) or spec.get("kind") != "process":
        return None
    return Recorded(workload.runtime, workload.name, workload.identity)


def to_json(record: Recorded) -> dict[str, Any]:
    identity = record.identity
    out = {known.name: getattr(identity, known.name) for known in fields(identity)}
    out |= {"gpus": list(identity.gpus), "ports": dict(identity.ports)}
    return {"runtime": record.runtime, "name": record.name, "identity": out}


def from_json(data: Any) -> Recorded | None:
    """None: there is none, or it is not understood."""
    try:
        identity = {**data["identity"]}
        known = {one.name for one in fields(Identity)}
        gpus = tuple(str(uuid) for uuid in identity["gpus"])
        ports = {str(name): int(number) for name, number in identity["ports"].items()}
        kept = {key: value for key, value in identity.items() if key in known}
        return Recorded(
            str(data["runtime"]),
            str(data["name"]),
            Identity(**{**kept, "gpus": gpus, "ports": ports}),
        )
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
