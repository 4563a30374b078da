"""The processes of a run: starts them, ends them, and finds them where no record tells."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from mic_supervisor import clocks, codec
from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.host import processes as procfs
from mic_supervisor.host import programs
from mic_supervisor.host.processes import Stat
from mic_supervisor.model import Identity, ObservedWorkload, ProcessSpec
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.identity import (
    IDENTITY,
    identity_of,
    identity_variables,
    unknown_identity,
)
from mic_supervisor.runtimes.keeper import program, records
from mic_supervisor.runtimes.keeper.records import RUN_ID, Anchor, BadRecord, Record, machine
from mic_supervisor.text import quoted

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
    if (record.boot_id, record.pid_namespace) == machine():
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
    timeout: float,
    known: dict[int, int] | None = None,
) -> None:
    """TERM once for everything that is left, where no keeper does it, and KILL from `deadline`.

    `known` is what an earlier look found.
    """
    give_up = max(deadline, time.monotonic()) + timeout
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
            raise checks.survived(record.name, _named(left))
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
    return {**identity_variables(record.name, record.identity), RUN_ID: record.run_id}


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
    own = {name: payload["env"][name] for name in (IDENTITY, RUN_ID)}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", program.__file__, str(path), str(handle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(handle,),
        env={"PATH": programs.DEFAULT_PATH, "LANG": "C.UTF-8", **own},
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
    if (why := problem(answer)) is not None:
        raise RuntimeRefused(f"cannot start {path.name}: {why}")


def problem(answer: bytes) -> str | None:
    """Why a start failed, by all that its keeper wrote; None: the program runs."""
    said = answer.decode(errors="replace").strip().rpartition("\n")[2]
    with suppress(codec.BadDocument):
        document = codec.parse(said)
        if isinstance(document, dict):
            if isinstance(error := document.get("error"), str):
                return error
            if isinstance(document.get("pid"), int):
                return None
    return f"its keeper failed: {quoted(said, 300) if said else 'it was killed'}"


# --- the runs that the kernel vouches for -------------------------------------------------------
#
# A run is known by its keeper, or, where that was killed, by its main process; by nothing else:
# what inherited or copied the environment of either is no run of its own. Anybody may set any
# environment and command line, so those of a process are believed only where all its users could be
# ours.

_PROGRAMS = ("program.py", "keeper.py")  # now, and in earlier versions
_PROMPT = 10.0  # seconds after its own start within which a keeper has started its main process


@dataclass(frozen=True, slots=True)
class Claim:
    """One run. `directory` is the device and inode that its keeper holds, None without a keeper.

    Of `record` only identity, run and PIDs are as they were written: when it was made, its user
    and its directory are what the kernel tells now. `child` None: the main process has ended.
    """

    record: Record
    directory: tuple[int, int] | None

    @property
    def pid(self) -> int:
        """Whom to name to a person."""
        return self.record.anchors[0].pid

    def runs(self) -> bool:
        return any(one.runs() for one in self.record.anchors)


@dataclass(frozen=True, slots=True)
class Claims:
    """`others` are processes of the scope that are neither keeper nor main process of a run: PID
    and instance, by run.
    """

    found: tuple[Claim, ...]
    others: Mapping[str, tuple[int, str]]


def find_runs(scope: str, host: str, users: Collection[int]) -> Claims:
    """Every run of the scope in this PID namespace.

    `users` are those that our main processes may run as, besides root and this one. Raises OSError.
    """
    known = procfs.processes()
    ours = {0, os.geteuid()}
    found: dict[str, Claim] = {}
    keepers = {
        pid: held_directory
        for pid, one in known.items()
        if one.name == program.NAME and one.running
        if (held_directory := _directory_of(pid)) and _believed(pid, ours)
    }
    for pid, (directory, lock) in keepers.items():
        if known[pid].ppid in keepers:
            continue  # its child, which has not executed anything yet
        claim = _of_keeper(known[pid], directory, lock, _main_of(pid, known), host)
        if claim is not None and claim.record.identity.scope == scope:
            found[claim.record.run_id] = claim
    others: dict[str, tuple[int, str]] = {}
    for pid in sorted(procfs.with_environ("MIC_SCOPE", [scope])):
        variables = procfs.environ(pid) or {}
        run = variables.get(RUN_ID)
        if run is None or run in found:
            continue
        others.setdefault(run, (pid, variables.get("MIC_INSTANCE", "?")))
        claim = _of_main(known.get(pid) or procfs.stat(pid), variables)
        if claim and claim.record.identity.scope == scope and _believed(pid, ours | {*users}):
            found[run] = claim
    return Claims(
        tuple(found[run] for run in sorted(found)),
        {run: other for run, other in others.items() if run not in found},
    )


def _of_keeper(one: Stat, directory: str, lock: str, main: Stat | None, host: str) -> Claim | None:
    try:
        held = Path(f"/proc/{one.pid}/fd/{lock}").stat()
    except OSError:
        return None  # gone
    variables = procfs.environ(one.pid) or {}
    identity = identity_of(variables)
    if isinstance(identity, str) and main is not None:  # a keeper of an earlier version
        variables = procfs.environ(main.pid) or {}
        identity = _guess(variables, host)
    run = variables.get(RUN_ID)
    if isinstance(identity, str) or run is None:
        return None
    record = _record(Path(directory).name, identity[1], run, main or one)
    child = None if main is None else _anchor(main)
    return Claim(replace(record, keeper=_anchor(one), child=child), (held.st_dev, held.st_ino))


def _of_main(one: Stat | None, variables: Mapping[str, str]) -> Claim | None:
    """A process that says of itself, and not of whom it came from, that it is a main one."""
    identity = identity_of(variables)
    parts = variables.get(program.MAIN, "").split(":")
    if one is None or not one.running or isinstance(identity, str):
        return None
    if len(parts) != 4 or not all(map(str.isdigit, parts)):
        return None
    mine, its = (
        Anchor(int(parts[0]), int(parts[1])),
        Anchor(int(parts[2]), int(parts[3])),
    )
    if mine != _anchor(one) or its.pid <= 1:
        return None
    record = _record(*identity, variables[RUN_ID], one)
    return Claim(replace(record, keeper=its, child=mine), None)


def _main_of(pid: int, known: Mapping[int, Stat]) -> Stat | None:
    """The first child, a session of its own: a program may overwrite its environment."""
    children = [
        one for one in known.values() if one.ppid == pid and one.running and one.session == one.pid
    ]
    first = min(children, key=lambda one: (one.start_time, one.pid), default=None)
    latest = clocks.from_ticks(known[pid].start_time) + _PROMPT
    return first if first and clocks.from_ticks(first.start_time) <= latest else None


def _guess(variables: Mapping[str, str], host: str) -> tuple[str, Identity] | str:
    """Of a run of a version that put less into the environment: no ports, no specification."""
    instance, scope = variables.get("MIC_INSTANCE"), variables.get("MIC_SCOPE")
    if instance is None or scope is None:
        return "its environment does not name it as ours"
    devices = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = tuple(devices) if all(one.startswith(("GPU-", "MIG-")) for one in devices) else ()
    identity = unknown_identity(scope, host, instance, variables.get("MIC_SPEC_HASH", ""))
    return instance, replace(identity, gpus=gpus)


def _record(name: str, identity: Identity, run: str, one: Stat) -> Record:
    boot, namespace = machine()
    begun = clocks.in_wall(clocks.from_ticks(one.start_time))
    return Record(
        name=name,
        identity=identity,
        run_id=run,
        boot_id=boot,
        pid_namespace=namespace,
        created_at=begun,
        started_at=begun,
        user=_user_name(one.pid),
        working_dir=_working_dir(one.pid),
    )


def _directory_of(pid: int) -> tuple[str, str] | None:
    """(directory, descriptor of the lock) of a process with the command line of a keeper."""
    line = procfs.command_line(pid)
    if len(line) < 6 or Path(line[-3]).name not in _PROGRAMS or not line[-1].isdigit():
        return None
    return line[-2], line[-1]


def _believed(pid: int, users: Collection[int]) -> bool:
    """Whether only these users can have made it what it says that it is, and its PIDs are ours."""
    try:
        found = procfs.user_ids(pid)
        here = procfs.pid_namespace(pid) == machine()[1]
        return here and bool(found) and found <= {*users}
    except OSError:
        return False  # gone, or not ours to look at


def _anchor(one: Stat) -> Anchor:
    return Anchor(one.pid, one.start_time)


def _user_name(pid: int) -> str | None:
    """Its user where that is another one than this."""
    uid = min(procfs.user_ids(pid), default=os.geteuid())
    if uid == os.geteuid():
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _working_dir(pid: int) -> str:
    try:
        return psutil.Process(pid).cwd()
    except psutil.Error:
        return "/"
