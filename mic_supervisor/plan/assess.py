"""Holds desired against observed state, one instance at a time, without deciding anything yet."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mic_supervisor.model import (
    ContainerSpec,
    DesiredState,
    Health,
    Instance,
    LoadState,
    ObservedState,
    ObservedWorkload,
    Placement,
    PlacementState,
    ProbeResult,
    RunState,
)
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.actions import Blocked, FieldDiff
from mic_supervisor.plan.memory import InstanceMemory, Memory, Pulled
from mic_supervisor.plan.words import Reason
from mic_supervisor.runtimes.identity import known_from

_ALIVE = frozenset({RunState.RUNNING, RunState.PAUSED, RunState.REMOVING, RunState.UNKNOWN})


@dataclass(frozen=True, slots=True)
class Selection:
    """Models by their names, GPUs by their UUIDs."""

    models: frozenset[str] = frozenset()
    gpus: frozenset[str] = frozenset()

    def has(self, instance: Instance) -> bool:
        """Whether it is of one of the models, serves one, or has one of the GPUs."""
        served = any(item.called in self.models for item in instance.placements)
        return served or self.concerns(instance.model, instance.gpus)

    def concerns(self, model: str | None, gpus: Collection[str]) -> bool:
        return model in self.models or not self.gpus.isdisjoint(gpus)

    def called(self, indices: Mapping[str, int]) -> list[str]:
        """ "MAM", "GPU 3", and the UUID of a GPU that is not there."""
        known = sorted((indices[uuid], uuid) for uuid in self.gpus if uuid in indices)
        lost = sorted(uuid for uuid in self.gpus if uuid not in indices)
        return [*sorted(self.models), *(f"GPU {index}" for index, _ in known), *lost]


@dataclass(frozen=True, slots=True)
class Context:
    """What decisions depend on besides the two states, and what is said besides. Constant while the
    program runs, but for what has a default.
    """

    scope: str
    host: str
    key: specs.SpecKey
    port_range: tuple[int, int]
    process_runtime: str  # "systemd" or "subprocess"
    creates_ahead: frozenset[str] = frozenset({"docker"})
    busy: frozenset[str] = frozenset()  # instances that steps are being executed for
    # Instances, and models of servers by `memory_key`, to restart although nothing is wrong.
    forced: frozenset[str] = frozenset()
    # The instances that were published, by model; None: nobody has to be told, or can be.
    published: Mapping[str, Collection[str]] | None = None
    hook_error: str | None = None
    unconfirmed: str | None = None  # why the file as it is now is not what is followed
    # What the supervisor itself cannot do now, by "state" or the name of a runtime.
    amiss: Mapping[str, str] = field(default_factory=dict)
    confirmed: bool = True  # whether what the file no longer names may be removed
    targets: Selection | None = None  # None: everything; else the rest is left as it is

    def runtime_of(self, instance: Instance) -> str:
        return "docker" if isinstance(instance.workload, ContainerSpec) else self.process_runtime


@dataclass(frozen=True, slots=True)
class Assessment:
    """One desired instance and every workload that carries its id.

    `match` has the desired specification, running or not; `alive` and `ended` are the others.
    `diff` tells in what the newest of the others differs, where nothing alive is as desired.
    `readable` False: what its runtime runs is unknown, and an absent `match` says nothing.
    """

    instance: Instance
    runtime: str
    spec: Mapping[str, Any]
    hash: str
    match: ObservedWorkload | None
    alive: tuple[ObservedWorkload, ...]
    ended: tuple[ObservedWorkload, ...]
    diff: tuple[FieldDiff, ...]
    health: Health
    readable: bool = True
    healths: Mapping[str, Health] = field(default_factory=dict)  # of every workload, by its ref

    @property
    def runs(self) -> bool:
        return self.match is not None and is_alive(self.match)

    @property
    def running(self) -> ObservedWorkload | None:
        """What is alive for it, as desired or not."""
        return self.match if self.runs else next(iter(self.alive), None)

    @property
    def ours(self) -> tuple[ObservedWorkload, ...]:
        """Every workload that carries its id."""
        return (*((self.match,) if self.match is not None else ()), *self.alive, *self.ended)

    @property
    def gpus(self) -> set[str]:
        """Those that it has, and those that it is to have."""
        has = [workload for workload in (self.match, *self.alive) if workload is not None]
        return {*self.instance.gpus, *(uuid for item in has for uuid in item.identity.gpus)}

    @property
    def started_up(self) -> bool:
        """Whether the startup probe has passed; without one, running is all there is to know."""
        if self.match is None or not self.runs:
            return False
        if self.instance.probes.startup is None:
            return self.match.state in (RunState.RUNNING, RunState.PAUSED)
        return passes(self.health.startup)

    def loaded(self, placement: Placement) -> bool:
        state = self.placement(placement)
        return state.state is LoadState.LOADED and state.digest == placement.digest

    def placement(self, placement: Placement) -> PlacementState:
        found = (state for state in self.health.placements if state.model == placement.model)
        return next(found, PlacementState(placement.model, LoadState.UNKNOWN))

    @property
    def warmed_up(self) -> bool:
        """Whether what it is to answer before it is ready was answered."""
        return self.instance.warm_up is None or passes(self.health.warm_up)

    @property
    def lives(self) -> bool:
        """Its liveness probe passes, where it has one."""
        return self.instance.probes.liveness is None or passes(self.health.liveness)

    @property
    def placed_gpus(self) -> set[str]:
        """The GPUs that have a model: of a server of several models not necessarily all."""
        if not self.instance.shared:
            return {*self.instance.gpus}
        return {uuid for placement in self.instance.placements for uuid in placement.gpus}

    @property
    def serves(self) -> bool:
        """Everything that can be checked is as it should be; of an unprobed one that is little."""
        return (
            self.started_up
            and all(self.loaded(placement) for placement in self.instance.placements)
            and self.warmed_up
            and self.lives
            and (self.instance.probes.readiness is None or passes(self.health.readiness))
        )

    @property
    def serving(self) -> bool | None:
        """What probes and server say; None where they say nothing, or cannot tell."""
        if not self.runs:
            return False
        probes, health = self.instance.probes, self.health
        answers = [
            result.ok if result is not None else None
            for probe, result in (
                (probes.startup, health.startup),
                (probes.liveness, health.liveness),
                (probes.readiness, health.readiness),
            )
            if probe is not None
        ]
        for placement in self.instance.placements:
            unknown = self.placement(placement).state is LoadState.UNKNOWN
            answers.append(None if unknown else self.loaded(placement))
        if False in answers or not self.warmed_up:
            return False
        return None if None in answers or self.unprobed else True

    @property
    def ready(self) -> bool:
        """It serves, and a probe says so: nothing is ready by assumption."""
        return self.serves and not self.unprobed

    @property
    def unprobed(self) -> bool:
        probes = self.instance.probes
        return not (probes.startup or probes.liveness or probes.readiness)

    @property
    def live_failure(self) -> str | None:
        """Why the liveness probe says that it must be restarted."""
        probe = self.instance.probes.liveness
        if probe is None or not self.started_up:
            return None
        answers = _refusal(self.health.liveness, probe.failures)
        return None if answers is None else f"not alive: {answers}"

    @property
    def blind(self) -> str | None:
        """Why it has to be made anew: the container does not see its GPUs any more.

        Once may be a driver that is being reset; twice in a row is not.
        """
        answers = _refusal(self.health.devices, 2) if self.runs else None
        how = "as a systemd daemon-reload does in legacy mode"
        return (
            None if answers is None else f"it lost its GPU inside the container, {how}: {answers}"
        )

    def failure(self, entry: InstanceMemory, now: float) -> str | None:
        """Why what runs has failed, by its probes; None: it has not, as far as is known.

        One that was counted has, until they pass, also where a supervisor has just begun to ask.
        """
        seen = self.live_failure or self.overdue(entry.started_at, now)
        waits = entry.retry_at is not None and entry.attempt == self.hash
        counted = waits and entry.started is None and self.runs
        well = self.started_up and self.warmed_up and self.lives
        return entry.reason if seen is None and counted and not well else seen

    def blocked(self, why: Reason, until: float | None = None) -> Blocked:
        return Blocked(self.instance.id, why, self.instance.gpus, self.instance.model, until)

    def overdue(self, started_at: float | None, now: float) -> str | None:
        """Why its start counts as failed: the budget is spent, and the startup probe says no, or
        what warms it up is not answered.

        `started_at`, when we started it, and `now` are steady.

        An adopted instance spent its budget long ago. So what was not asked yet, or could not
        tell, says nothing, nor does the first failure of a probe that is allowed several.
        """
        probe, budget = self.instance.probes.startup, self.instance.start_timeout
        began = self.match.running_since if self.match else None
        started = began if began is not None else started_at
        if probe is None or not self.runs or started is None or now - started < budget:
            return None
        warming = self.started_up and not self.warmed_up
        asked = self.health.warm_up if warming else self.health.startup
        answers = _refusal(asked, probe.failures)
        return None if answers is None else f"not up within {budget:g} s: {answers}"


def is_alive(workload: ObservedWorkload) -> bool:
    """Whether it may hold a GPU. An unreadable state counts as holding it."""
    return workload.state in _ALIVE


def assess(
    desired: DesiredState, observed: ObservedState, context: Context, memory: Memory | None = None
) -> list[Assessment]:
    """One assessment per desired instance, in the order of their ids."""
    memory = memory or Memory()
    found = by_instance(workloads(observed))
    return [
        _assess(
            instance,
            found.get(instance.id, ()),
            observed,
            context,
            memory.of(instance.id),
        )
        for instance in sorted(desired.instances, key=lambda item: item.id)
    ]


def workloads(observed: ObservedState) -> Iterable[ObservedWorkload]:
    """Everything of ours, in every runtime, in a stable order."""
    found = [workload for view in observed.runtimes for workload in view.workloads]
    return sorted(found, key=lambda item: (item.identity.instance, item.name, item.ref))


def left_alone(workload: ObservedWorkload, why: Reason) -> Blocked:
    """Why nothing happens with what runs, by what it carries."""
    one = workload.identity
    return Blocked(one.instance, why, one.gpus, one.model)


def by_instance(found: Iterable[ObservedWorkload]) -> dict[str, list[ObservedWorkload]]:
    """The same by the ids that they carry, otherwise in the same order."""
    out: dict[str, list[ObservedWorkload]] = {}
    for workload in found:
        out.setdefault(workload.identity.instance, []).append(workload)
    return out


def with_containers(memory: Memory, observed: ObservedState) -> Memory:
    """With the ids of our containers, if they can be read: they are ours whoever renames them."""
    for view in observed.runtimes:
        if view.runtime == "docker" and view.error is None and view.off is None:
            return replace(memory, containers=known_from(view))
    return memory


def with_unexplained(
    memory: Memory, observed: ObservedState, assessments: Iterable[Assessment]
) -> Memory:
    """With what runs otherwise than it should where a runtime is first read after a loss.

    Of what was found then it keeps what still does. See Memory.unexplained.
    """
    if memory.unexplained is None:
        return memory
    as_desired = {item.instance.id for item in assessments if not item.alive}
    found: dict[str, tuple[str, ...]] = {}
    for view in observed.runtimes:
        if view.error is None and view.off is None:
            known = memory.unexplained.get(view.runtime)
            names = {one.identity.instance for one in view.workloads} - as_desired
            found[view.runtime] = tuple(sorted(names if known is None else names & {*known}))
    return replace(memory, unexplained={**memory.unexplained, **found})


def _assess(
    instance: Instance,
    found: Iterable[ObservedWorkload],
    observed: ObservedState,
    context: Context,
    entry: InstanceMemory,
) -> Assessment:
    if instance.warm_up is not None and not entry.cold:
        # What was ready before it was taken over, or before the file said so.
        instance = replace(instance, warm_up=None)
    instance = as_pulled(instance, entry.pulled)
    spec = specs.of_instance(instance, context.key)
    runtime = context.runtime_of(instance)
    # Alive first, and for certain, then the one that is known to have served, then the newest: of
    # two workloads with the same specification the one that serves is the instance, and the other
    # is left over.
    ordered = sorted(
        found,
        key=lambda item: (
            not is_alive(item),
            item.doubt is not None or item.state is RunState.UNKNOWN,
            not is_alive(item) or item.name != entry.started,
            -(item.created_at or 0.0),
        ),
    )
    diffs = [_diff(workload, instance, spec, runtime, entry.pulled) for workload in ordered]
    match = next((one for one, diff in zip(ordered, diffs, strict=True) if not diff), None)
    others = [workload for workload in ordered if workload is not match]
    diff = next((diff for diff in diffs if diff), ())
    if match is not None and (is_alive(match) or not is_alive(ordered[0])):
        diff = ()  # an ended one that has the desired specification only has to be started
    return Assessment(
        instance=instance,
        runtime=runtime,
        spec=spec,
        hash=_hash(spec, instance),
        match=match,
        alive=tuple(item for item in others if is_alive(item)),
        ended=tuple(item for item in others if not is_alive(item)),
        diff=diff,
        health=observed.health.get(match.ref, Health()) if match is not None else Health(),
        readable=any(v.runtime == runtime and v.error is None for v in observed.runtimes),
        healths=observed.health,
    )


def as_pulled(instance: Instance, pulled: Pulled | None) -> Instance:
    """The instance, with the digest at which its image was pulled for it."""
    workload = instance.workload
    if pulled is None or not isinstance(workload, ContainerSpec) or workload.image != pulled.image:
        return instance
    return replace(instance, workload=replace(workload, digest=pulled.digest))


def _diff(
    workload: ObservedWorkload,
    instance: Instance,
    spec: Mapping[str, Any],
    runtime: str,
    pulled: Pulled | None,
) -> tuple[FieldDiff, ...]:
    identity = workload.identity
    if workload.runtime != runtime:
        return (FieldDiff("runtime", workload.runtime, runtime),)
    if workload.doubt is not None:
        return ()  # nor over one whose record is to be written again first
    if identity.gpus != instance.gpus:
        return (FieldDiff("gpus", list(identity.gpus), list(instance.gpus)),)
    if identity.spec is None:
        return ()  # unknown is not different: nothing is restarted over an unreadable label
    found = specs.differences(identity.spec, spec)
    if pulled is None:
        return found
    # Only what was pulled on demand has its digest written down.
    return tuple(
        replace(one, before=one.before or pulled.before) if one.path == "digest" else one
        for one in found
    )


def _hash(spec: Mapping[str, Any], instance: Instance) -> str:
    parts = [specs.spec_hash(spec), *instance.gpus]
    parts += [f"{item.model}={item.digest}" for item in instance.placements]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def passes(result: ProbeResult | None) -> bool:
    return result is not None and result.ok is True


def _refusal(result: ProbeResult | None, times: int) -> str | None:
    """What a probe said that has said no at least so many times in a row; None: it has not."""
    if result is None or result.ok is not False or result.failures < times:
        return None
    return result.reason
