"""Which ended workloads are of no use any more.

One is kept: it is what a rollback starts, and it has the last log.
"""

from __future__ import annotations

from collections.abc import Sequence

from mic_supervisor.model import ObservedWorkload, RunState
from mic_supervisor.plan.actions import Restart
from mic_supervisor.plan.assess import Assessment, is_alive
from mic_supervisor.plan.bring_up import BringUp
from mic_supervisor.plan.memory import InstanceMemory


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
