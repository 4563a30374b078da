"""Ends processes that hold GPUs: exactly those that were looked at, and no others.

A PID says nothing by itself: it is used again. So the kernel's start time is read first, each
signal goes through a pidfd whose process still has that start time, and before each signal whose
the process is, is looked up anew.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from mic_supervisor import clocks
from mic_supervisor.converge.observe import Sources
from mic_supervisor.errors import MicError
from mic_supervisor.gpu.owners import (
    INSTANCE_VARIABLE,
    SCOPE_VARIABLE,
    Owners,
    annotate,
    managed_refs,
)
from mic_supervisor.host import processes
from mic_supervisor.host.lock import lock_holder
from mic_supervisor.model import (
    GpuInventory,
    GpuProcess,
    ObservedWorkload,
    Owner,
    OwnerKind,
    RuntimeView,
)
from mic_supervisor.text import printable

KILL_WAIT = 10.0  # seconds from KILL until a process counts as one that does not end
RELEASE_WAIT = 15.0  # seconds until the driver has to have forgotten it
_STEP = 0.05
_GPU_STEP = 0.5


@dataclass(frozen=True, slots=True)
class Hold:
    """One GPU that a process is on, and what people call it. `used` in bytes; None is unknown."""

    number: int | str
    uuid: str
    used: int | None


@dataclass(frozen=True, slots=True)
class Target:
    """One running process. `started` is in clock ticks since boot, `since` since the epoch."""

    pid: int
    started: int
    name: str
    since: float
    holds: tuple[Hold, ...]
    owner: Owner
    scope: str | None = None  # MIC_SCOPE and MIC_INSTANCE of its environment
    instance: str | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """One look at the GPUs, who is on them, and what is ours."""

    inventory: GpuInventory
    views: tuple[RuntimeView, ...]

    @property
    def causes(self) -> list[tuple[str, str]]:
        """(runtime, why it could not be read)."""
        return [(view.runtime, view.error) for view in self.views if view.error is not None]

    def pids(self, kind: OwnerKind) -> list[int]:
        """The running holders with an owner of this kind, each once, in order."""
        found = {
            process.pid
            for gpu in self.inventory.gpus
            for process in gpu.processes or ()
            if process.owner is not None and process.owner.kind is kind
            if kind is not OwnerKind.ORPHAN or process.start_time is not None
        }
        return sorted(found)

    def target(self, pid: int) -> Target | None:
        """The process; None when there is none, or only a zombie that holds nothing."""
        stat = processes.stat(pid)
        if stat is None or not stat.running:
            return None
        process = GpuProcess(pid, stat.name, None, stat.start_time)
        environment = processes.environ(pid) or {}
        return Target(
            pid=pid,
            started=stat.start_time,
            name=stat.name,
            since=clocks.in_wall(clocks.from_ticks(stat.start_time)),
            holds=tuple(self._holds(pid)),
            owner=Owners(managed_refs(self.views)).of(process),
            scope=environment.get(SCOPE_VARIABLE),
            instance=environment.get(INSTANCE_VARIABLE),
        )

    def workload_of(self, instance: str | None) -> ObservedWorkload | None:
        workloads = (item for view in self.views for item in view.workloads)
        return next((item for item in workloads if item.identity.instance == instance), None)

    def kept_by(self, pid: int) -> str | None:
        """The instance whose process tree this one keeps."""
        workloads = (item for view in self.views for item in view.workloads)
        return next((item.identity.instance for item in workloads if item.keeper == pid), None)

    def container_name(self, ref: str | None) -> str | None:
        foreign_workloads = (item for view in self.views for item in view.foreign_workloads)
        return next((item.name for item in foreign_workloads if item.ref == ref), None)

    def _holds(self, pid: int) -> Iterable[Hold]:
        for gpu in self.inventory.gpus:
            for process in gpu.processes or ():
                if process.pid == pid:
                    yield Hold(gpu.number, gpu.uuid, process.used_memory)


def survey(sources: Sources) -> Survey:
    """Looks at everything that tells whose a process is."""
    inventory = sources.gpus.observe()
    views = tuple(runtime.observe() for runtime in sources.runtimes.values())
    return Survey(annotate(inventory, managed_refs(views)), views)


# --- which may be ended --------------------------------------------------------------------------


def refuse_outright(pid: int, scope: str, lock_path: Path) -> None:
    """What is never ended, whoever asks. Raises MicError."""
    if pid == 1:
        _refuse(pid, "it is the machine's first process, and everything ends with it")
    if pid == os.getpid():
        _refuse(pid, "it is this very command")
    holder = lock_holder(lock_path)
    if holder is not None and holder.pid == pid:
        daemon = holder.command == "mic-supervisor run"
        _refuse(
            pid,
            f"it is the supervisor of scope {scope} ({holder.command})",
            "stop it with: systemctl stop mic"
            if daemon
            else "let it finish, or press Ctrl-C there",
        )


def chosen(survey: Survey, pid: int, scope: str, *, force: bool) -> Target:
    """The process, where it may be ended. Raises MicError."""
    target = survey.target(pid)
    if target is None:
        listed = [
            str(gpu.number)
            for gpu in survey.inventory.gpus
            for p in gpu.processes or ()
            if p.pid == pid
        ]
        if listed:
            _refuse(
                pid,
                f"there is no such process, although GPU {', '.join(listed)} lists it",
                "the driver has not cleaned up: see dmesg | grep -i -e xid -e nvrm",
            )
        _refuse(pid, "there is no such process")
    _refuse_ours(survey, target, scope, force=force)
    if not force:
        _refuse_untold(survey, target)
        if not target.holds:
            if survey.inventory.error is not None:
                _refuse(
                    pid,
                    f"it is not known whether it holds a GPU: {survey.inventory.error_line}",
                    "end it anyway with: --force",
                )
            _refuse(pid, f"{printable(target.name)} holds no GPU", "end it anyway with: --force")
    return target


def orphan_processes(survey: Survey, scope: str, *, force: bool) -> list[Target]:
    """The processes that hold a GPU and that nobody owns. Raises MicError."""
    if survey.inventory.error is not None:
        raise MicError(survey.inventory.error, hint=survey.inventory.hint)
    targets = []
    for pid in survey.pids(OwnerKind.ORPHAN):
        target = survey.target(pid)
        if target is None or target.owner.kind is not OwnerKind.ORPHAN or _is_kin(target, scope):
            continue
        if not force:
            _refuse_untold(survey, target)
        targets.append(target)
    return targets


def _refuse_ours(survey: Survey, target: Target, scope: str, *, force: bool) -> None:
    managed = target.owner.kind is OwnerKind.MANAGED
    ours = target.owner.instance if managed else survey.kept_by(target.pid)
    if ours is not None:
        workload = survey.workload_of(ours)
        hint = None
        if workload is not None:
            known = survey.inventory.numbers
            numbers = [known[uuid] for uuid in workload.identity.gpus if uuid in known]
            where = f" --gpu {numbers[0]}" if numbers else ""
            hint = f"stop it with: mic-supervisor stop {workload.identity.model}{where}"
        _refuse(target.pid, f"it belongs to our instance {ours}", hint)
    if _is_kin(target, scope) and not force:
        _refuse(
            target.pid,
            f"it belongs to instance {target.instance} of scope {target.scope}",
            f"look at it with: MIC_SCOPE={target.scope} mic-supervisor status",
        )


def _is_kin(target: Target, scope: str) -> bool:
    """Whether it is another scope's: nobody's as far as this one knows, and yet not nobody's."""
    return bool(target.instance) and target.scope not in (None, scope)


