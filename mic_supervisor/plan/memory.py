"""What the supervisor remembers between two looks at the machine. Plain data, kept as JSON.

Nothing here is needed to be right about what runs, only to be patient about what failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field, fields, replace
from typing import Any

from mic_supervisor.records import dataclass


@dataclass(frozen=True, slots=True)
class InstanceMemory:
    """Of one instance. A specification is named by Assessment.hash."""

    failures: int = 0  # since the last reset
    reason: str | None = None  # of the last failure
    attempt: str | None = None  # the specification that failed last
    retry_at: float | None = None
    failed: str | None = None  # a specification that is not retried: we rolled back from it
    failed_reason: str | None = None  # why; `reason` may be of the one that took over
    ready: str | None = None  # the last specification that was ready
    ready_workload: str | None = None  # name of the workload that was
    ready_since: float | None = None
    started: str | None = None  # name of the workload that we started, or saw running, last
    started_at: float | None = None  # None: it was adopted
    restarts: int = 0
    phase: str | None = None
    since: float | None = None  # of the phase


@dataclass(frozen=True, slots=True)
class Memory:
    """`bindings` maps index keys of the file to UUIDs."""

    instances: Mapping[str, InstanceMemory] = field(default_factory=dict)
    bindings: Mapping[str, str] = field(default_factory=dict)

    def of(self, instance: str) -> InstanceMemory:
        return self.instances.get(instance, InstanceMemory())

    def with_instance(self, instance: str, entry: InstanceMemory) -> Memory:
        return replace(self, instances={**self.instances, instance: entry})

    def to_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            "bindings": dict(self.bindings),
            "instances": {name: asdict(entry) for name, entry in sorted(self.instances.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Memory:
        """Unknown members are dropped: an older version may read what a newer one wrote.

        Raises ValueError where the shape is not ours.
        """
        if not isinstance(data, Mapping):
            raise ValueError("it holds no map")
        instances, bindings = data.get("instances", {}), data.get("bindings", {})
        if not isinstance(instances, Mapping) or not isinstance(bindings, Mapping):
            raise ValueError("instances and bindings must be maps")
        if not all(isinstance(entry, Mapping) for entry in instances.values()):
            raise ValueError("every instance must be a map")
        return cls(
            instances={str(name): _entry(str(name), entry) for name, entry in instances.items()},
            bindings={str(key): str(uuid) for key, uuid in bindings.items()},
        )


_TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "str | None": (str, type(None)),
    "float | None": (int, float, type(None)),
}


def _entry(name: str, data: Mapping[str, Any]) -> InstanceMemory:
    known = {f.name: _TYPES[str(f.type)] for f in fields(InstanceMemory)}
    given = {key: value for key, value in data.items() if key in known}
    for key, value in given.items():
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise ValueError(f"{key} of {name} is {value!r}")
    return InstanceMemory(**given)
