"""Whether everything is as it should be, and if not, what, since when, and what comes next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from mic_supervisor.config.names import shown_id, with_shown_ids
from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.gpu.events import RecoveryAction, XidSeverity
from mic_supervisor.http.documents import Published
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.plan.words import gpu_names
from mic_supervisor.views.config import counted
from mic_supervisor.views.status import gpu_rows

_UNDER_WAY = frozenset(
    {Phase.PENDING, Phase.STOPPING, Phase.WAITING_VRAM, Phase.STARTING, Phase.LOADING}
)
_GPU_TROUBLE = {
    "foreign": "a foreign process is on it, and the file keeps it empty",
    "unhealthy": "it is unhealthy",
    "lost": "the file names it, and it is not there",
    "unknown": "its holders cannot be read",
}
_XID_MATTERS = 3600.0  # seconds


class Level(IntEnum):
    """From good to bad."""

    GOOD = 0
    BUSY = 1
    BAD = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """`subject` names it, `text` says what; times are seconds since the epoch."""

    level: Level
    subject: str
    text: str
    since: float | None = None
    next_try: float | None = None
    hint: str | None = None

    @property
    def key(self) -> tuple[int, str]:
        return self.level, self.subject


@dataclass(frozen=True, slots=True)
class Verdict:
    level: Level
    sentence: str
    problems: tuple[Problem, ...] = ()


def overall_verdict(
    published: Published, stalled: str | None, firsts: Mapping[tuple[int, str], float] | None = None
) -> Verdict:
    """`firsts` says since when problems that do not tell themselves have been seen, by key."""
    snapshot = published.snapshot
    scrubber = published.scrubber
    models = {row.id: row.model for row in (snapshot.statuses if snapshot is not None else ())}

    def shown(text: str) -> str:
        return with_shown_ids(scrubber.text(text), models)

    problems = tuple(
        replace(
            problem,
            text=shown(problem.text),
            hint=None if problem.hint is None else shown(problem.hint),
            since=(firsts or {}).get(problem.key) if problem.since is None else problem.since,
        )
        for problem in _problems(published)
    )
    problems = tuple(sorted(problems, key=lambda problem: -problem.level))
    if snapshot is None:
        return Verdict(max(Level.BUSY, _worst(problems)), "Observing the machine", problems)
    if stalled is not None:
        return Verdict(Level.UNKNOWN, f"What follows is old: {stalled}", problems)
    return Verdict(_worst(problems), _sentence(problems, snapshot), problems)


def _worst(problems: tuple[Problem, ...]) -> Level:
    return max((problem.level for problem in problems), default=Level.GOOD)


def _sentence(problems: tuple[Problem, ...], snapshot: Snapshot) -> str:
    bad = sum(problem.level is Level.BAD for problem in problems)
    asked = counted(len(snapshot.statuses), "instance")
    paused = sum(row.phase is Phase.PAUSED for row in snapshot.statuses)
    drained = sum(row.phase is Phase.DRAINED for row in snapshot.statuses)
    busy = sum(problem.level is Level.BUSY for problem in problems) - paused - drained
    if bad:
        more = f", {busy} more on the way" if busy else ""
        more += f", {paused} more paused" if paused else ""
        are = "1 thing is not as it" if bad == 1 else f"{bad} things are not as they"
        return f"{are} should be{more}"
    if busy:
        more = f", {paused} paused" if paused else ""
        return f"{busy} of {asked} on the way{more}"
    if snapshot.memory.drained is not None:
        return "The host is drained"
    if paused:
        return f"{paused} of {asked} paused"
    if not snapshot.statuses:
        return "Nothing is asked for, and nothing runs"
    return "Everything is as it should be"


def _problems(published: Published) -> Iterator[Problem]:
    config, snapshot = published.config, published.snapshot
    if config.error is not None:
        report = config.error.splitlines()
        more = f" (and {len(report) - 1} more)" if len(report) > 1 else ""
        running = (
            f"generation {config.generation}, the last good one, runs"
            if config.generation
            else "nothing runs by it"
        )
        yield Problem(
            Level.BAD,
            "Configuration",
            f"{report[0] if report else 'the file has errors'}{more}; {running}",
            config.error_at,
            hint="mic-supervisor check shows every error with its line",
        )
    for part, why in published.down.items():
        yield Problem(Level.BAD, part, f"it is not alive: {why}; it is started again")
    if snapshot is None:
        return
    yield from _unreadable(snapshot)
    indices = snapshot.indices
    yield from _xids(published, snapshot.at, indices)
    hints = {item.instance: item.hint for item in snapshot.plan.blocked}
    covered: set[str] = set()
    for row in snapshot.statuses:
        if not row.as_desired:
            covered.update(row.gpus)
            yield _instance(row, indices, hints.get(row.id))
    known = {row.id for row in snapshot.statuses}
    for item in snapshot.plan.blocked:
        if item.instance not in known:
            covered.update(item.gpus)
            yield Problem(
                Level.BAD,
                shown_id(item.instance, item.model or ""),
                item.reason,
                next_try=item.until,
                hint=item.hint,
            )
    for gpu in gpu_rows(snapshot.desired, snapshot.observed):
        if gpu.state in _GPU_TROUBLE and gpu.uuid not in covered:
            name = gpu_names([gpu.uuid], indices)
            hint = "mic-supervisor gpus shows its holders" if gpu.state == "foreign" else None
            text = f"it is unhealthy: {gpu.trouble}" if gpu.trouble else None
            yield Problem(Level.BAD, name, text or _GPU_TROUBLE[gpu.state], hint=hint)


def _xids(published: Published, at: float, indices: Mapping[str, int]) -> Iterator[Problem]:
    """What the GPUs themselves complain of. It is out of date after an hour: health may recover."""
    for record in published.xids:
        if record.severity is not XidSeverity.CRITICAL or at - record.last_at > _XID_MATTERS:
            continue
        subject = gpu_names([record.uuid], indices) if record.uuid is not None else "A GPU"
        action = record.action
        asks = (
            f"the driver asks for: {action.value.replace('_', ' ')}"
            if action is not None and action is not RecoveryAction.NONE
            else "look it up with: dmesg | grep -i xid"
        )
        yield Problem(
            Level.BAD, subject, f"reported Xid {record.xid}, critical", record.last_at, hint=asks
        )


def _unreadable(snapshot: Snapshot) -> Iterator[Problem]:
    inventory = snapshot.observed.inventory
    unreadable = inventory.error or inventory.unreadable
    if unreadable is not None:
        yield Problem(Level.BAD, "GPUs", unreadable, hint=inventory.hint)
    for gpu in inventory.unopened:
        yield Problem(Level.BAD, f"GPU {gpu.index}", gpu.error, hint=gpu.hint)
    for view in snapshot.observed.runtimes:
        if view.error is not None:
            yield Problem(
                Level.BAD,
                view.runtime,
                f"cannot be read: {view.error}; what it runs is left as it is",
                hint=view.hint,
            )


def level_of(row: InstanceStatus) -> Level:
    """How an instance fares: what is being done for it is no trouble, what is waited for is.

    Nor is a pause, which somebody asked for.
    """
    if row.as_desired:
        return Level.GOOD
    if row.phase in (Phase.PAUSED, Phase.DRAINED):
        return Level.BUSY
    return Level.BUSY if row.phase in _UNDER_WAY and row.next_retry is None else Level.BAD


def _instance(row: InstanceStatus, indices: Mapping[str, int], hint: str | None) -> Problem:
    words = row.phase.value.replace("_", " ")
    text = row.reason or words
    if not text.startswith(words):
        text = f"{words}: {text}"
    if row.phase in (Phase.READY, Phase.UNPROBED):
        text = f"{text}, and not as the file says" if row.reason is None else text
    return Problem(
        level_of(row),
        f"{row.model} on {gpu_names(row.gpus, indices)}"
        if row.gpus
        else shown_id(row.id, row.model),
        text,
        row.since,
        row.next_retry,
        hint,
    )
