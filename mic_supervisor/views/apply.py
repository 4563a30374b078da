"""The document of `apply --json`, and of the commands that converge as apply does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
    not_pulled: Annotated[
        bool, Field(description="whether apply --pull could not have its newest image")
    ] = False


@dataclass(frozen=True, slots=True)
class ApplyDocument:
    version: Literal[1]
    host: str
    config_hash: str
    exit_code: int
    changed: Annotated[bool, Field(description="whether anything was begun that changes something")]
    instances: list[StatusInstance]
    left_out: list[LeftOut]
    failures: list[Failure]
    remaining: PlanDocument


def exit_code(rows: Iterable[InstanceStatus], not_pulled: Collection[str] = ()) -> int:
    """Of an apply: 0 all is as desired, 3 some is and some is not, 1 nothing is."""
    good = [one.as_desired and row.id not in not_pulled for row in rows for one in by_model(row)]
    if all(good):
        return 0
    return EXIT_SOME_FAILED if any(good) else EXIT_ALL_FAILED


def apply_document(
    look: Look,
    failures: Iterable[Failure],
    host: str,
    targets: Selection | None = None,
    not_chosen: Iterable[Change] = (),
    not_pulled: Collection[str] = (),
    *,
    begun: Mapping[str, Collection[str]],
) -> ApplyDocument:
    """`failures` holds the last one of each instance, `look` is as it is told. `begun` are the
    instances that something was done for, and their GPUs.

    Of `targets`, where there are any, it tells alone, and what was left out for them.
    """
    rows = [*look.statuses]
    if targets is not None:
        rows = chosen_rows(targets, look.desired, rows)
        chosen = {row.id for row in rows} | {change.instance for change in look.plan.changes}
        failures = [one for one in failures if one.instance in chosen]
        their = {*targets.gpus, *(uuid for row in rows for uuid in row.gpus)}
        begun = {key: at for key, at in begun.items() if key in chosen or their & {*at}}
    asked = look.desired
    return ApplyDocument(
        version=1,
        host=host,
        config_hash=asked.config_hash,
        exit_code=exit_code(rows, not_pulled),
        changed=bool(begun),
        instances=instances(rows, look.indices),
        left_out=left_out(not_chosen),
        failures=[
            replace(
                one,
                told=any(row.id == one.instance and row.mentions(one.reason) for row in rows),
                not_pulled=one.instance in not_pulled,
            )
            for one in sorted(failures, key=lambda one: one.instance)
        ],
        remaining=plan_document(
            look.plan, host=host, config_hash=asked.config_hash, profile=asked.profile
        ),
    )
