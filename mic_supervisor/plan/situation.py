"""Everything that one plan is decided on, and what follows from it at a glance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mic_supervisor.config.document import FLEET
from mic_supervisor.desired.claims import ORIGIN
from mic_supervisor.model import DesiredState, Gpu, ObservedState, ObservedWorkload
from mic_supervisor.plan.assess import Assessment, Context, is_alive, workloads
from mic_supervisor.plan.launch import Ports, assign
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.selection import drained
from mic_supervisor.plan.words import Reason


@dataclass(frozen=True)
class Lane:
    """What must be decided together: a connected set of GPUs, and of fixed ports.

    What happens in one lane never waits for another. `undesired` are workloads that no desired
    instance has the id of.
    """

    name: str
    wanted: tuple[Assessment, ...]
    undesired: tuple[ObservedWorkload, ...]


@dataclass(frozen=True)
class Situation:
    """The arguments of `reconcile`. What is derived from them is worked out once."""

    desired: DesiredState
    observed: ObservedState
    memory: Memory
    now: float
    context: Context
    assessments: Sequence[Assessment]

    def entry(self, item: Assessment) -> InstanceMemory:
        return self.memory.of(item.instance.id)

    @cached_property
    def by_id(self) -> Mapping[str, Assessment]:
        return {item.instance.id: item for item in self.assessments}

    @cached_property
    def gpus(self) -> Mapping[str, Gpu]:
        return {gpu.uuid: gpu for gpu in self.observed.inventory.gpus}

    @cached_property
    def indices(self) -> Mapping[str, int]:
        return self.observed.inventory.indices

    @cached_property
    def drained(self) -> Reason | None:
        """Why nothing is to run here: a person took the host out of service. What has to be removed
        altogether is removed all the same."""
        order = self.memory.drained
        return drained(order, self.observed.at) if order and not self.desired.down else None

    def called(self, what: str) -> str:
        """ "GPU 3" for a UUID; anything else is called as it is."""
        return f"GPU {self.indices[what]}" if what in self.indices else what

    @cached_property
    def workloads(self) -> tuple[ObservedWorkload, ...]:
        return tuple(workloads(self.observed))

    @cached_property
    def alive(self) -> tuple[ObservedWorkload, ...]:
        return tuple(workload for workload in self.workloads if is_alive(workload))

    @cached_property
    def _indices_of_workloads(self) -> Mapping[str | int, Sequence[int]]:
        found: defaultdict[str | int, list[int]] = defaultdict(list)
        for index, workload in enumerate(self.workloads):
            held = workload.identity
            names: tuple[str | int, ...] = (held.instance, *held.gpus, *held.ports.values())
            for what in names:
                found[what].append(index)
        return found

    def having(self, *what: str | int) -> list[ObservedWorkload]:
        """The workloads with one of these: an instance's id, a GPU's UUID, a host port.

        In the order of `workloads`. To go through all of them for each would be quadratic.
        """
        found = {index for one in what for index in self._indices_of_workloads.get(one, ())}
        return [self.workloads[index] for index in sorted(found)]

    def on_gpu(self, uuid: str) -> set[str]:
        """The instances that a workload on the GPU is of. What ended of one that is not desired
        any more counts: its processes take a moment to leave the driver's list.
        """
        return {
            workload.identity.instance
            for workload in self.having(uuid)
            if is_alive(workload) or workload.identity.instance not in self.by_id
        }

    @cached_property
    def ports(self) -> Ports:
        return Ports(self.observed)

    @cached_property
    def numbers(self) -> Mapping[str, Mapping[str, int] | None]:
        """The host ports of every desired instance, by its id."""
        return assign(self.assessments, self.ports.taken, self.context.port_range)

    @cached_property
    def instances_by_port(self) -> Mapping[int, Sequence[str]]:
        found: defaultdict[int, list[str]] = defaultdict(list)
        for instance, numbers in self.numbers.items():
            for number in (numbers or {}).values():
                found[number].append(instance)
        return found

    @cached_property
    def named(self) -> frozenset[str]:
        """The GPUs that the file has an instance on, or `none`."""
        given = {uuid for item in self.assessments for uuid in item.instance.gpus}
        return frozenset(given | {*self.desired.kept_empty})

    @cached_property
    def placed(self) -> frozenset[str]:
        """As `named`; of a server of several models, only the GPUs that have one."""
        given = {uuid for item in self.assessments for uuid in item.placed_gpus}
        return frozenset(given | {*self.desired.kept_empty})

    @cached_property
    def failed_on(self) -> Mapping[str, str]:
        """By model, an instance that the new specification failed on: no other one tries it."""
        return {
            item.instance.model: item.instance.id
            for item in self.assessments
            if self.entry(item).failed == item.hash
        }

    @cached_property
    def undesired(self) -> tuple[ObservedWorkload, ...]:
        """What no desired instance has the id of, and no unsatisfiable entry might mean. All of it
        has to stop where the host is drained."""
        return tuple(
            workload
            for workload in self.workloads
            if workload.identity.instance not in self.by_id
            and (self.drained is not None or not self.protects(workload))
        )

    def protects(self, workload: ObservedWorkload) -> bool:
        """Whether an unsatisfiable entry might mean it. Where it is not even known which GPU the
        entry means, that is everything of the same model on a GPU that is not there; of what the
        file hands over, everything.
        """
        identity = workload.identity
        lost = not set(identity.gpus) <= self.gpus.keys()
        return any(
            identity.instance in entry.instances
            or set(entry.gpus) & set(identity.gpus)
            or (lost and not entry.gpus and entry.model in (identity.model, None))
            for entry in self.desired.unsatisfiable
        )

    def is_chosen(self, item: Assessment) -> bool:
        return self.context.targets is None or self.context.targets.has(item.instance)

    @cached_property
    def needed(self) -> frozenset[str]:
        """The GPUs that the chosen are to have, and those chosen that are to be kept empty."""
        given = {u for item in self.assessments if self.is_chosen(item) for u in item.instance.gpus}
        targets = self.context.targets
        empty = {u for u in self.desired.kept_empty if targets is None or u in targets.gpus}
        return frozenset(given | empty)

    def is_unconfirmed(self, workload: ObservedWorkload) -> bool:
        """Whether the file merely does not name its GPUs, not even as `none`.

        A file cut short names fewer GPUs, and only a person can tell that from a removal.
        """
        return not self.context.confirmed and not self.is_put_off(workload)

    def is_put_off(self, workload: ObservedWorkload) -> bool:
        """Whether a profile that is not on has it where the file does not name its GPUs now."""
        one = workload.identity
        left = {*one.gpus} - self.named
        claimed = one.origin == ORIGIN and self.is_of_profile(FLEET, left)
        return claimed or self.is_of_profile(one.model, left)

    def is_of_profile(self, model: str, gpus: Collection[str]) -> bool:
        """Whether a profile that is not on has the model, or a server's, on each of these GPUs: to
        put it off was a person's word on that. Another model there is merely not named. `fleet`
        stands for all that claims have.
        """
        return {(uuid, model) for uuid in gpus} <= {*self.desired.aside}

    @cached_property
    def lanes(self) -> list[Lane]:
        """By name, which is the smallest of a lane's members: no order of anything enters."""
        lanes = _Lanes()
        for item in self.assessments:
            fixed = [f"port {port.host}" for port in item.instance.workload.ports if port.host]
            lanes.join((*item.instance.gpus, *fixed))
        for workload in self.alive:
            held = [f"port {number}" for number in workload.identity.ports.values()]
            lanes.join((*_gpus(workload), *held))
        found: dict[str, tuple[list[Assessment], list[ObservedWorkload]]] = {}
        for item in self.assessments:
            found.setdefault(lanes.of(item.instance.gpus[0]), ([], []))[0].append(item)
        for workload in self.undesired:
            found.setdefault(lanes.of(_gpus(workload)[0]), ([], []))[1].append(workload)
        return [Lane(name, tuple(one), tuple(two)) for name, (one, two) in sorted(found.items())]


def _gpus(workload: ObservedWorkload) -> tuple[str, ...]:
    return workload.identity.gpus or (workload.name,)


class _Lanes:
    """Connected sets of GPUs and ports."""

    def __init__(self) -> None:
        self._sets: dict[str, set[str]] = {}

    def join(self, members: Iterable[str]) -> None:
        whole = {other for member in members for other in self._sets.get(member, {member})}
        self._sets.update(dict.fromkeys(whole, whole))

    def of(self, member: str) -> str:
        return min(self._sets.get(member, {member}))
