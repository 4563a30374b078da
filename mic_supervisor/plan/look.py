"""One immutable picture of everything: desired, observed, and what follows from the two."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Self

from mic_supervisor.model import DesiredState, ObservedState
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import Plan
from mic_supervisor.plan.assess import (
    Assessment,
    Context,
    Selection,
    assess,
    with_containers,
    with_unexplained,
    workloads,
)
from mic_supervisor.plan.health import Activity
from mic_supervisor.plan.memory import Memory, Pulled
from mic_supervisor.plan.reconcile import reconcile
from mic_supervisor.plan.status import InstanceStatus, instance_statuses


@dataclass(frozen=True, slots=True)
class Look:
    """What one round knows and concludes. Whoever shows or decides anything reads it from here.

    `memory` is what was remembered before, with what this look adds; `before` is without. Decisions
    are made of steady times: `now` is one, and `offset` makes them the wall clock's, see clocks.py.
    """

    now: float
    offset: float
    desired: DesiredState
    observed: ObservedState
    context: Context
    before: Memory
    assessments: tuple[Assessment, ...]
    memory: Memory
    plan: Plan
    statuses: tuple[InstanceStatus, ...]

    @property
    def at(self) -> float:
        """The same moment by the wall clock: seconds since the epoch."""
        return self.now + self.offset

    @property
    def indices(self) -> dict[str, int]:
        """The numbers that the driver gives the GPUs today, by UUID."""
        return self.observed.inventory.indices

    def doing(self, activities: Mapping[str, Activity]) -> Look:
        """The same look, once more is being carried out."""
        return replace(
            self,
            statuses=instance_statuses(
                self.desired, self.observed, self.assessments, self.plan, self.memory, activities
            ),
        )

    def reported(self) -> tuple[Look, list[ledger.Entered]]:
        """The same look, in which it is remembered since when each phase is shown."""
        unasked = {
            item.instance.id
            for item in self.assessments
            if item.runs and item.instance.probes.startup and item.health.startup is None
        }
        memory, rows, entered = ledger.reported(self.memory, self.statuses, self.now, unasked)
        return replace(self, memory=memory, statuses=rows), entered

    def in_wall(self) -> Look:
        """As it is told to people: plan and statuses in times of the wall clock."""
        return replace(
            self,
            plan=self.plan.in_wall(self.offset),
            statuses=tuple(row.in_wall(self.offset) for row in self.statuses),
        )

    def limited(self, targets: Selection) -> Plan:
        """The plan for these models and GPUs alone, and what it leaves out, as it is told."""
        return self._confirmed_plan(self.desired, targets)

    def waiting(self) -> Self | None:
        """The same look, with the file that waits for a person's word and the plan for it, as it
        is told; None: no file waits."""
        desired = self.desired.waiting
        if desired is None:
            return None
        return replace(self, desired=desired, plan=self._confirmed_plan(desired, None))

    def renewed(self, pulled: Mapping[str, Pulled | None], forced: Collection[str]) -> Self:
        """The same look, once these images were pulled and these are to be restarted, with the plan
        for that, as it is told.
        """
        context = replace(self.context, forced=self.context.forced | {*forced})
        memory = ledger.pulled(self.memory, pulled)
        plan = reconcile(self.desired, self.observed, memory, self.now, context)
        return replace(self, context=context, memory=memory, plan=plan.in_wall(self.offset))

    def _confirmed_plan(self, desired: DesiredState, targets: Selection | None) -> Plan:
        context = replace(self.context, targets=targets, confirmed=True)
        plan = reconcile(desired, self.observed, self.memory, self.now, context)
        return plan.in_wall(self.offset)


def look(
    desired: DesiredState,
    observed: ObservedState,
    memory: Memory,
    now: float,
    context: Context,
    *,
    jitter: float = 0.0,
    offset: float = 0.0,
) -> Look:
    """Hold desired against observed state. Equal arguments give equal looks.

    `now` is steady, and `offset` what makes it the wall clock's. `jitter` from 0 to 1 spreads the
    next tries.
    """
    assessments = tuple(assess(desired, observed, context, memory))
    known = ledger.observed(
        memory,
        assessments,
        now,
        jitter=jitter,
        busy=context.busy,
        keep={name for entry in desired.unsatisfiable for name in entry.instances},
        leaving={workload.identity.instance for workload in workloads(observed)},
        unhealthy_gpus={gpu.uuid for gpu in observed.inventory.gpus if gpu.trouble is not None},
    )
    known = with_containers(replace(known, bindings=dict(desired.bindings)), observed)
    known = with_unexplained(known, observed, assessments)
    plan = reconcile(desired, observed, _unknown_yet(known, memory), now, context, assessments)
    statuses = instance_statuses(desired, observed, assessments, plan, known)
    return Look(now, offset, desired, observed, context, memory, assessments, known, plan, statuses)


def _unknown_yet(known: Memory, before: Memory) -> Memory:
    """What is known now; but what was seen to run for the first time is taken over by the plan."""
    new = {
        name: replace(entry, started=None)
        for name, entry in known.instances.items()
        if entry.started is not None and before.of(name).started is None
    }
    return replace(known, instances={**known.instances, **new}) if new else known