def _refuse_untold(survey: Survey, target: Target) -> None:
    """A runtime that cannot be read may well call it its own."""
    if target.owner.kind is OwnerKind.UNKNOWN:
        _refuse(target.pid, "its owner cannot be read", "run as root, or say --force")
    contained = target.owner.kind is OwnerKind.CONTAINER
    for runtime, cause in survey.causes:
        if (runtime == "docker") == contained:
            _refuse(
                target.pid,
                f"it is not known whether it is one of ours: {cause}",
                "fix that first, or say --force",
            )


def _refuse(pid: int, why: str, hint: str | None = None) -> NoReturn:
    raise MicError(f"cannot kill {pid}: {why}", hint=hint)


def describe(target: Target, survey: Survey) -> str:
    """ "PID 4121 (python) on GPU 1 (18.2 GiB), since 2026-11-22 10:14:02, of nobody"."""
    holds = ", ".join(f"GPU {hold.number} ({_gib(hold.used)})" for hold in target.holds)
    since = clocks.local(target.since).strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"PID {target.pid} ({printable(target.name)}) on {holds or 'no GPU'}, since {since}, "
        f"{printable(_owner(target, survey))}"
    )


def _owner(target: Target, survey: Survey) -> str:
    ref = target.owner.ref or "?"
    if target.owner.kind is OwnerKind.CONTAINER:
        name = survey.container_name(ref)
        called = f"{name} ({ref[:12]})" if name else ref[:12]
        return f"of container {called}: its manager may start it again"
    if target.owner.kind is OwnerKind.UNIT:
        again = ": its manager may start it again" if ref.endswith(".service") else ""
        return f"of unit {ref}{again}"
    if target.owner.kind is OwnerKind.UNKNOWN:
        return "of an unknown owner"
    if target.instance:
        return f"left over from instance {target.instance}"
    return "of nobody"


