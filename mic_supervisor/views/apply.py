"""The document of `apply --json`, and of the commands that converge as apply does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from mic_supervisor.plan.actions import Change
from mic_supervisor.plan.assess import Selection
from mic_supervisor.plan.look import Look
from mic_supervisor.plan.status import InstanceStatus, by_model, chosen_rows
from mic_supervisor.views.plan import LeftOut, PlanDocument, left_out, plan_document
from mic_supervisor.views.status import StatusInstance, instances

EXIT_ALL_FAILED = 1
EXIT_SOME_FAILED = 3


@dataclass(frozen=True, slots=True)
class Failure:
    instance: str
    reason: str
    hint: str | None
    told: Annotated[bool, Field(description="whether the instance's reason says it")] = False


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
    good = [one.as_desired for row in rows for one in by_model(row)]
    if all(good):
        return 0
    return EXIT_SOME_FAILED if any(good) else EXIT_ALL_FAILED


def apply_document(
    look: Look,
    failures: Iterable[Failure],
    host: str,
    targets: Selection | None = None,
    not_chosen: Iterable[Change] = (),
) -> ApplyDocument:
    """`failures` holds the last one of each instance, `look` is as it is told.

    Of `targets`, where there are any, it tells alone, and what was left out for them.
    """
    rows = [*look.statuses]
    if targets is not None:
        rows = chosen_rows(targets, look.desired, rows)
        chosen = {row.id for row in rows} | {change.instance for change in look.plan.changes}
        failures = [one for one in failures if one.instance in chosen]
    config_hash = look.desired.config_hash
    return ApplyDocument(
        version=1,
        host=host,
        config_hash=config_hash,
        exit_code=exit_code(rows),
        instances=instances(rows, look.indices),
        left_out=left_out(not_chosen),
        failures=[
            replace(
                one, told=any(row.id == one.instance and row.mentions(one.reason) for row in rows)
            )
            for one in sorted(failures, key=lambda one: one.instance)
        ],
        remaining=plan_document(look.plan, host=host, config_hash=config_hash),
    )
