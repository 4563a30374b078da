"""What has to go from a lane, when it may, and what a start has to wait for.

Of what ended one is kept: it is what a rollback starts, and it has the last log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mic_supervisor.model import ObservedWorkload, RunState
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.actions import (
    Blocked,
    Change,
    Drain,
    Restart,
    Step,
    Stop,
    ToWorkload,
    Withdraw,
)
from mic_supervisor.plan.assess import Assessment, by_instance, is_alive
from mic_supervisor.plan.bring_up import BringUp, host_ports
from mic_supervisor.plan.memory import InstanceMemory
from mic_supervisor.plan.situation import Lane, Situation
from mic_supervisor.plan.words import Reason

_Key = tuple[str, str]


class Departures:
    """The steps that stop what must go, by workload."""

    def __init__(self) -> None:
        self._steps: dict[_Key, list[ToWorkload]] = {}

    def __contains__(self, workload: ObservedWorkload) -> bool:
        return _key(workload) in self._steps

    def add(self, workload: ObservedWorkload, steps: list[ToWorkload]) -> None:
        self._steps[_key(workload)] = steps

    def of(self, workload: ObservedWorkload) -> list[ToWorkload]:
        return self._steps.get(_key(workload), [])

    def before(self, item: Assessment, up: BringUp) -> list[str]:
        """The ids of the steps after which the GPUs and the ports of a start are free."""
        return [
            steps[-1].id
            for steps in self._steps.values()
            if needs(item, up.late, steps[-1].workload) is not None
        ]


def departures(
    s: Situation,
    lane: Lane,
    undesired: Iterable[ObservedWorkload],
    bring_ups: Mapping[str, BringUp],
    serving: Mapping[str, ObservedWorkload | None],
) -> Departures:
    """Every workload that is alive and neither serves nor is waited for by someone.

    It is stopped after all that follows on its GPUs was prepared. While one that follows cannot
    start, it stays: a model that runs is worth more than an empty GPU. One that was not chosen does
    not keep a GPU from those that were.
    """
    out = Departures()
    going = [workload for item in lane.wanted for workload in item.ours]
    for workload in [w for w in (*going, *undesired) if is_alive(w)]:
        instance = workload.identity.instance
        up, kept = bring_ups.get(instance), serving.get(instance)
        if kept is not None and _key(kept) == _key(workload) and (up is None or up.stops is None):
            continue
        all_the_same = s.needed.isdisjoint(workload.identity.gpus)
        concerned = [item for item in lane.wanted if all_the_same or s.is_chosen(item)]
        if any(
            item.instance.id not in bring_ups and not _alive(serving[item.instance.id])
            for item in concerned
            if follows(item, workload)
        ):
            continue
        early = tuple(
            follower.early[-1].id
            for item in concerned
            if (follower := bring_ups.get(item.instance.id)) is not None
            and follower.early
            and needs(item, follower.late, workload) is not None
        )
        out.add(workload, stop_steps(s, workload, early))
    return out


def needs(item: Assessment, start: Step, workload: ObservedWorkload) -> str | None:
    """What a start needs that the workload has: a GPU's UUID, "port 8000", or None."""
    for uuid in item.instance.gpus:
        if uuid in workload.identity.gpus:
            return uuid
    if workload.identity.instance == item.instance.id:
        return item.instance.gpus[0]
    taken = host_ports(start) & set(workload.identity.ports.values())
    return f"port {min(taken)}" if taken else None


def follows(item: Assessment, workload: ObservedWorkload) -> bool:
    same = item.instance.id == workload.identity.instance
    return same or bool(set(item.instance.gpus) & set(workload.identity.gpus))


def _key(workload: ObservedWorkload) -> _Key:
    return workload.runtime, workload.name


def _alive(workload: ObservedWorkload | None) -> bool:
    return workload is not None and is_alive(workload)


def stop_steps(
    s: Situation, workload: ObservedWorkload, after: tuple[str, ...] = ()
) -> list[ToWorkload]:
    """Have nobody sent there any more, drain where the backend knows how, then stop.

    As the file says now, if it still says something of this instance and of the backend that runs
    it; else as it was recorded at the start.
    """
    identity = workload.identity
    instance = identity.instance
    signal, grace = specs.stop_parameters(identity.spec)
    drain = specs.drain_parameters(identity.spec)
    owner = s.by_id.get(instance)
    if owner is not None and owner.instance.backend == identity.backend:
        desired = owner.instance
        signal, grace = desired.workload.stop_signal, desired.workload.stop_timeout
        drain = (desired.drain, desired.drain_timeout) if desired.drain is not None else None
    steps: list[ToWorkload] = []
    if s.desired.hook is not None:
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


def left_over(item: Assessment, entry: InstanceMemory) -> list[ObservedWorkload]:
    """Beside an instance that runs."""
    kept = _to_keep(item.ended, entry)
    return [workload for workload in item.ended if workload is not kept]


def superseded(item: Assessment, up: BringUp, entry: InstanceMemory) -> list[ObservedWorkload]:
    """By a start that is about to be made. What never ran goes before it: see `cleared`."""
    if isinstance(up.late, Restart):
        others = [w for w in item.ended if w is not up.late.workload]
    else:
        others = [*item.ended]
    # What serves until now becomes the one to keep.
    kept = None if item.alive else _to_keep(others, entry)
    out = [workload for workload in others if workload is not kept]
    match = item.match
    if match is not None and not is_alive(match) and not isinstance(up.late, Restart):
        # The start replaces the record of the same name; another name is left behind.
        out += [match] if match.name != up.target else []
    return [workload for workload in out if workload.state is not RunState.CREATED]


def _to_keep(ended: Sequence[ObservedWorkload], entry: InstanceMemory) -> ObservedWorkload | None:
    """The last good one, else the newest that ever ran."""
    ran = [workload for workload in ended if workload.state is not RunState.CREATED]
    good = [workload for workload in ran if workload.name == entry.ready_workload]
    return next(iter([*good, *ran]), None)


def drain(s: Situation, lane: Lane, why: Reason) -> tuple[list[Change], list[Blocked]]:
    """Of a host that is out of service: what is alive in the lane stops, whoever wants it, and what
    is not does not start.

    Nothing is removed: what stopped is what starts again. What cannot be read, is in doubt or
    paused is left as it is here, too.
    """
    changes: list[Change] = []
    blocked: list[Blocked] = []
    for item in lane.wanted:
        one = item.instance
        where = (one.id, one.model, one.backend, one.gpus)
        stop = _stop(s, lane, where, item.ours, why)
        if stop is not None:
            changes.append(stop)
        else:
            blocked.append(item.blocked(why))
    for instance, found in by_instance(lane.undesired).items():
        last = found[0].identity
        where = (instance, last.model, last.backend, last.gpus)
        stop = _stop(s, lane, where, found, why)
        changes += [stop] if stop is not None else []
    return changes, blocked


def _stop(
    s: Situation,
    lane: Lane,
    where: tuple[str, str, str, tuple[str, ...]],
    found: Iterable[ObservedWorkload],
    why: Reason,
) -> Change | None:
    steps = [step for one in found if is_alive(one) for step in stop_steps(s, one)]
    return Change("stop", *where, lane.name, why, steps=tuple(steps)) if steps else None
