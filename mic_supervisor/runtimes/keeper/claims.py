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
from mic_supervisor.runtimes.keeper import program
from mic_supervisor.runtimes.keeper.records import RUN_ID, Anchor, Machine, Record
from mic_supervisor.runtimes.systemd_unit import identity_of, unknown_identity

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
        anchor = self.record.child or self.record.keeper
        assert anchor is not None  # a claim without either is never made
        return anchor.pid

    def runs(self) -> bool:
        record = self.record
        return any(one is not None and one.runs() for one in (record.keeper, record.child))


@dataclass(frozen=True, slots=True)
class Claims:
    """`others` are processes of the scope that are neither keeper nor main process of a run: PID
    and instance, by run.
    """

    found: tuple[Claim, ...]
    others: Mapping[str, tuple[int, str]]


def user_id(user: str | None) -> int | None:
    """The number of "name", "name:group" or "1000"; None when there is no such user."""
    name = (user or "").partition(":")[0]
    try:
        return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid if name else None
    except KeyError:
        return None


def find(scope: str, host: str, users: Collection[int], here: Machine) -> Claims:
    """Every run of the scope in this PID namespace.

    `users` are those that our main processes may run as, besides root and this one. Raises OSError.
    """
    known = procfs.processes()
    ours = {0, os.geteuid()}
    walk = _Walk(scope, host, here, known)
    keepers = {
        pid: arguments
        for pid, one in known.items()
        if one.name == program.NAME and one.running
        if (arguments := _keeper_arguments(pid)) and _believed(pid, ours, here)
    }
    for pid, (directory, lock) in keepers.items():
        if known[pid].ppid not in keepers:  # else: its child, which has not executed anything yet
            walk.add_keeper(pid, directory, lock)
    others: dict[str, tuple[int, str]] = {}
    for pid in sorted(procfs.with_environ("MIC_SCOPE", [scope])):
        variables = procfs.environ(pid) or {}
        run = variables.get(RUN_ID)
        if run is None:
            continue
        others.setdefault(run, (pid, variables.get("MIC_INSTANCE", "?")))
        if run not in walk.found and _believed(pid, ours | {*users}, here):
            walk.add_main(pid, variables)
    return Claims(
        tuple(walk.found[run] for run in sorted(walk.found)),
        {run: other for run, other in others.items() if run not in walk.found},
    )


class _Walk:
    """The working state of one call of `find`."""

    def __init__(self, scope: str, host: str, here: Machine, known: dict[int, Stat]) -> None:
        self.found: dict[str, Claim] = {}
        self._scope = scope
        self._host = host
        self._here = here
        self._known = known

    def add_keeper(self, pid: int, directory: str, lock: str) -> None:
        main = self._main_of(pid)
        variables = _environ(pid)
        if isinstance(identity_of(variables), str) and main is not None:
            variables = _environ(main.pid)  # a keeper of an earlier version
        try:
            held = Path(f"/proc/{pid}/fd/{lock}").stat()
        except OSError:
            return  # gone
        one = self._known[pid]
        record = self._record(variables, Path(directory).name, main or one)
        if record is not None:
            record = replace(
                record, keeper=_anchor(one), child=None if main is None else _anchor(main)
            )
            self.found[record.run_id] = Claim(record, (held.st_dev, held.st_ino))

    def add_main(self, pid: int, variables: Mapping[str, str]) -> None:
        """A process that says of itself, and not of whom it came from, that it is a main one."""
        one = self._known.get(pid) or procfs.stat(pid)
        parts = variables.get(program.MAIN, "").split(":")
        if one is None or not one.running or len(parts) != 4 or not all(map(str.isdigit, parts)):
            return
        mine, its = Anchor(int(parts[0]), int(parts[1])), Anchor(int(parts[2]), int(parts[3]))
        if mine != _anchor(one) or its.pid <= 1:
            return
        record = self._record(variables, None, one)
        if record is not None:
            self.found[record.run_id] = Claim(replace(record, keeper=its, child=mine), None)

    def _main_of(self, pid: int) -> Stat | None:
        """The first child, a session of its own: a program may overwrite its environment."""
        children = [
            one
            for one in self._known.values()
            if one.ppid == pid and one.running and one.session == one.pid
        ]
        first = min(children, key=lambda one: (one.start_time, one.pid), default=None)
        latest = clocks.from_ticks(self._known[pid].start_time) + _PROMPT
        return first if first and clocks.from_ticks(first.start_time) <= latest else None

    def _record(self, variables: Mapping[str, str], name: str | None, one: Stat) -> Record | None:
        """What this environment says; None: not that it is a run of this scope."""
        said = identity_of(variables)
        found = self._guess(variables, name) if isinstance(said, str) else said
        run = variables.get(RUN_ID)
        if found is None or run is None or found[1].scope != self._scope:
            return None
        begun = clocks.in_wall(clocks.from_ticks(one.start_time))
        return Record(
            name=name or found[0],
            identity=found[1],
            run_id=run,
            boot_id=self._here.boot,
            pid_namespace=self._here.namespace,
            created_at=begun,
            started_at=begun,
            user=_user_name(one.pid),
            working_dir=_working_dir(one.pid),
        )

    def _guess(self, variables: Mapping[str, str], name: str | None) -> tuple[str, Identity] | None:
        """Of a run of a version that put less into the environment: no ports, no specification."""
        instance, scope = variables.get("MIC_INSTANCE"), variables.get("MIC_SCOPE")
        if instance is None or scope is None or name is None:
            return None
        devices = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = tuple(devices) if all(one.startswith("GPU-") for one in devices) else ()
        identity = unknown_identity(scope, self._host, instance, variables.get("MIC_SPEC_HASH", ""))
        return name, replace(identity, gpus=gpus)


def _keeper_arguments(pid: int) -> tuple[str, str] | None:
    """(directory, descriptor of the lock) of a process with the command line of a keeper."""
    line = procfs.command_line(pid)
    if len(line) != 7 or Path(line[4]).name not in _PROGRAMS or not line[6].isdigit():
        return None
    return line[5], line[6]


def _believed(pid: int, users: Collection[int], here: Machine) -> bool:
    """Whether only these users can have made it what it says that it is, and its PIDs are ours."""
    try:
        found = procfs.user_ids(pid)
        return bool(found) and found <= {*users} and procfs.pid_namespace(pid) == here.namespace
    except OSError:
        return False  # gone, or not ours to look at


def _environ(pid: int) -> dict[str, str]:
    return procfs.environ(pid) or {}


def _anchor(one: Stat) -> Anchor:
    return Anchor(one.pid, one.start_time)


def _user_name(pid: int) -> str | None:
    """Its user where that is another one than this."""
    found = procfs.user_ids(pid)
    uid = min(found, default=os.geteuid())
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
