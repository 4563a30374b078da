"""What the supervisor remembers between two looks at the machine. Plain data, kept as JSON.

Nothing here is needed to be right about what runs, only to be patient about what failed.
plan/ledger.py changes what is remembered of instances.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mic_supervisor.clocks import later
from mic_supervisor.model import Identity, Probes
from mic_supervisor.plan import backoff


@dataclass(frozen=True, slots=True)
class Recorded:
    """A host process that was ready, by what it carried; plan/fallback.py says what for."""

    runtime: str
    name: str
    identity: Identity


@dataclass(frozen=True, slots=True)
class Cooldown:
    """Nothing is tried for an instance: its last change failed, and not by its specification."""

    until: float
    reason: str
    failures: int = 1  # in a row
    phase: str | None = None  # where the failure is a phase of its own: "stuck_stopping"


@dataclass(frozen=True, slots=True)
class Pulled:
    """The digest at which a tag was pulled, since somebody asked for what is newest: an instance is
    to run that one. `before` is what it ran, for people.
    """

    image: str
    digest: str
    before: str | None = None


@dataclass(frozen=True, slots=True)
class InstanceMemory:
    """The ledger of one instance. A specification is named by Assessment.hash. Times are steady."""

    failures: int = 0  # of the specification since the last reset: how long the next wait is
    reason: str | None = None  # of the last failure, for plan and status
    attempt: str | None = None  # the specification that failed last: another one is tried at once
    retry_at: float | None = None  # until then it is not started again
    failed: str | None = None  # a specification that is not retried: we rolled back from it
    failed_reason: str | None = None  # why; `reason` may be of the one that took over
    cooldown: Cooldown | None = None  # until then no change of it is tried, whatever it is
    ready: str | None = None  # the last specification that was ready: no rollback from it
    ready_workload: str | None = None  # name of the workload that was: a rollback goes there
    ready_since: float | None = None  # after a while failures are forgotten; None: not ready now
    ready_probes: Probes | None = None  # those that it was ready with: what it is asked by later
    ready_record: Recorded | None = None  # what it carried then, of a process: to start it again
    started: str | None = None  # name of the workload whose end would be a failure
    started_at: float | None = None  # when its start's budget began; None: it was adopted
    cold: Literal[True] | None = None  # it was started, and not ready since: it is to be warmed up
    pulled: Pulled | None = None  # counts as long as the file names the same image
    prepared: str | None = None  # what `prepare` was last run for, and with which command
    files: Mapping[str, str] | None = None  # model -> what was on disk when it was loaded
    restarts: int = 0  # for people
    phase: str | None = None  # the last one that was told
    since: float | None = None  # when it came into it, or has been down

    @property
    def has_failed(self) -> bool:
        """Whether it has failed since it was last well for long, or was rolled back."""
        return self.failures > 0 or self.failed is not None or self.cooldown is not None


def memory_key(instance: str, model: str) -> str:
    """Under what it is remembered how loading a model of a shared server went."""
    return f"{instance}/{model}"


def instance_of(key: str) -> str:
    """Whose entry that is: an instance's own, or that of a model in it."""
    return key.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Pause:
    """Since when something is to be left as it is, and what was given as the reason.

    `since` is told and decides nothing. A pause outlasts boots, so it is the wall clock's. 0: it
    was damaged on the disk, and what is paused stays so all the same.
    """

    since: float = 0.0
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
class Drained:
    """Since when the host is out of service, and what was given as the reason, as of a pause.

    `boot` is the id of the boot that it ends with; None: it ends when a person says so.
    """

    since: float = 0.0
    reason: str | None = None
    boot: str | None = None


@dataclass(frozen=True, slots=True)
class Floor:
    """What was used on a GPU before its owner started, and what of that foreign processes had:
    bytes."""

    used: int
    strangers: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """`bindings` maps index keys of the file to UUIDs, `floors` UUIDs to what was used on the GPU
    before the last start of ours. `published` are the endpoints that the hook was told of last.
    `containers` maps the ids of those that carry our labels and names to whether they are ours;
    None: an earlier version did not write them down. `lost` tells what of the file was damaged.
    `drained` is None while the host is in service.

    `unexplained` is None unless something was lost, or there was no file. Then it has, by runtime,
    the instances that ran otherwise than the file asks when the runtime was first read: what is
    lost may be why, so they stay as they are until a person says to go on (`ledger.explained`). A
    runtime that is not in it could not be read since.
    """

    instances: Mapping[str, InstanceMemory] = field(default_factory=dict)
    bindings: Mapping[str, str] = field(default_factory=dict)
    paused: Paused = Paused()
    drained: Drained | None = None
    floors: Mapping[str, Floor] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None
    containers: Mapping[str, bool] | None = None
    lost: str | None = None
    unexplained: Mapping[str, tuple[str, ...]] | None = None

    @property
    def known(self) -> Mapping[str, bool]:
        """Which containers are ours under whatever name, by id; else by the names they had."""
        if self.containers is not None:
            return self.containers
        return {entry.started: True for entry in self.instances.values() if entry.started}

    def of(self, instance: str) -> InstanceMemory:
        return self.instances.get(instance) or InstanceMemory()

    def with_instance(self, instance: str, entry: InstanceMemory) -> Memory:
        return replace(self, instances={**self.instances, instance: entry})

    def moved(self, seconds: float) -> Memory:
        """With the times of instances on another clock, which says that much more."""
        return self._with_times(
            lambda entry: replace(
                entry,
                retry_at=later(entry.retry_at, seconds),
                started_at=later(entry.started_at, seconds),
                ready_since=later(entry.ready_since, seconds),
                since=later(entry.since, seconds),
                cooldown=entry.cooldown
                and replace(entry.cooldown, until=entry.cooldown.until + seconds),
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
                cooldown=None,  # a supervisor that was started anew tries at once
            )

        return self._with_times(bounded)

    def _with_times(self, change: Callable[[InstanceMemory], InstanceMemory]) -> Memory:
        return replace(self, instances={k: change(one) for k, one in self.instances.items()})
