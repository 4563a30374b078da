"""Desired and observed state in, a plan out.

How a lane is decided, in this order; the numbers stand again in the code:

1. What cannot be read is frozen. An unreadable runtime may run a container of ours on any GPU that
   is not known to be another runtime's, so nothing is started or stopped there.
2. Every workload that is alive in a lane and is not the match of a desired instance must go. It is
   stopped only when each instance that follows on its GPUs is prepared, and created if its runtime
   can create ahead. If a follower is blocked, it stays: a model that runs is worth more than an
   empty GPU. A GPU that is to be kept empty has no follower.
3. An instance without a running match is started, unless it waits for its backoff, a stranger is in
   the way, or its specification failed and an earlier one takes over (rollback).
4. An instance that runs and is unhealthy is restarted in place, with the same patience.
5. An instance that runs and lacks a model, or has it with another configuration, gets it loaded.
6. Of one model, no more instances change at a time than its rollout allows.
7. What ended and is neither a match nor the predecessor to roll back to is removed.
"""

from __future__ import annotations

from dataclasses import replace

from mic_supervisor.model import (
    DesiredState,
    LoadState,
    ObservedState,
    ObservedWorkload,
    RunState,
)
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.actions import (
    Blocked,
    Change,
    ChangeKind,
    Drain,
    FieldDiff,
    Load,
    Plan,
    Release,
    Remove,
    Restart,
    Start,
    Step,
    Stop,
)
from mic_supervisor.plan.assess import Assessment, Context, assess, is_alive, workloads
from mic_supervisor.plan.bring_up import BringUp, Surroundings, blocked, bring_up, host_ports
from mic_supervisor.plan.health import rollback_target
from mic_supervisor.plan.lanes import Lanes
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.obstacles import Ports, warnings
from mic_supervisor.plan.rollout import roll


def reconcile(
    desired: DesiredState,
    observed: ObservedState,
    memory: Memory,
    now: float,
    context: Context,
    assessments: list[Assessment] | None = None,
) -> Plan:
    """The plan that takes the machine one round nearer to the desired state.

    Equal arguments give equal plans. `assessments` spares the work where the caller has them.
    """
    if assessments is None:
        assessments = assess(desired, observed, context)
    return _Round(desired, observed, memory, now, context, assessments).plan()