def _gib(count: int | None) -> str:
    return "memory unknown" if count is None else f"{count / (1 << 30):.1f} GiB"


# --- ending them ---------------------------------------------------------------------------------

Outcome = Literal["ended", "gone", "changed", "denied", "stays", "listed", "unknown"]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one target.

    "gone": it had ended before the first signal. "changed": another one owns it by now, and it was
    left alone. "denied": no permission. "stays": KILL did not end it. "listed": it ended, and a
    GPU still lists it; "unknown": it ended, and whether one does cannot be read.
    """

    target: Target
    outcome: Outcome
    killed: bool = False


def end(
    targets: Sequence[Target],
    survey: Callable[[], Survey],
    *,
    grace: float,
    kill_wait: float = KILL_WAIT,
    release_wait: float = RELEASE_WAIT,
) -> list[Result]:
    """TERM to all, KILL to those that are there after `grace` seconds; one result for each.

    Waits until each is gone and no GPU lists it, `release_wait` seconds at most.
    """
    results: dict[int, Result] = {}
    waiting = _signal_all(targets, survey, signal.SIGTERM, results)
    waiting = _wait(waiting, grace, results)
    if waiting:
        waiting = _signal_all(waiting, survey, signal.SIGKILL, results)
        for left in _wait(waiting, kill_wait, results, killed=True):
            results[left.pid] = Result(left, "stays", killed=True)
    _await_release(results, survey, release_wait)
    return [results[target.pid] for target in targets]


def _signal_all(
    targets: Sequence[Target], survey: Callable[[], Survey], number: int, results: dict[int, Result]
) -> list[Target]:
    """Those that were signalled."""
    now = survey()
    signalled = []
    for target in targets:
        fresh = now.target(target.pid)
        if fresh is None or fresh.started != target.started:
            results[target.pid] = Result(target, "gone" if number == signal.SIGTERM else "ended")
            continue
        if fresh.owner != target.owner:
            results[target.pid] = Result(target, "changed")
            continue
        try:
            sent = processes.send_signal(target.pid, target.started, number)
        except PermissionError:
            results[target.pid] = Result(target, "denied")
            continue
        if sent:
            signalled.append(target)
        else:
            results[target.pid] = Result(target, "ended")
    return signalled


def _wait(
    targets: Sequence[Target], timeout: float, results: dict[int, Result], *, killed: bool = False
) -> list[Target]:
    """Those that are still there after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (
        left := [one for one in targets if processes.is_running(one.pid, one.started)]
    ) and time.monotonic() < deadline:
        time.sleep(_STEP)
    results |= {one.pid: Result(one, "ended", killed) for one in targets if one not in left}
    return left


def _await_release(
    results: dict[int, Result], survey: Callable[[], Survey], timeout: float
) -> None:
    """Marks those that a GPU still lists, or of which that cannot be read."""
    ended = {
        pid: {hold.uuid for hold in result.target.holds}
        for pid, result in results.items()
        if result.outcome in ("ended", "gone") and result.target.holds
    }
    deadline = time.monotonic() + timeout
    while ended:
        inventory = survey().inventory
        readable = {gpu.uuid: gpu for gpu in inventory.gpus if gpu.processes is not None}
        outcomes: dict[int, Outcome | None] = {}
        for pid, uuids in ended.items():
            listed = any(
                process.pid == pid and process.start_time in (None, results[pid].target.started)
                for uuid in uuids & readable.keys()
                for process in readable[uuid].processes or ()
            )
            outcomes[pid] = "listed" if listed else None if uuids <= readable.keys() else "unknown"
        ended = {pid: uuids for pid, uuids in ended.items() if outcomes[pid] is not None}
        if ended and time.monotonic() >= deadline:
            for pid in ended:
                results[pid] = replace(results[pid], outcome=outcomes[pid] or "unknown")
            return
        if ended:
            time.sleep(_GPU_STEP)
