"""The document of `apply --json`, and of the commands that converge as apply does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from mic_supervisor.plan.status import InstanceStatus, by_model
from mic_supervisor.records import dataclass
from mic_supervisor.views.plan import LeftOut, PlanDocument, left_out, plan_document
from mic_supervisor.views.status import StatusInstance, instances

if TYPE_CHECKING:
    from mic_supervisor.converge.events import Event
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.plan.actions import Change
    from mic_supervisor.plan.selection import Selection

EXIT_ALL_FAILED = 1
EXIT_SOME_FAILED = 3


@dataclass(frozen=True, slots=True)
class Failure:
    instance: str
    reason: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class ApplyDocument:
    version: Literal[1]
    host: str
    config_hash: str
    exit_code: int
    instances: list[StatusInstance]
    left_out: list[LeftOut]
    failures: list[Failure]
    remaining: PlanDocument


def exit_code(rows: Iterable[InstanceStatus]) -> int:
    """Of an apply: 0 all is as desired, 3 some is and some is not, 1 nothing is."""
    good = [one.settled_well for row in rows for one in by_model(row)]
    if all(good):
        return 0
    return EXIT_SOME_FAILED if any(good) else EXIT_ALL_FAILED


def apply_document(
    snapshot: Snapshot,
    errors: Mapping[str, Event],
    host: str,
    targets: Selection | None = None,
    not_chosen: Iterable[Change] = (),
) -> ApplyDocument:
    """`errors` holds the last failure of each instance.

    Of `targets`, where there are any, it tells alone, and what was left out for them.
    """
    rows = [*snapshot.statuses]
    if targets is not None:
        rows = targets.rows(snapshot.desired, rows)
        chosen = {row.id for row in rows} | {change.instance for change in snapshot.plan.changes}
        errors = {name: event for name, event in errors.items() if name in chosen}
    config_hash = snapshot.desired.config_hash
    return ApplyDocument(
        version=1,
        host=host,
        config_hash=config_hash,
        exit_code=exit_code(rows),
        instances=instances(rows, snapshot.observed.inventory.indices),
        left_out=left_out(not_chosen),
        failures=[Failure(name, event.text, event.hint) for name, event in sorted(errors.items())],
        remaining=plan_document(snapshot.plan, host=host, config_hash=config_hash),
    )
