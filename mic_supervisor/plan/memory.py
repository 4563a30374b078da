"""What the supervisor remembers between two looks at the machine. Plain data, kept as JSON.

Nothing here is needed to be right about what runs, only to be patient about what failed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mic_supervisor.model import Probes
from mic_supervisor.plan import backoff, probe_record, workload_record
from mic_supervisor.plan.workload_record import Recorded


@dataclass(frozen=True, slots=True)
class InstanceMemory:
    """Of one instance. A specification is named by Assessment.hash. All times are steady."""

    failures: int = 0  # since the last reset
    reason: str | None = None  # of the last failure
    attempt: str | None = None  # the specification that failed last
    retry_at: float | None = None
    failed: str | None = None  # a specification that is not retried: we rolled back from it
    failed_reason: str | None = None  # why; `reason` may be of the one that took over
    ready: str | None = None  # the last specification that was ready
    ready_workload: str | None = None  # name of the workload that was
    ready_since: float | None = None
    ready_probes: Probes | None = None  # those that it was ready with
    ready_record: Recorded | None = None  # what it carried then, of a process
    started: str | None = None  # name of the workload that we started, or saw running, last
    started_at: float | None = None  # None: it was adopted
    restarts: int = 0
    phase: str | None = None
    since: float | None = None  # of the phase

    @property
    def troubled(self) -> bool:
        """Whether it has failed since it was last well for long, or was rolled back."""
        return self.failures > 0 or self.failed is not None


@dataclass(frozen=True, slots=True)
class Pause:
    """Since when something is to be left as it is, and what was given as the reason.

    `since` is told and decides nothing. A pause outlasts boots, so it is the wall clock's.
    """

    since: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Paused:
    """What is to be left as it is: models by their names, GPUs by their UUIDs."""

    models: Mapping[str, Pause] = field(default_factory=dict)
    gpus: Mapping[str, Pause] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.models or self.gpus)

    def including(self, models: Iterable[str], gpus: Iterable[str], pause: Pause) -> Paused:
        """With these as well. What is paused already keeps its time, and takes a new reason."""

        def one(known: Pause | None) -> Pause:
            if known is None:
                return pause
            return known if pause.reason is None else replace(known, reason=pause.reason)

        return Paused(
            {**self.models, **{name: one(self.models.get(name)) for name in models}},
            {**self.gpus, **{uuid: one(self.gpus.get(uuid)) for uuid in gpus}},
        )

    def without(self, models: Collection[str], gpus: Collection[str]) -> Paused:
        return Paused(
            {name: pause for name, pause in self.models.items() if name not in models},
            {uuid: pause for uuid, pause in self.gpus.items() if uuid not in gpus},
        )

    def has(self, model: str, gpus: Collection[str]) -> bool:
        """Whether what is of the model, or has any of the GPUs, is left as it is."""
        return model in self.models or any(uuid in self.gpus for uuid in gpus)


@dataclass(frozen=True, slots=True)
class Floor:
    """What was used on a GPU before its owner started, and what of that strangers had: bytes."""

    used: int
    strangers: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """`bindings` maps index keys of the file to UUIDs, `floors` UUIDs to what was used on the GPU
    before the last start of ours. `published` are the endpoints that the hook was told of last.
    `containers` maps the ids of those that carry our labels and names to whether they are ours;
    None: an earlier version did not write them down.
    """

    instances: Mapping[str, InstanceMemory] = field(default_factory=dict)
    bindings: Mapping[str, str] = field(default_factory=dict)
    paused: Paused = Paused()
    floors: Mapping[str, Floor] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None
    containers: Mapping[str, bool] | None = None

    @property
    def known(self) -> Mapping[str, bool]:
        """Which containers are ours under whatever name, by id; else by the names they had."""
        if self.containers is not None:
            return self.containers
        return {entry.started: True for entry in self.instances.values() if entry.started}

    def of(self, instance: str) -> InstanceMemory:
        return self.instances.get(instance, InstanceMemory())

    def with_instance(self, instance: str, entry: InstanceMemory) -> Memory:
        return replace(self, instances={**self.instances, instance: entry})

    def moved(self, seconds: float) -> Memory:
        """With the times of instances on another clock, which says that much more."""

        def one(at: float | None) -> float | None:
            return None if at is None else at + seconds

        return self._with_times(
            lambda entry: replace(
                entry,
                retry_at=one(entry.retry_at),
                started_at=one(entry.started_at),
                ready_since=one(entry.ready_since),
                since=one(entry.since),
            )
        )

    def in_time(self, now: float, *, rebooted: bool = False) -> Memory:
        """Without times that cannot be.

        A wait is never longer than the whole of it was, and what has happened is in the past: the
        clock that the times were taken by may have been set. After a reboot nothing is ready yet.
        """

        def past(at: float | None) -> float | None:
            return None if at is None else min(at, now)

        def bounded(entry: InstanceMemory) -> InstanceMemory:
            latest = now + backoff.delay(max(entry.failures, 2), jitter=1.0)
            return replace(
                entry,
                retry_at=None if entry.retry_at is None else min(entry.retry_at, latest),
                started_at=past(entry.started_at),
                ready_since=None if rebooted else past(entry.ready_since),
                since=past(entry.since),
            )

        return self._with_times(bounded)

    def _with_times(self, change: Callable[[InstanceMemory], InstanceMemory]) -> Memory:
        return replace(self, instances={k: change(one) for k, one in self.instances.items()})

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "version": 1,
            "bindings": dict(self.bindings),
            "instances": {name: _plain(entry) for name, entry in sorted(self.instances.items())},
        }
        if self.paused:
            out["paused"] = {
                kind: {key: asdict(pause) for key, pause in sorted(pauses.items())}
                for kind, pauses in (("gpus", self.paused.gpus), ("models", self.paused.models))
            }
        if self.floors:
            out["floors"] = {uuid: asdict(floor) for uuid, floor in sorted(self.floors.items())}
        if self.published is not None:
            out["published"] = {model: dict(found) for model, found in self.published.items()}
        if self.containers is not None:
            out["containers"] = dict(sorted(self.containers.items()))
        return out

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
        paused = data.get("paused", {})
        if not isinstance(paused, Mapping):
            raise ValueError("paused must be a map")
        return cls(
            instances={str(name): _entry(str(name), entry) for name, entry in instances.items()},
            bindings={str(key): str(uuid) for key, uuid in bindings.items()},
            paused=Paused(_pauses(paused, "models"), _pauses(paused, "gpus")),
            floors=_floors(data.get("floors", {})),
            published=_published(data.get("published")),
            containers=_containers(data.get("containers")),
        )


_TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "str | None": (str, type(None)),
    "float | None": (int, float, type(None)),
}


def _plain(entry: InstanceMemory) -> dict[str, Any]:
    out = asdict(replace(entry, ready_probes=None, ready_record=None))
    del out["ready_probes"], out["ready_record"]
    if entry.ready_probes is not None:
        out["ready_probes"] = probe_record.to_json(entry.ready_probes)
    if entry.ready_record is not None:
        out["ready_record"] = workload_record.to_json(entry.ready_record)
    return out


def _entry(name: str, data: Mapping[str, Any]) -> InstanceMemory:
    known = {f.name: _TYPES[str(f.type)] for f in fields(InstanceMemory) if str(f.type) in _TYPES}
    given = {key: value for key, value in data.items() if key in known}
    for key, value in given.items():
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise ValueError(f"{key} of {name} is {value!r}")
    probes = probe_record.from_json(data.get("ready_probes"))
    record = workload_record.from_json(data.get("ready_record"))
    return InstanceMemory(**given, ready_probes=probes, ready_record=record)


def _pauses(data: Mapping[str, Any], kind: str) -> dict[str, Pause]:
    given = data.get(kind, {})
    if not isinstance(given, Mapping) or not all(
        isinstance(one, Mapping) for one in given.values()
    ):
        raise ValueError(f"paused {kind} must be a map of maps")
    out: dict[str, Pause] = {}
    for key, entry in given.items():
        since, reason = entry.get("since"), entry.get("reason")
        if not isinstance(since, int | float) or isinstance(since, bool):
            raise ValueError(f"since of paused {key} is {since!r}")
        if not isinstance(reason, str | None):
            raise ValueError(f"reason of paused {key} is {reason!r}")
        out[str(key)] = Pause(float(since), reason)
    return out


def _floors(given: Any) -> dict[str, Floor]:
    if not isinstance(given, Mapping):
        raise ValueError("floors must be a map")
    out: dict[str, Floor] = {}
    for uuid, entry in given.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"floors of {uuid} is {entry!r}")
        used, strangers = entry.get("used"), entry.get("strangers", 0)
        if type(used) is not int or type(strangers) is not int:
            raise ValueError(f"floors of {uuid} is {entry!r}")
        out[str(uuid)] = Floor(used, strangers)
    return out


def _containers(data: Any) -> dict[str, bool] | None:
    if data is None:
        return None
    if not isinstance(data, Mapping) or not all(isinstance(ours, bool) for ours in data.values()):
        raise ValueError("containers must be a map of true and false")
    return {str(ref): ours for ref, ours in data.items()}


def _published(data: Any) -> dict[str, dict[str, dict[str, str]]] | None:
    if data is None:
        return None
    if not isinstance(data, Mapping):
        raise ValueError("published must be a map")
    found: dict[str, dict[str, dict[str, str]]] = {}
    for model, instances in data.items():
        if not isinstance(instances, Mapping):
            raise ValueError(f"published {model} must be a map")
        for instance, urls in instances.items():
            if not isinstance(urls, Mapping) or not all(isinstance(u, str) for u in urls.values()):
                raise ValueError(f"published {instance} must be a map of texts")
        found[str(model)] = {str(one): dict(urls) for one, urls in instances.items()}
    return found
