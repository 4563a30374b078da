"""The runs that the kernel vouches for, whatever the records on disk say.

A run is known by its keeper, or, where that was killed, by its main process; by nothing else: what
inherited or copied the environment of either is no run of its own. Anybody may set any environment
and command line, so those of a process are believed only where all its users could be ours.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mic_supervisor import clocks
from mic_supervisor.host import processes as procfs
from mic_supervisor.host.processes import Stat
from mic_supervisor.model import Identity
from mic_supervisor.runtimes.identity import identity_of, unknown_identity
from mic_supervisor.runtimes.keeper import program
from mic_supervisor.runtimes.keeper.records import RUN_ID, Anchor, Record, machine

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


def find(scope: str, host: str, users: Collection[int]) -> Claims:
    """Every run of the scope in this PID namespace.

    `users` are those that our main processes may run as, besides root and this one. Raises OSError.
    """
    known = procfs.processes()
    ours = {0, os.geteuid()}
    found: dict[str, Claim] = {}
    keepers = {
        pid: place
        for pid, one in known.items()
        if one.name == program.NAME and one.running
        if (place := _place_of(pid)) and _believed(pid, ours)
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
    said = identity_of(variables)
    if isinstance(said, str) and main is not None:  # a keeper of an earlier version
        variables = procfs.environ(main.pid) or {}
        said = _guess(variables, host)
    run = variables.get(RUN_ID)
    if isinstance(said, str) or run is None:
        return None
    record = _record(Path(directory).name, said[1], run, main or one)
    child = None if main is None else _anchor(main)
    return Claim(replace(record, keeper=_anchor(one), child=child), (held.st_dev, held.st_ino))


def _of_main(one: Stat | None, variables: Mapping[str, str]) -> Claim | None:
    """A process that says of itself, and not of whom it came from, that it is a main one."""
    said = identity_of(variables)
    parts = variables.get(program.MAIN, "").split(":")
    if one is None or not one.running or isinstance(said, str):
        return None
    if len(parts) != 4 or not all(map(str.isdigit, parts)):
        return None
    mine, its = Anchor(int(parts[0]), int(parts[1])), Anchor(int(parts[2]), int(parts[3]))
    if mine != _anchor(one) or its.pid <= 1:
        return None
    record = _record(*said, variables[RUN_ID], one)
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
    gpus = tuple(devices) if all(one.startswith("GPU-") for one in devices) else ()
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


def _place_of(pid: int) -> tuple[str, str] | None:
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
        return os.readlink(f"/proc/{pid}/cwd")  # noqa: PTH115 - a magic link, not a path
    except OSError:
        return "/"
