"""What has to go from a lane, when it may, and what a start has to wait for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from mic_supervisor.model import ObservedWorkload
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.actions import Drain, Step, Stop, Withdraw
from mic_supervisor.plan.assess import Assessment, is_alive
from mic_supervisor.plan.bring_up import BringUp, host_ports

_Key = tuple[str, str]


class Departures:
    """The steps that stop what must go, by workload."""

    def __init__(self) -> None:
        self._steps: dict[_Key, tuple[ObservedWorkload, list[Step]]] = {}

    def __contains__(self, workload: ObservedWorkload) -> bool:
        return _key(workload) in self._steps

    def add(self, workload: ObservedWorkload, steps: list[Step]) -> None:
        self._steps[_key(workload)] = (workload, steps)

    def of(self, workload: ObservedWorkload) -> list[Step]:
        return self._steps[_key(workload)][1] if workload in self else []

    def before(self, item: Assessment, up: BringUp) -> list[str]:
        """The ids of the steps after which the GPUs and the ports of a start are free."""
        return [
            steps[-1].id
            for workload, steps in self._steps.values()
            if needs(item, up, workload) is not None
        ]


def departures(
    wanted: Sequence[Assessment],
    orphans: Iterable[ObservedWorkload],
    ups: Mapping[str, BringUp],
    serving: Mapping[str, ObservedWorkload | None],
    held: Collection[str] = (),
    withdraws: bool = False,
) -> Departures:
    """Every workload that is alive and neither serves nor is waited for by someone.

    It is stopped after all that follows on its GPUs was prepared. While one that follows cannot
    start, it stays: a model that runs is worth more than an empty GPU. What instances that are
    `held` run stays in any case. `withdraws`: there is somebody to be told before a stop.
    """
    out = Departures()
    owners = {item.instance.id: item for item in wanted}
    going = [w for item in wanted for w in (item.match, *item.alive) if w is not None]
    for workload in [w for w in (*going, *orphans) if is_alive(w)]:
        instance = workload.identity.instance
        if instance in held:
            continue
        up, kept = ups.get(instance), serving.get(instance)
        if kept is not None and _key(kept) == _key(workload) and (up is None or up.stops is None):
            continue
        followers = [item for item in wanted if _follows(item, workload)]
        if any(
            item.instance.id not in ups and not _alive(serving[item.instance.id])
            for item in followers
        ):
            continue
        early = [
            ups[item.instance.id].early[-1].id
            for item in wanted
            if item.instance.id in ups
            and ups[item.instance.id].early
            and needs(item, ups[item.instance.id], workload) is not None
        ]
        out.add(workload, _stop(workload, owners.get(instance), tuple(early), withdraws))
    return out


def needs(item: Assessment, up: BringUp, workload: ObservedWorkload) -> str | None:
    """What a start needs that the workload has: a GPU's UUID, "port 8000", or None."""
    for uuid in item.instance.gpus:
        if uuid in workload.identity.gpus:
            return uuid
    if workload.identity.instance == item.instance.id:
        return item.instance.gpus[0]
    taken = host_ports(up.late) & set(workload.identity.ports.values())
    return f"port {min(taken)}" if taken else None


def _follows(item: Assessment, workload: ObservedWorkload) -> bool:
    same = item.instance.id == workload.identity.instance
    return same or bool(set(item.instance.gpus) & set(workload.identity.gpus))


def _key(workload: ObservedWorkload) -> _Key:
    return workload.runtime, workload.name


def _alive(workload: ObservedWorkload | None) -> bool:
    return workload is not None and is_alive(workload)


def _stop(
    workload: ObservedWorkload, owner: Assessment | None, after: tuple[str, ...], withdraws: bool
) -> list[Step]:
    """Have nobody sent there any more, drain where the backend knows how, then stop.

    As the file says now, if it still says something of this instance and of the backend that runs
    it; else as it was recorded at the start.
    """
    identity = workload.identity
    instance = identity.instance
    signal, grace = specs.stop_parameters(identity.spec)
    drain = specs.drain_parameters(identity.spec)
    if owner is not None and owner.instance.backend == identity.backend:
        desired = owner.instance
        signal, grace = desired.workload.stop_signal, desired.workload.stop_timeout
        drain = (desired.drain, desired.drain_timeout) if desired.drain is not None else None
    steps: list[Step] = []
    if withdraws:
        withdraw = Withdraw(f"withdraw {workload.name}", instance, workload, depends_on=after)
        steps.append(withdraw)
        after = (withdraw.id,)
    if drain is not None and drain[1] > 0:
        step = Drain(
            f"drain {workload.name}",
            instance,
            workload,
            *drain,
            listen=specs.listen_address(identity.spec),
            depends_on=after,
        )
        steps.append(step)
        after = (step.id,)
    stop = Stop(f"stop {workload.name}", instance, workload, signal, grace, depends_on=after)
    return [*steps, stop]
