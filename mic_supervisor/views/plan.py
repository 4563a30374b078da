"""The document of `plan --json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mic_supervisor.plan.actions import Change, ChangeKind, FieldDiff, Plan
from mic_supervisor.plan.render import reason


@dataclass(frozen=True, slots=True)
class PlanAction:
    action: ChangeKind
    instance: str
    model: str
    backend: str
    gpus: list[str]
    cause: str
    code: Annotated[str, Field(description="what programs know the cause by")]
    waits: str | None
    diff: list[FieldDiff]
    steps: list[str]


@dataclass(frozen=True, slots=True)
class PlanBlocked:
    instance: str
    model: str | None
    gpus: list[str]
    reason: str
    code: Annotated[str, Field(description="what programs know the reason by")]
    hint: str | None
    until: float | None
    paused: bool


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What is due and was not chosen."""

    instance: str
    model: str
    gpus: list[str]
    action: ChangeKind
    cause: str


@dataclass(frozen=True, slots=True)
class PlanDocument:
    version: Literal[1]
    host: str
    config_hash: str
    changes: int
    actions: list[PlanAction]
    blocked: list[PlanBlocked]
    left_out: list[LeftOut]
    warnings: list[str]


def plan_document(plan: Plan, *, host: str, config_hash: str) -> PlanDocument:
    return PlanDocument(
        version=1,
        host=host,
        config_hash=config_hash,
        changes=plan.count,
        actions=[
            PlanAction(
                action=change.kind,
                instance=change.instance,
                model=change.model,
                backend=change.backend,
                gpus=[*change.gpus],
                cause=change.cause,
                code=change.why.code,
                waits=None if change.waits is None else str(change.waits),
                diff=[*change.diff],
                steps=[step.id for step in change.steps],
            )
            for change in plan.changes
        ],
        blocked=[
            PlanBlocked(
                instance=item.instance,
                model=item.model,
                gpus=[*item.gpus],
                reason=reason(item),
                code=item.why.code,
                hint=item.hint,
                until=item.until,
                paused=item.paused,
            )
            for item in plan.blocked
        ],
        left_out=left_out(plan.left_out),
        warnings=[*plan.warnings],
    )


def left_out(changes: Iterable[Change]) -> list[LeftOut]:
    return [
        LeftOut(change.instance, change.model, [*change.gpus], change.kind, change.cause)
        for change in changes
    ]