class _Round:
    """The working state of one call of `reconcile`. Lives as long as the call."""

    def __init__(
        self,
        desired: DesiredState,
        observed: ObservedState,
        memory: Memory,
        now: float,
        context: Context,
        assessments: list[Assessment],
    ) -> None:
        self.desired = desired
        self.observed = observed
        self.memory = memory
        self.now = now
        self.context = context
        self.assessments = assessments
        self.gpus = {gpu.uuid: gpu for gpu in observed.inventory.gpus}
        self.ports = Ports(observed)
        self.reserved: set[int] = set()
        self.lanes = self._join_lanes()
        self.changes: list[Change] = []
        self.blocked: list[Blocked] = []

    def plan(self) -> Plan:
        for entry in self.desired.unsatisfiable:
            name = entry.instances[0] if entry.instances else entry.subject
            self.blocked.append(Blocked(name, entry.reason, entry.gpus, entry.model, entry.hint))
        if self.observed.inventory.error is not None:  # 1
            reason = f"the GPUs cannot be read: {self.observed.inventory.error}"
            self.blocked += [blocked(item, reason) for item in self.assessments]
        else:
            for lane, (wanted, orphans) in sorted(self._by_lane().items()):
                self._lane(lane, wanted, orphans)
        changes = sorted(self.changes, key=lambda item: (item.lane, item.instance, item.kind))
        return Plan(
            changes=roll(changes, self.assessments, self.context),  # 6
            blocked=tuple(sorted(self.blocked, key=lambda item: (item.instance, item.reason))),
            warnings=tuple(warnings(self.desired, self.observed)),
            next_wake=min((b.until for b in self.blocked if b.until is not None), default=None),
        )

    # --- lanes ------------------------------------------------------------------------------

    def _join_lanes(self) -> Lanes:
        lanes = Lanes()
        for item in self.assessments:
            fixed = [f"port {port.host}" for port in item.instance.workload.ports if port.host]
            lanes.join((*item.instance.gpus, *fixed))
        for workload in workloads(self.observed):
            if is_alive(workload):
                held = [f"port {number}" for number in workload.identity.ports.values()]
                lanes.join((*(workload.identity.gpus or (workload.name,)), *held))
        return lanes

    def _by_lane(self) -> dict[str, tuple[list[Assessment], list[ObservedWorkload]]]:
        out: dict[str, tuple[list[Assessment], list[ObservedWorkload]]] = {}
        for item in self.assessments:
            lane = self.lanes.of(item.instance.gpus[0])
            out.setdefault(lane, ([], []))[0].append(item)
        for orphan in self._orphans():
            lane = self.lanes.of((orphan.identity.gpus or (orphan.name,))[0])
            out.setdefault(lane, ([], []))[1].append(orphan)
        return out

    def _orphans(self) -> list[ObservedWorkload]:
        """What no desired instance has the id of, and no entry in trouble might mean."""
        wanted = {item.instance.id for item in self.assessments}
        ids = {name for entry in self.desired.unsatisfiable for name in entry.instances}
        gpus = {uuid for entry in self.desired.unsatisfiable for uuid in entry.gpus}
        return [
            workload
            for workload in workloads(self.observed)
            if workload.identity.instance not in wanted | ids
            and not gpus & set(workload.identity.gpus)
        ]

    def _lane(self, lane: str, wanted: list[Assessment], orphans: list[ObservedWorkload]) -> None:
        frozen = self._frozen(wanted, orphans)
        if frozen is not None:  # 1
            self.blocked += [blocked(item, frozen) for item in wanted if not item.ready]
            return
        orphans = self._confirmed(orphans)
        leaving = {orphan.identity.instance for orphan in orphans}
        ups: dict[str, BringUp] = {}
        serving: dict[str, ObservedWorkload | None] = {}
        for item in wanted:  # 3, 4
            serving[item.instance.id], up = self._bring_up(item, leaving)
            if isinstance(up, Blocked):
                self.blocked.append(up)
            elif up is not None:
                ups[item.instance.id] = up
                self.reserved |= host_ports(up.late)
        stops = self._stops(wanted, orphans, ups, serving)  # 2
        for item in wanted:
            self._instance(lane, item, ups.get(item.instance.id), stops)
        self._leavers(lane, wanted, orphans, stops)

    def _frozen(self, wanted: list[Assessment], orphans: list[ObservedWorkload]) -> str | None:
        concerned = {item.runtime for item in wanted} | {item.runtime for item in orphans}
        settled = all(item.runs and not item.alive for item in wanted) and not orphans
        for view in self.observed.runtimes:
            if view.error is not None and (view.runtime in concerned or not settled):
                return f"what {view.runtime} runs is unknown: {view.error}"
        return None

    def _confirmed(self, orphans: list[ObservedWorkload]) -> list[ObservedWorkload]:
        """The orphans that may go. A file cut short names fewer GPUs, and only a person can tell
        that from a removal; a GPU that the file names for something else is clear.
        """
        if self.context.confirmed:
            return orphans
        named = {uuid for item in self.assessments for uuid in item.instance.gpus}
        named |= set(self.desired.kept_empty)
        held = [item for item in orphans if not set(item.identity.gpus) <= named]
        for workload in {item.identity.instance: item for item in held}.values():
            self.blocked.append(
                Blocked(
                    workload.identity.instance,
                    "the file no longer names it; its removal waits to be confirmed",
                    workload.identity.gpus,
                    workload.identity.model,
                    "confirm with `mic-supervisor apply` or `systemctl reload mic`",
                )
            )
        return [item for item in orphans if item not in held]

    # --- one instance -------------------------------------------------------------------------

    def _bring_up(
        self, item: Assessment, leaving: set[str]
    ) -> tuple[ObservedWorkload | None, BringUp | Blocked | None]:
        """(the workload that may stay alive, how to bring the instance up if that is due)."""
        entry = self.memory.of(item.instance.id)
        if entry.failed == item.hash and (back := self._predecessor(item, entry)) is not None:
            why = f"the new specification failed ({entry.reason}); the last good one runs"
            self.blocked.append(
                blocked(item, why, hint="change the file, or: mic-supervisor retry")
            )
            if is_alive(back):
                return back, None
            restart = Restart(f"restart {back.name}", item.instance.id, back)
            return back, BringUp("start", f"rollback: {entry.reason}", (), restart)
        unhealthy = item.live_failure or item.overdue(entry.started_at, self.now)
        forced = item.instance.id in self.context.forced
        if item.runs and unhealthy is None and not forced:
            return item.match, None
        if entry.retry_at is not None and entry.retry_at > self.now and not forced:
            reason = f"backoff: {entry.reason}"
            return item.match, blocked(item, reason, until=entry.retry_at)
        around = Surroundings(self.observed, self.gpus, self.ports, self.reserved, leaving)
        return item.match, bring_up(item, entry, unhealthy, around, self.context)

    def _predecessor(self, item: Assessment, entry: InstanceMemory) -> ObservedWorkload | None:
        name = rollback_target(entry, item)
        return next((w for w in (*item.alive, *item.ended) if w.name == name), None)

    def _stops(
        self,
        wanted: list[Assessment],
        orphans: list[ObservedWorkload],
        ups: dict[str, BringUp],
        serving: dict[str, ObservedWorkload | None],
    ) -> dict[str, list[Step]]:
        """The steps that stop what must go, by the name of the workload."""
        stops: dict[str, list[Step]] = {}
        owners = {item.instance.id: item for item in wanted}
        going = [w for item in wanted for w in (item.match, *item.alive) if w is not None]
        for workload in [w for w in (*going, *orphans) if is_alive(w)]:
            instance = workload.identity.instance
            up = ups.get(instance)
            kept = serving.get(instance)
            if kept is not None and kept.name == workload.name and (up is None or up.stops is None):
                continue
            followers = [
                item
                for item in wanted
                if item.instance.id == instance
                or set(item.instance.gpus) & set(workload.identity.gpus)
            ]
            waiting = [
                item
                for item in followers
                if item.instance.id not in ups and not _alive(serving[item.instance.id])
            ]
            if waiting:
                continue
            early = [
                ups[i.instance.id].early[-1].id
                for i in followers
                if i.instance.id in ups and ups[i.instance.id].early
            ]
            stops[workload.name] = _stop(workload, owners.get(instance), tuple(early))
        return stops

    def _instance(
        self,
        lane: str,
        item: Assessment,
        up: BringUp | None,
        stops: dict[str, list[Step]],
    ) -> None:
        instance = item.instance
        mine = [w for w in (item.match, *item.alive) if w is not None and w.name in stops]
        steps: list[Step] = [step for workload in mine for step in stops[workload.name]]
        if up is None:
            if steps:  # two of one instance: the second serves nobody and holds the GPU
                failed = self.memory.of(instance.id).failed == item.hash
                cause = "it failed, and the last good one runs" if failed else "it runs twice"
                self._change("stop", lane, item, cause, steps)
            self._loads(lane, item)
            self._leftovers(lane, item, steps)
            return
        # The start waits for everything that leaves these GPUs, whoever stops it.
        before = [
            step.id
            for name, sequence in stops.items()
            for step in sequence[-1:]
            if self._overlaps(name, instance.gpus)
        ]
        before += [step.id for step in up.early[-1:]]
        former = self._former(item, stops)
        late: list[Step] = []
        if former and not all(self.gpus[uuid].simulated for uuid in instance.gpus):
            release = Release(
                f"release {instance.id}",
                instance.id,
                instance.gpus,
                former,
                depends_on=tuple(before),
            )
            late.append(release)
            before = [release.id]
        start = replace(up.late, depends_on=tuple(before))
        late.append(start)
        for workload in self._superseded(item, up, keep_newest=not item.alive):
            late.append(
                Remove(f"remove {workload.name}", instance.id, workload, depends_on=(start.id,))
            )
        self._change(up.kind, lane, item, up.cause, [*up.early, *steps, *late])

    def _loads(self, lane: str, item: Assessment) -> None:
        """5. Only a server that answers can say what it has loaded."""
        entry = self.memory.of(item.instance.id)
        if not item.started_up or item.match is None:
            return
        due = [
            placement
            for placement in item.instance.placements
            if not item.loaded(placement)
            and item.placement(placement).state not in (LoadState.LOADING, LoadState.UNKNOWN)
        ]
        if not due:
            return
        if entry.retry_at is not None and entry.retry_at > self.now:
            self.blocked.append(blocked(item, f"backoff: {entry.reason}", until=entry.retry_at))
            return
        for placement in due:
            state = item.placement(placement)
            before, after = dict(state.summary), dict(placement.summary)
            diff = tuple(
                FieldDiff(key, before.get(key), after.get(key))
                for key in sorted({*before, *after})
                if before.get(key) != after.get(key)
            )
            if state.state is LoadState.LOADED:
                changed = ", ".join(entry.path for entry in diff) or "its configuration"
                cause = f"{changed} changed"
            else:
                cause = f"the server does not have {placement.model} loaded"
            step = Load(
                f"load {placement.model} into {item.match.name}",
                item.instance.id,
                item.match,
                placement,
            )
            self._change("load", lane, item, cause, [step], diff)

    def _leftovers(self, lane: str, item: Assessment, stops: list[Step]) -> None:
        """7. The newest ended one is kept: it is what a rollback starts, and has the last log."""
        extra = [w for w in item.ended if w.state is RunState.CREATED]
        extra += [w for w in item.ended if w.state is not RunState.CREATED][1:]
        if extra and item.runs and not stops:
            steps: list[Step] = [Remove(f"remove {w.name}", item.instance.id, w) for w in extra]
            self._change("remove", lane, item, "left over from an earlier specification", steps)

    def _superseded(
        self, item: Assessment, up: BringUp, *, keep_newest: bool
    ) -> list[ObservedWorkload]:
        started = up.late.workload.name if isinstance(up.late, Restart) else None
        ended_ones = [w for w in item.ended if w.name != started]
        never = [w for w in ended_ones if w.state is RunState.CREATED]
        ran = [w for w in ended_ones if w.state is not RunState.CREATED]
        if item.match is not None and not is_alive(item.match) and started is None:
            # The start replaces the record of the same name; another name is left behind.
            name = up.late.launch.name if isinstance(up.late, Start) else None
            if item.match.name != name:
                never.append(item.match)
        return [*never, *ran[1 if keep_newest else 0 :]]

    def _leavers(
        self,
        lane: str,
        wanted: list[Assessment],
        orphans: list[ObservedWorkload],
        stops: dict[str, list[Step]],
    ) -> None:
        by_instance: dict[str, list[ObservedWorkload]] = {}
        for orphan in orphans:
            by_instance.setdefault(orphan.identity.instance, []).append(orphan)
        for instance, found in by_instance.items():
            steps: list[Step] = []
            for workload in found:
                stop = stops.get(workload.name, [])
                if is_alive(workload) and not stop:
                    continue  # what follows it is blocked, so it stays
                after = (stop[-1].id,) if stop else ()
                steps += stop
                steps.append(
                    Remove(f"remove {workload.name}", instance, workload, depends_on=after)
                )
            if steps:
                identity = found[0].identity
                self.changes.append(
                    Change(
                        "remove",
                        instance,
                        identity.model,
                        identity.backend,
                        identity.gpus,
                        lane,
                        self._why_leaving(found[0], wanted),
                        steps=tuple(steps),
                    )
                )

    # --- small change -------------------------------------------------------------------------

    def _why_leaving(self, workload: ObservedWorkload, wanted: list[Assessment]) -> str:
        gpus = set(workload.identity.gpus)
        for item in wanted:
            if gpus & set(item.instance.gpus):
                return f"the file has {item.instance.model} on its GPU"
        if gpus & set(self.desired.kept_empty):
            return "its GPU is to be kept empty"
        return "the file no longer names it"

    def _overlaps(self, name: str, gpus: tuple[str, ...]) -> bool:
        found = next(w for w in workloads(self.observed) if w.name == name)
        return bool(set(found.identity.gpus) & set(gpus)) or not found.identity.gpus

    def _former(
        self, item: Assessment, stops: dict[str, list[Step]]
    ) -> tuple[ObservedWorkload, ...]:
        """The workloads that had these GPUs last."""
        return tuple(
            workload
            for workload in workloads(self.observed)
            if set(workload.identity.gpus) & set(item.instance.gpus)
            and (workload.name in stops or workload == item.match)
        )

    def _change(
        self,
        kind: ChangeKind,
        lane: str,
        item: Assessment,
        cause: str,
        steps: list[Step],
        diff: tuple[FieldDiff, ...] | None = None,
    ) -> None:
        instance = item.instance
        self.changes.append(
            Change(
                kind,
                instance.id,
                instance.model,
                instance.backend,
                instance.gpus,
                lane,
                cause,
                item.diff if diff is None else diff,
                tuple(steps),
            )
        )


def _alive(workload: ObservedWorkload | None) -> bool:
    return workload is not None and is_alive(workload)


def _stop(
    workload: ObservedWorkload, owner: Assessment | None, after: tuple[str, ...]
) -> list[Step]:
    """Drain where the backend knows how, then stop."""
    instance = workload.identity.instance
    signal, grace = specs.stop_parameters(workload.identity.spec)
    steps: list[Step] = []
    if owner is not None:
        desired = owner.instance
        signal, grace = desired.workload.stop_signal, desired.workload.stop_timeout
        if desired.drain is not None and desired.drain_timeout > 0:
            drain = Drain(
                f"drain {workload.name}",
                instance,
                workload,
                desired.drain,
                desired.drain_timeout,
                depends_on=after,
            )
            steps.append(drain)
            after = (drain.id,)
    stop = Stop(f"stop {workload.name}", instance, workload, signal, grace, depends_on=after)
    return [*steps, stop]
