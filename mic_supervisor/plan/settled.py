"""Whether an apply has nothing left to wait for."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mic_supervisor.model import DesiredState
from mic_supervisor.plan.actions import Plan
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.plan.words import Code

_SLACK = 5.0  # seconds beyond a start's budget, in which the planner says that it is spent
_FINAL = frozenset(
    {
        Phase.READY,
        Phase.UNPROBED,
        Phase.BACKOFF,
        Phase.BLOCKED,
        Phase.PAUSED,
        Phase.STUCK_STOPPING,
    }
)


def settled(
    desired: DesiredState,
    plan: Plan,
    statuses: Iterable[InstanceStatus],
    memory: Memory,
    *,
    began: float,
    now: float,
    only: Collection[str] | None = None,
) -> bool:
    """Every instance is ready, or has failed in a way that patience alone does not mend.

    `only` are the instances that matter; None: all.

    1. A change that can be executed is work left, unless its last try failed.
    2. An instance on its way is waited for, within the budget that its start has. One that queues
       for its GPU is on its way.
    3. A change whose turn has not come is waited for through those it waits for.
    4. What took over in a rollback is waited for like any other start.
    """
    failing = {name for name, entry in memory.instances.items() if entry.rest is not None}
    if any(
        change.steps and change.waits is None and change.instance not in failing
        for change in plan.changes
        if only is None or change.instance in only
    ):
        return False
    final = {item.instance for item in plan.blocked if not item.queued}
    final |= {
        change.instance
        for change in plan.changes
        if change.waits is not None and change.waits.kind is not Code.HOOK
    }
    final |= failing
    budgets = {item.id: item.start_timeout for item in desired.instances}
    for row in statuses:
        entry = memory.of(row.id)
        took_over = row.phase is Phase.DEGRADED and entry.failed is not None  # 4
        if only is not None and row.id not in only:
            continue
        if row.phase in _FINAL or (row.id in final and not (took_over and not entry.ready_since)):
            continue
        started = entry.started_at or began
        if now - max(started, began) < budgets.get(row.id, 0.0) + _SLACK:
            return False
    return True
