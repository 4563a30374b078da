"""Starts one host process through a keeper, ends the tree of one, and says so on disk."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mic_supervisor.errors import RuntimeRefused, StopFailed
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import ObservedWorkload, ProcessSpec
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.identity import IDENTITY, identity_variables
from mic_supervisor.runtimes.keeper import program, records
from mic_supervisor.runtimes.keeper.records import BadRecord, Record

_KEEPER_GRACE = 2.0  # seconds that a keeper has to write the exit status once all is gone
_LONGEST_PAUSE = 0.05  # seconds between two looks at a tree that is dying


@dataclass(frozen=True, slots=True)
class Options:
    """How a runtime keeps its processes. See KeeperRuntime; times are in seconds."""

    log_max_size: int  # bytes
    kill_timeout: float
    remains_grace: float


def end_tree(path: Path, record: Record, number: int, grace: float, options: Options) -> None:
    """Signal the main process, wait `grace` seconds at most, then kill until nothing is left.

    What the main process leaves behind when it ends in time is asked too, and killed after
    `remains_grace`. Raises StopFailed `kill_timeout` after the first KILL.
    """
    deadline = time.monotonic() + grace
    # Before its parent ends: without a keeper, who its parent was is all that may tell.
    known = records.members(path, record)
    child = record.child
    if child is not None and procfs.send_signal(child.pid, child.start_time, number):
        procfs.send_signal(child.pid, child.start_time, signal.SIGCONT)  # or it never hears of it
        while child.runs() and time.monotonic() < deadline:
            time.sleep(0.005)
    if child is None or not child.runs():
        deadline = min(deadline, time.monotonic() + options.remains_grace)
    _kill(path, record, deadline, options.kill_timeout, known)


def end_remains(
    path: Path, record: Record, seen: ObservedWorkload, options: Options, *, at: float
) -> None:
    """Make sure that nothing is left of a run that has ended, where its keeper could not do it.

    TERM, then KILL after `remains_grace`, as a keeper does. Raises StopFailed and OSError.
    """
    if (record.boot_id, record.pid_namespace) == records.machine():
        _kill(path, record, time.monotonic() + options.remains_grace, options.kill_timeout)
    records.write_exit(path, record, seen.error or records.LOST, at)


def await_exit_status(path: Path, record: Record, *, at: float) -> None:
    """Wait until the keeper has written it and is gone; do its work where it does not."""
    give_up = time.monotonic() + _KEEPER_GRACE
    while record.keeper is not None and record.keeper.runs():
        if time.monotonic() >= give_up:  # it was stopped, or is stuck in writing
            procfs.send_signal(record.keeper.pid, record.keeper.start_time, signal.SIGKILL)
            break
        time.sleep(0.005)
    if path.exists() and records.read_exit(path, record.run_id)[0] is None:
        records.write_exit(path, record, records.LOST, at)


def kill_now(path: Path, record: Record, options: Options) -> None:
    """KILL for keeper, child and everything below. Raises StopFailed and OSError."""
    for anchor in record.anchors:
        procfs.send_signal(anchor.pid, anchor.start_time, signal.SIGKILL)
    _kill(path, record, time.monotonic(), options.kill_timeout)


def _kill(
    path: Path,
    record: Record,
    deadline: float,
    patience: float,
    known: dict[int, int] | None = None,
) -> None:
    """TERM once for everything that is left, where no keeper does it, and KILL from `deadline`.

    `known` is what an earlier look found.
    """
    give_up = max(deadline, time.monotonic()) + patience
    asked: set[tuple[int, int]] = set()
    empty = 0
    pause = 0.002
    # Twice: a process that forks and ends while the table is read may be missed once.
    while empty < 2:
        left = known = records.members(path, record, known)
        if not left:
            empty += 1
            continue
        empty = 0
        now = time.monotonic()
        if now >= give_up:
            raise StopFailed(
                f"cannot stop {record.name}: {_named(left)} survived KILL",
                hint="where the kernel does not let go of it, only a restart of the machine helps",
            )
        if now >= deadline:
            _signal(left.items(), signal.SIGKILL)
        elif record.keeper is None or not record.keeper.runs():
            _signal(left.items() - asked, signal.SIGTERM)
            asked |= left.items()
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


def _signal(processes: Iterable[tuple[int, int]], number: int) -> None:
    for pid, start_time in processes:
        with suppress(PermissionError):  # it will count as a survivor
            procfs.send_signal(pid, start_time, number)
            procfs.send_signal(pid, start_time, signal.SIGCONT)


def _named(pids: dict[int, int]) -> str:
    known = [(pid, procfs.stat(pid)) for pid in sorted(pids)]
    return "PID " + ", ".join(f"{pid} ({one.name if one else '?'})" for pid, one in known)


# --- starting -----------------------------------------------------------------------------------


START_TIMEOUT = 30.0
"""Seconds after which a start that gives no answer has failed."""


def start_kept(
    path: Path, record: Record, spec: ProcessSpec, logs: Path, handle: int, options: Options
) -> None:
    """Returns once the program was executed; `handle` is the lock on `path`.

    A failure leaves what was there before. Raises RuntimeRefused, PreflightFailed and OSError.
    """
    before = {
        name: (path / name).read_bytes()
        for name in (program.RECORD, program.EXIT)
        if (path / name).is_file()
    }
    try:
        # Before the keeper exists: whoever observes now sees that this is about to run.
        records.write(path, record)
        _spawn(path, _payload(record, spec, logs, options), handle)
    except BaseException:  # an interrupt too must leave nothing half-started behind
        _undo(path, record, before, options)
        if logs != path:
            shutil.rmtree(logs, ignore_errors=True)
        raise


def _undo(path: Path, record: Record, before: dict[str, bytes], options: Options) -> None:
    try:
        made = records.load(path)
    except BadRecord:
        made = None
    if made is not None and made.run_id == record.run_id:
        kill_now(path, made, options)
    if not before:
        records.discard(path)
    for name in reversed(before):  # the exit status first
        draft = path / f".{name}.before"
        draft.write_bytes(before[name])
        draft.chmod(0o600)
        draft.replace(path / name)


def _variables(record: Record) -> dict[str, str]:
    """What names the run to whoever finds one of its processes without a record."""
    return {**identity_variables(record.name, record.identity), records.RUN_ID: record.run_id}


def _payload(record: Record, spec: ProcessSpec, logs: Path, options: Options) -> dict[str, Any]:
    who = checks.account(spec.user)
    return {
        "record": record.document(),
        "command": list(spec.command),
        "env": {**checks.environment(spec, who), **_variables(record)},
        "working_dir": record.working_dir,
        "limits": checks.limits(spec),
        "user": {"uid": who.uid, "gid": who.gid, "groups": who.groups} if who.switch else None,
        "stop_signal": checks.signal_number(spec.stop_signal) or signal.SIGTERM.value,
        "stop_timeout": spec.stop_timeout,
        "remains_grace": options.remains_grace,
        "logs": str(logs),
        "log_max_size": options.log_max_size,
    }


def _spawn(path: Path, payload: dict[str, Any], handle: int) -> None:
    own = {name: payload["env"][name] for name in (IDENTITY, records.RUN_ID)}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", program.__file__, str(path), str(handle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(handle,),
        env={"PATH": checks.DEFAULT_PATH, "LANG": "C.UTF-8", **own},
        cwd="/",
        start_new_session=True,
    )
    try:
        answer, _ = process.communicate(json.dumps(payload).encode(), START_TIMEOUT)
    except BaseException as error:
        # The keeper is in the session of the process that it forked from, and may not have come
        # as far as the record; without it, a child that waits at the barrier goes.
        for one in procfs.processes().values():
            if one.session == process.pid:
                procfs.send_signal(one.pid, one.start_time, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            reason = f"its keeper gave no answer within {START_TIMEOUT:g} s"
            raise RuntimeRefused(f"cannot start {path.name}: {reason}") from error
        raise
    said = answer.decode(errors="replace").strip().rpartition("\n")[2]
    try:
        reason = json.loads(said).get("error")
    except ValueError:
        reason = f"its keeper failed: {said or 'it was killed'}"
    if reason is not None:
        raise RuntimeRefused(f"cannot start {path.name}: {reason}")
