"""Plans as programs and people read them. Equal plans give equal texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile
from shlex import quote
from typing import Annotated, Any, Literal

from pydantic import Field

from mic_supervisor.config.diagnostics import padded, width
from mic_supervisor.config.names import shown_id, with_shown_ids
from mic_supervisor.plan.actions import Blocked, Change, ChangeKind, FieldDiff, Plan
from mic_supervisor.plan.words import clock, gpu_names, left_out_line
from mic_supervisor.views import view


@dataclass(frozen=True, slots=True)
class PlanAction:
    action: ChangeKind
    instance: str
    model: str
    backend: str
    gpus: list[str]
    cause: str
    code: Annotated[str, Field(description="the code of the cause")]
    waits: str | None
    diff: list[FieldDiff]
    steps: list[str]


@dataclass(frozen=True, slots=True)
class PlanBlocked:
    instance: str
    model: str | None
    gpus: list[str]
    reason: str
    code: Annotated[str, Field(description="the code of the reason")]
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
    profile: Annotated[str | None, Field(description="the profile that is on; null: none")] = None


def plan_document(
    plan: Plan, *, host: str, config_hash: str, profile: str | None = None
) -> PlanDocument:
    return PlanDocument(
        version=1,
        host=host,
        config_hash=config_hash,
        profile=profile,
        changes=plan.count,
        actions=[
            view(
                PlanAction,
                change,
                action=change.kind,
                gpus=[*change.gpus],
                code=change.why.code,
                waits=None if change.waits is None else str(change.waits),
                diff=[*change.diff],
                steps=[step.id for step in change.steps],
            )
            for change in plan.changes
        ],
        blocked=[
            view(PlanBlocked, item, gpus=[*item.gpus], reason=reason(item), code=item.why.code)
            for item in plan.blocked
        ],
        left_out=left_out(plan.left_out),
        warnings=[*plan.warnings],
    )


def left_out(changes: Iterable[Change]) -> list[LeftOut]:
    return [view(LeftOut, one, gpus=[*one.gpus], action=one.kind) for one in changes]


# --- for people ---------------------------------------------------------------------------------

_MARKS = {
    "create": "+",
    "start": "+",
    "restart": "~",
    "replace": "~",
    "load": "~",
    "stop": "-",
    "remove": "-",
    "unload": "-",
    "adopt": "=",
}


def to_text(
    plan: Plan,
    indices: Mapping[str, int],
    others: Mapping[str, str] | None = None,
    profile: str | None = None,
) -> str:
    """What `plan` prints: a line per change with its cause, then its field diffs and the names of
    what it removes.

    `indices` maps UUIDs to the numbers that the driver gives them today, `others` the ids of
    instances that reasons may name to their models, `profile` is the one that is on.
    """
    lines: list[str] = []
    models = {**(others or {}), **{item.instance: item.model or "" for item in plan.blocked}}
    models |= {change.instance: change.model for change in (*plan.changes, *plan.left_out)}
    called = {one: shown_id(one, model) for one, model in models.items()}
    longest = max((width(called[change.instance]) for change in plan.changes), default=0)
    gpus_of = {change.gpus: gpu_names(change.gpus, indices) for change in plan.changes}
    gpus_width = max((len(location) for location in gpus_of.values()), default=0)
    for change in plan.changes:
        lines.append(
            f"{_MARKS[change.kind]} {change.kind:<7}  {padded(called[change.instance], longest)}  "
            f"{gpus_of[change.gpus]:<{gpus_width}}  {change.cause}"
        )
        lines += [f"    {line}" for diff in change.diff for line in diff_lines(diff)]
        lines += [f"    runs {program} first" for program in change.runs]
        lines += [f"    {line}" for line in ending_lines(change)]
        if change.waits is not None:
            lines.append(f"    waits for {_timed(str(change.waits), change.until)}")
    if plan.blocked:
        lines += [""] if lines else []
        for item in plan.blocked:
            location = f" on {gpu_names(item.gpus, indices)}" if item.gpus else ""
            mark = "paused " if item.paused else "drained" if item.drained else "blocked"
            lines.append(f"! {mark}  {called[item.instance]}{location}: {reason(item)}")
            if item.hint:
                lines.append(f"    hint: {item.hint}")
    if plan.left_out:
        lines += [""] if lines else []
        lines += [
            left_out_line(change.instance, change.kind, change.cause) for change in plan.left_out
        ]
    if plan.warnings:
        lines += [""] if lines else []
        lines += [f"warning: {text}" for text in plan.warnings]
    lines += [""] if lines else []
    lines += [f"Profile: {profile}"] if profile is not None else []
    lines.append(summary(plan))
    return with_shown_ids("\n".join(lines) + "\n", models)


def ending_lines(change: Change) -> list[str]:
    """What is removed, and what is stopped where the instance does not say it: it runs twice."""
    removed = [f"removes {name}" for name in change.removes]
    if change.kind == "stop" or len(change.stops) > 1:
        removed = [*(f"stops {n}" for n in change.stops if n not in change.removes), *removed]
    return removed


def summary(plan: Plan) -> str:
    """ "Plan: 2 to create, 1 to replace; 1 blocked." or "No changes." """
    counts: dict[str, int] = {}
    for change in plan.changes:
        counts[change.kind] = counts.get(change.kind, 0) + 1
    parts = [f"{counts[kind]} to {kind}" for kind in _MARKS if kind in counts and kind != "adopt"]
    rest = [f"{counts['adopt']} to adopt"] if "adopt" in counts else []
    paused = sum(item.paused for item in plan.blocked)
    drained = sum(item.drained for item in plan.blocked)
    blocked = len(plan.blocked) - paused - drained
    rest += [f"{blocked} blocked"] if blocked else []
    rest += [f"{paused} paused"] if paused else []
    rest += [f"{drained} drained"] if drained else []
    rest += [f"{len(plan.left_out)} left out"] if plan.left_out else []
    return "; ".join([f"Plan: {', '.join(parts)}" if parts else "No changes", *rest]) + "."


def reason(item: Blocked) -> str:
    return _timed(item.reason, item.until)


def _timed(why: str, until: float | None) -> str:
    return why if until is None else f"{why}; next try at {clock(until)}"


_WIDEST = 100  # characters of a line that shows both sides whole
_CONTEXT = 16  # characters of a long text that stay on each side of what differs


def diff_lines(diff: FieldDiff) -> list[str]:
    """Both sides where they are short; of a long list or text only what differs."""
    path, before, after = diff.path, diff.before, diff.after
    whole = f"{path}: {_value(before)} -> {_value(after)}"
    if len(whole) <= _WIDEST:
        return [whole]
    if isinstance(before, list) and isinstance(after, list):
        return [f"{path}: {line}" for line in _list_lines(before, after)]
    old, new = _around(_value(before), _value(after))
    return [f"{path}: {old} -> {new}"]


def _list_lines(before: Sequence[Any], after: Sequence[Any]) -> Iterator[str]:
    """A line for each part that differs, behind the flag that its first item is the value of."""
    old, new = [_item(item) for item in before], [_item(item) for item in after]
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind == "equal":
            continue
        gone, come = " ".join(old[first:last]), " ".join(new[start:end])
        flag = old[first - 1] + " " if first and old[first - 1].startswith("-") else ""
        if gone.startswith("-") or come.startswith("-"):
            flag = ""
        if not gone or not come:
            yield f"{flag}{gone or come} {'added' if come else 'removed'}"
        else:
            gone, come = _around(gone, come)
            yield f"{flag}{gone} -> {flag}{come}"


def _item(item: Any) -> str:
    return quote(item) if isinstance(item, str) else _value(item)


def _alike(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _around(before: str, after: str) -> tuple[str, str]:
    """What differs in two long texts, with a little of what stands around it."""
    if len(before) + len(after) <= _WIDEST:
        return before, after
    same = _alike(before, after)
    tail = _alike(before[same:][::-1], after[same:][::-1])
    start, end = max(0, same - _CONTEXT), max(0, tail - _CONTEXT)

    def cut(text: str) -> str:
        return ("…" if start else "") + text[start : len(text) - end] + ("…" if end else "")

    return cut(before), cut(after)


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
