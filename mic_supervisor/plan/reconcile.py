"""Desired and observed state in, a plan out.

How a lane is decided, in this order; the numbers stand again in the code:

1. What cannot be read is frozen. An unreadable runtime may run a container of ours on any GPU that
   is not known to be another runtime's, so nothing is started or stopped there.
2. Every workload that is alive in a lane and is not the match of a desired instance must go. It is
   stopped only when each instance that follows on its GPUs is prepared, and created if its runtime
   can create ahead. If a follower is blocked, it stays: a model that runs is worth more than an
   empty GPU. A GPU that is to be kept empty has no follower. And nothing starts beside what stays.
3. An instance without a running match is started, unless it waits for its backoff, a stranger is in
   the way, or its specification failed and an earlier one takes over (rollback).
4. An instance that runs and is unhealthy is restarted in place, with the same patience.
5. An instance that runs and lacks a model, or has it with another configuration, gets it loaded.
6. Of one model, no more instances change at a time than its rollout allows, and none after one was
   rolled back.
7. What ended and is neither a match nor the predecessor to roll back to is removed.
8. What is paused, in doubt, or was not chosen, is left as it is: see plan/holds.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mic_supervisor.config.document import CONFIRM, WAY_OUT
from mic_supervisor.model import (
    DesiredState,
    ObservedState,
    ObservedWorkload,
    RunState,
)
from mic_supervisor.plan.actions import (
    Blocked,
    Change,
    ChangeKind,
    FieldDiff,
    Load,
    Plan,
    Release,
    Remove,
    Step,
    Unload,
)
from mic_supervisor.plan.amounts import lets_go
from mic_supervisor.plan.assess import Assessment, Context, assess, is_alive, workloads
from mic_supervisor.plan.bring_up import (
    RETRY,
    BringUp,
    blocked,
    bring_up,
    cleared,
    fall_back,
    unhealthy_gpu,
)
from mic_supervisor.plan.departures import Departures, departures, needs
from mic_supervisor.plan.fallback import fallback
from mic_supervisor.plan.holds import Holds, left_out
from mic_supervisor.plan.lanes import Lanes
from mic_supervisor.plan.leftovers import left_over, superseded
from mic_supervisor.plan.memory import InstanceMemory, Memory, Paused
from mic_supervisor.plan.obstacles import (
    Ports,
    Surroundings,
    adoption_warnings,
    left_behind,
    warnings,
)
from mic_supervisor.plan.ports import assign
from mic_supervisor.plan.render import gpu_names
from mic_supervisor.plan.rollout import roll


def reconcile(
    desired: DesiredState,
    observed: ObservedState,
    memory: Memory,
    now: float,
    context: Context,
    assessments: Sequence[Assessment] | None = None,
) -> Plan:
    """The plan that takes the machine one round nearer to the desired state.

    Equal arguments give equal plans. `assessments` spares the work where the caller has them.
    """
    if assessments is None:
        assessments = assess(desired, observed, context, memory)
    decided = _Round(desired, observed, memory, now, context, assessments)
    if not decided.holds.any:
        return decided.plan()
    # What would be done without these holds, so that it can be told. Only where there are any.
    everything = replace(context, targets=None)
    free = replace(memory, paused=Paused())
    otherwise = _Round(desired, observed, free, now, everything, assessments).plan()
    plan = decided.plan(otherwise)
    if context.targets is None:
        return plan
    whole = _Round(desired, observed, memory, now, everything, assessments).plan(otherwise)
    return replace(plan, left_out=left_out(whole, decided.held.values()))


class _Round:
    """The working state of one call of `reconcile`. Lives as long as the call."""

    def __init__(
        self,
        desired: DesiredState,
        observed: ObservedState,
        memory: Memory,
        now: float,
        context: Context,
        assessments: Sequence[Assessment],
    ) -> None:
        self.desired = desired
        self.observed = observed
        self.memory = memory
        self.now = now
        self.context = context
        self.assessments = assessments
        self.gpus = {gpu.uuid: gpu for gpu in observed.inventory.gpus}
        self.ports = Ports(observed)
        self.numbers = assign(assessments, self.ports.taken, context.port_range)
        self.lanes = self._join_lanes()
        self.holds = Holds(desired, observed, memory.paused, context.targets, observed.at)
        self.held = self.holds.find(assessments, self._orphans())  # 8
        self.unconfirmed: set[str] = set()
        # By model, an instance that the new specification failed on: it is not tried on another.
        self.rolled_back = {
            item.instance.model: item.instance.id
            for item in assessments
            if memory.of(item.instance.id).failed == item.hash
        }
        self.changes: list[Change] = []
        self.blocked: list[Blocked] = []

    def plan(self, otherwise: Plan | None = None) -> Plan:
        """`otherwise` is what the plan were if nothing was held."""
        for entry in self.desired.unsatisfiable:
            if not self.holds.concerns(entry.model, entry.gpus):
                continue
            name = entry.instances[0] if entry.instances else entry.subject
            self.blocked.append(Blocked(name, entry.reason, entry.gpus, entry.model, entry.hint))
        self.blocked += [
            hold.told(otherwise or Plan()) for hold in self.held.values() if not hold.unchosen
        ]
        hook_error = self.context.hook_error
        notes = [hook_error] if hook_error is not None and self.desired.hook is not None else []
        if self.context.unconfirmed is not None:
            notes.append(f"{self.context.unconfirmed}: {WAY_OUT}")
        notes += warnings(self.desired, self.observed, self.context.scope, self.context.busy)
        if self.observed.inventory.error is not None:  # 1
            reason = self.observed.inventory.error
            self._freeze(*self._free(self.assessments, self._orphans()), reason)
            notes.append(f"{reason}; nothing is started or stopped meanwhile")
        else:
            for lane, (wanted, orphans) in sorted(self._by_lane().items()):
                self._lane(lane, wanted, orphans)
        changes = sorted(
            self.changes, key=lambda item: (item.lane, item.instance, item.kind, item.cause)
        )
        obstructed = {item.instance for item in self.blocked if item.until is None}
        obstructed |= self.held.keys()
        return Plan(
            changes=roll(changes, self.assessments, self.context, obstructed),  # 6
            blocked=tuple(
                sorted(self.blocked, key=lambda item: (item.instance, item.reason, item.gpus))
            ),
            warnings=(
                *notes,
                *adoption_warnings(self.assessments, self.context.key),
                *left_behind(self.assessments, self.observed),
            ),
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
        return [
            workload
            for workload in workloads(self.observed)
            if workload.identity.instance not in wanted and not self._protected(workload)
        ]

    def _protected(self, workload: ObservedWorkload) -> bool:
        """Whether an entry in trouble might mean it. Where it is not even known which GPU the
        entry means, that is everything of the same model on a GPU that is not there.
        """
        identity = workload.identity
        lost = not set(identity.gpus) <= self.gpus.keys()
        return any(
            identity.instance in entry.instances
            or set(entry.gpus) & set(identity.gpus)
            or (lost and not entry.gpus and entry.model == identity.model)
            for entry in self.desired.unsatisfiable
        )

    def _lane(self, lane: str, wanted: list[Assessment], orphans: list[ObservedWorkload]) -> None:
        for view in sorted(self.observed.runtimes, key=lambda item: item.runtime):  # 1
            if view.error is not None and self._concerned(view.runtime, wanted, orphans):
                reason = f"what {view.runtime} runs is unknown: {view.error}"
                self._freeze(*self._free(wanted, orphans), reason, view.hint)
                return
        free, orphans = self._free(wanted, orphans)
        orphans = self._confirmed(orphans)
        leaving = {orphan.identity.instance for orphan in orphans}
        ups: dict[str, BringUp] = {}
        serving = {item.instance.id: item.running for item in wanted}
        for item in free:  # 3, 4
            serving[item.instance.id], up = self._bring_up(item, leaving)
            if isinstance(up, Blocked):
                self.blocked.append(up)
            elif up is not None:
                ups[item.instance.id] = cleared(up, item)
        stops = self._settle(wanted, orphans, ups, serving)  # 2
        for item in free:
            self._instance(lane, item, ups.get(item.instance.id), stops, orphans)
        self._leavers(lane, wanted, orphans, stops)

    def _free(
        self, wanted: Sequence[Assessment], orphans: list[ObservedWorkload]
    ) -> tuple[list[Assessment], list[ObservedWorkload]]:
        """Those that something may be done about."""  # 8
        return (
            [item for item in wanted if item.instance.id not in self.held],
            [item for item in orphans if item.identity.instance not in self.held],
        )

    @staticmethod
    def _concerned(runtime: str, wanted: list[Assessment], orphans: list[ObservedWorkload]) -> bool:
        """Whether a lane depends on what an unreadable runtime runs."""
        if runtime in {item.runtime for item in wanted} | {item.runtime for item in orphans}:
            return True
        return bool(orphans) or not all(item.runs and not item.alive for item in wanted)

    def _freeze(
        self,
        wanted: list[Assessment],
        orphans: list[ObservedWorkload],
        reason: str,
        hint: str | None = None,
    ) -> None:
        """Say so of everything that may have to change. What is known to run is not troubled."""
        self.blocked += [
            blocked(item, reason, hint=hint) for item in wanted if item.alive or not item.runs
        ]
        for identity in {item.identity.instance: item.identity for item in orphans}.values():
            self.blocked.append(
                Blocked(identity.instance, reason, identity.gpus, identity.model, hint)
            )

    def _settle(
        self,
        wanted: list[Assessment],
        orphans: list[ObservedWorkload],
        ups: dict[str, BringUp],
        serving: dict[str, ObservedWorkload | None],
    ) -> Departures:
        """What goes. A start that needs what something that stays has is taken out of `ups`.

        That may make something else stay, and so on, until nothing is taken out any more.
        """
        alive = [workload for workload in workloads(self.observed) if is_alive(workload)]
        # What was not chosen does not keep a GPU from those that were.
        unchosen = {hold.instance for hold in self.held.values() if hold.unchosen}
        followers = [item for item in wanted if item.instance.id not in unchosen]
        while True:
            stops = departures(
                followers, orphans, ups, serving, self.held, self.desired.hook is not None
            )
            stays = [workload for workload in alive if workload not in stops]
            obstructed = {}
            for item in wanted:
                up = ups.get(item.instance.id)
                for workload in stays if up is not None else ():
                    if up is not None and (what := needs(item, up, workload)) is not None:
                        obstructed[item.instance.id] = self._obstructed(item, what, workload)
                        break
            if not obstructed:
                return stops
            for instance, reason in obstructed.items():
                del ups[instance]
                self.blocked = [item for item in self.blocked if item.instance != instance]
                self.blocked.append(reason)

    def _obstructed(self, item: Assessment, what: str, workload: ObservedWorkload) -> Blocked:
        name = f"GPU {self.gpus[what].index}" if what in self.gpus else what
        instance = workload.identity.instance
        if (hold := self.held.get(instance)) is not None:
            joint = ":" if hold.doubted else ","
            reason = f"{name} is still held by {instance}{joint} {hold.reason}"
            return blocked(item, reason, hint=hold.hint)
        if any(workload is other.match for other in self.assessments):
            why = "which is to keep it"
        elif instance in self.unconfirmed:
            why = "whose removal waits to be confirmed"
        elif self._protected(workload):
            why = "which an entry that cannot be followed now may mean"
        else:
            why = "which stays because not all that follows it can start"
        return blocked(item, f"{name} is still held by {instance}, {why}")

    def _confirmed(self, orphans: list[ObservedWorkload]) -> list[ObservedWorkload]:
        """The orphans that may go. A file cut short names fewer GPUs, and only a person can tell
        that from a removal; a GPU that the file names for something else is clear.
        """
        if self.context.confirmed:
            return orphans
        held = [item for item in orphans if self._unnamed(item)]
        self.unconfirmed |= {item.identity.instance for item in held}
        for workload in {item.identity.instance: item for item in held}.values():
            self.blocked.append(
                Blocked(
                    workload.identity.instance,
                    "the file no longer names it; its removal waits to be confirmed",
                    workload.identity.gpus,
                    workload.identity.model,
                    CONFIRM,
                )
            )
        return [item for item in orphans if item not in held]

    def _unnamed(self, workload: ObservedWorkload) -> set[str]:
        """Its GPUs that the file has nothing on, not even `none`."""
        named = {uuid for item in self.assessments for uuid in item.instance.gpus}
        return {*workload.identity.gpus} - named - {*self.desired.kept_empty}

    def _shrinks(self, item: Assessment) -> Blocked | None:
        """A server of several entries would be replaced since one of them is missing."""
        missing = {uuid for workload in item.alive for uuid in self._unnamed(workload)}
        if self.context.confirmed or not item.instance.shared or not missing:
            return None
        indices = {uuid: gpu.index for uuid, gpu in self.gpus.items()}
        reason = f"the file no longer names {gpu_names(sorted(missing), indices)} of it"
        return blocked(item, f"{reason}; its replacement waits to be confirmed", hint=CONFIRM)

    # --- one instance -------------------------------------------------------------------------

    def _bring_up(
        self, item: Assessment, leaving: set[str]
    ) -> tuple[ObservedWorkload | None, BringUp | Blocked | None]:
        """(the workload that may stay alive, how to bring the instance up if that is due)."""
        entry = self.memory.of(item.instance.id)
        # What is held is told of by its name, below; that it is in the way is not lost by this.
        leaving = leaving | self.holds.on(item.instance.gpus, self.held)
        around = Surroundings(self.observed, self.gpus, self.ports, self.numbers, leaving)
        lost = [uuid for uuid in item.instance.gpus if uuid not in self.gpus]
        sick = [gpu for uuid in item.instance.gpus if (gpu := self.gpus.get(uuid)) and gpu.trouble]
        patient = entry.retry_at is not None and entry.retry_at > self.now
        if (good := fallback(entry, item)) is not None:
            up, why = fall_back(good, entry, around, self.now)
            if sick and up is not None:
                return good.match, unhealthy_gpu(item, sick[0])
            self.blocked.append(why)
            return good.match, up
        unhealthy = item.live_failure or item.overdue(entry.started_at, self.now)
        forced = item.instance.id in self.context.forced
        blind = item.blind if unhealthy is None and not sick else None
        if item.runs and unhealthy is None and blind is None and not forced:
            return item.match, None
        if lost:
            return item.match, blocked(item, f"{', '.join(lost)} is not there")
        if sick:
            return item.match, unhealthy_gpu(item, sick[0])
        if (shrinks := self._shrinks(item)) is not None:
            return item.match, shrinks
        canary = self.rolled_back.get(item.instance.model)
        if canary is not None and item.alive and not item.runs:
            reason = f"the new specification failed on {canary}; the earlier one runs"
            return item.match, blocked(item, reason, hint=RETRY)
        if patient and not forced:
            reason = f"backoff: {entry.reason}"
            return item.match, blocked(item, reason, until=entry.retry_at)
        return item.match, bring_up(item, entry, unhealthy, around, self.context, blind)

    def _instance(
        self,
        lane: str,
        item: Assessment,
        up: BringUp | None,
        stops: Departures,
        orphans: list[ObservedWorkload],
    ) -> None:
        instance, entry = item.instance, self.memory.of(item.instance.id)
        mine = [w for w in (item.match, *item.alive) if w is not None and w in stops]
        steps: list[Step] = [step for workload in mine for step in stops.of(workload)]
        if up is None:
            if steps:  # two of one instance: the second serves nobody and holds the GPU
                failed = entry.failed == item.hash
                cause = "it failed, and the last good one runs" if failed else "it runs twice"
                self._change("stop", lane, item, cause, steps)
            good = fallback(entry, item)
            if good is not None or not self._is_told(instance.id):
                self._inside(lane, good or item, entry)
            self._leftovers(lane, item, entry, steps)
            told = {change.instance for change in self.changes}
            told |= {other.instance for other in self.blocked}
            if item.runs and entry.started is None and instance.id not in told:
                self._change("adopt", lane, item, "it runs already, as the file asks", [])
            return
        # The start waits for everything that leaves its GPUs and ports, whoever stops it.
        before = [*stops.before(item, up), *(step.id for step in up.early[-1:])]
        before += [  # whose start may be in flight
            f"remove {orphan.name}"
            for orphan in orphans
            if orphan.state is RunState.CREATED and set(orphan.identity.gpus) & set(instance.gpus)
        ]
        ended = superseded(item, up, entry)
        if item.runtime not in self.context.creates_ahead:
            # Their name may be the new one's, too: what is removed after the start would be that.
            for workload in ended:
                remove = Remove(
                    f"remove {workload.name}", instance.id, workload, depends_on=tuple(before)
                )
                steps.append(remove)
            before += [f"remove {workload.name}" for workload in ended]
            ended = []
        former = self._former(item, stops)
        late: list[Step] = []
        if former or self._is_released(item):
            release = Release(
                f"release {instance.id}",
                instance.id,
                instance.gpus,
                former,
                depends_on=tuple(before),
                floors={
                    uuid: self.memory.floors[uuid]
                    for uuid in instance.gpus
                    if uuid in self.memory.floors
                },
                vram=instance.vram,
            )
            late.append(release)
            before = [release.id]
        if up.again is not None and item.match is not None:
            remove = Remove(
                f"remove {item.match.name}", instance.id, item.match, depends_on=tuple(before)
            )
            late += [remove, replace(up.again, depends_on=(remove.id,))]
            before = [up.again.id]
        start = replace(up.late, depends_on=tuple(before))
        late.append(start)
        for workload in ended:
            late.append(
                Remove(f"remove {workload.name}", instance.id, workload, depends_on=(start.id,))
            )
        diff = () if fallback(entry, item) is not None else None
        self._change(up.kind, lane, item, up.cause, [*up.early, *steps, *late], diff)

    def _inside(self, lane: str, item: Assessment, entry: InstanceMemory) -> None:  # 5, 8
        if not item.instance.placements and not item.health.surplus:
            return
        from mic_supervisor.plan.inside import inside

        named = {uuid for other in self.assessments for uuid in other.placed_gpus}
        found = inside(
            item,
            entry,
            self.memory,
            self.holds,
            self.now,
            confirmed=self.context.confirmed,
            named=named | {*self.desired.kept_empty},
        )
        for one in found.due:
            kind: ChangeKind = "load" if isinstance(one.step, Load) else "unload"
            self._change(kind, lane, item, one.cause, [one.step], one.diff, one.step)
        if found.why_not is not None and not self._is_told(item.instance.id):
            self.blocked.append(found.why_not)

    def _is_told(self, instance: str) -> bool:
        """Whether it is blocked already: one reason is enough."""
        return any(other.instance == instance for other in self.blocked)

    def _leftovers(
        self, lane: str, item: Assessment, entry: InstanceMemory, stops: list[Step]
    ) -> None:
        extra = left_over(item, entry)  # 7
        if extra and item.runs and not stops:
            steps: list[Step] = [Remove(f"remove {w.name}", item.instance.id, w) for w in extra]
            self._change("remove", lane, item, "left over from an earlier specification", steps)

    def _leavers(
        self,
        lane: str,
        wanted: list[Assessment],
        orphans: list[ObservedWorkload],
        stops: Departures,
    ) -> None:
        by_instance: dict[str, list[ObservedWorkload]] = {}
        for orphan in orphans:
            by_instance.setdefault(orphan.identity.instance, []).append(orphan)
        for instance, found in by_instance.items():
            steps: list[Step] = []
            for workload in found:
                stop = stops.of(workload)
                if is_alive(workload) and not stop:
                    continue  # what follows it is blocked, so it stays
                after = (stop[-1].id,) if stop else ()
                steps += stop
                steps.append(
                    Remove(f"remove {workload.name}", instance, workload, depends_on=after)
                )
            if steps:
                # What ended earlier may have had other GPUs.
                last = next((item for item in found if is_alive(item)), found[0])
                identity = last.identity
                self.changes.append(
                    Change(
                        "remove",
                        instance,
                        identity.model,
                        identity.backend,
                        identity.gpus,
                        lane,
                        self._why_leaving(last, wanted),
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

    def _former(self, item: Assessment, stops: Departures) -> tuple[ObservedWorkload, ...]:
        """The workloads that had these GPUs last."""
        if all(self.gpus[uuid].simulated for uuid in item.instance.gpus):
            return ()
        good = fallback(self.memory.of(item.instance.id), item)
        last = (item.match, good.match if good is not None else None)
        return tuple(
            workload
            for workload in workloads(self.observed)
            if (workload in stops or workload in last)
            and (
                workload.identity.instance == item.instance.id
                or set(workload.identity.gpus) & set(item.instance.gpus)
            )
            and workload.state is not RunState.CREATED
        )

    def _is_released(self, item: Assessment) -> bool:
        """Whether the driver still lists on these GPUs what has ended."""
        gpus = [self.gpus[uuid] for uuid in item.instance.gpus]
        return any(lets_go(process) for gpu in gpus for process in gpu.processes or ())

    def _change(
        self,
        kind: ChangeKind,
        lane: str,
        item: Assessment,
        cause: str,
        steps: list[Step],
        diff: tuple[FieldDiff, ...] | None = None,
        inside: Load | Unload | None = None,
    ) -> None:
        """`inside`: it concerns one model in a server, which may have others."""
        instance = item.instance
        one = inside.placement if inside is not None and instance.shared else None
        self.changes.append(
            Change(
                kind,
                instance.id,
                instance.model if one is None else one.model,
                instance.backend,
                instance.gpus if one is None else one.gpus,
                lane,
                cause,
                item.diff if diff is None else diff,
                tuple(steps),
            )
        )
