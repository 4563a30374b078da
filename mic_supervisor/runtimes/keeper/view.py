"""What runs of a scope: what its records say, and, where they cannot be believed, the kernel.

A run whose record is damaged or gone still has its GPUs. It is told of as in doubt, until whoever
has the scope's lock writes its record again.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.host import processes as procfs
from mic_supervisor.host.lock import lock_pids
from mic_supervisor.model import (
    Doubt,
    ForeignWorkload,
    Launch,
    ObservedWorkload,
    ProcessSpec,
    RunState,
)
from mic_supervisor.runtimes.identity import GivenName, in_doubt, unknown_identity
from mic_supervisor.runtimes.keeper import records
from mic_supervisor.runtimes.keeper.program import RECORD
from mic_supervisor.runtimes.keeper.records import BadRecord, NotOurs, Record
from mic_supervisor.runtimes.keeper.run import Claim, Claims, find_runs

_RUNTIME = "subprocess"
_PAUSE = 10.0  # seconds between two walks through every environment, where nothing calls for one
_ANSWER = "start the daemon, or run `mic-supervisor apply`: it writes the record again"


@dataclass
class _Records:
    """One reading of the directory: what its records say, and why the others cannot be believed.

    `by_inode`: what is in the directory, hidden or not, by device and inode.
    """

    names: set[str] = field(default_factory=set)
    good: dict[Path, tuple[Record, ObservedWorkload]] = field(default_factory=dict)
    bad: dict[Path, BadRecord] = field(default_factory=dict)
    by_inode: dict[tuple[int, int], Path] = field(default_factory=dict)

    def names_run(self, claim: Claim) -> bool:
        """Whether a good record names it, with the PIDs that it has."""
        mine = claim.record
        return any(
            record.run_id == mine.run_id
            and (
                record.child == mine.child
                or mine.child is None
                or (record.child is None and one.state is not RunState.EXITED)  # it is starting
            )
            for record, one in self.good.values()
        )

    def held_by(self, claim: Claim) -> Path | None:
        """The directory that its keeper holds, whatever it is called by now."""
        return self.by_inode.get(claim.directory) if claim.directory is not None else None

    def path_of(self, claim: Claim) -> Path | None:
        """The listed directory of a run: its keeper's, else one of its name that no other has."""
        held = self.held_by(claim)
        if held in self.good or held in self.bad:
            return held
        for path in (*self.bad, *self.over):
            if path.name == claim.record.name:
                return path
        return None

    @property
    def over(self) -> dict[Path, str]:
        """The runs that have ended, as their records say."""
        return {
            path: record.run_id
            for path, (record, one) in self.good.items()
            if one.state is RunState.EXITED
        }

    @property
    def key(self) -> tuple[object, ...]:
        """What a change of calls for a walk: a name that is gone may be a record that is lost."""
        bad = {(path.name, str(error)) for path, error in self.bad.items()}
        return self.names, bad, self.over.keys()


@dataclass(kw_only=True)
class RecordsView:
    """The look of one runtime at its directory, see KeeperRuntime.

    `repairs`: it writes records again, so the scope's lock is held. `turn` gives the lock of a
    name.
    """

    scope: str
    host: str
    directory: Path
    steady: Callable[[], float]
    repairs: bool
    given_name: GivenName | None
    turn: Callable[[str], threading.Lock]
    _users: set[int] = field(default_factory=set)
    _walked: tuple[float, tuple[object, ...], Claims] | None = None

    def paths(self, *, hidden: bool = False) -> list[Path]:
        try:
            paths = sorted(self.directory.iterdir())
        except FileNotFoundError:
            return []
        return [path for path in paths if (hidden or path.name[0] != ".") and path.is_dir()]

    def load(self, path: Path) -> Record | None:
        """The record in `path`; None when there is none. Raises BadRecord for another's, too."""
        record = records.load(path)
        if record is None:
            return None
        if record.identity.scope != self.scope:
            raise NotOurs(f"it belongs to scope {record.identity.scope}", elsewhere=True)
        if record.identity.host != self.host:
            raise NotOurs("it was started on another machine")
        name = self._name_of(record)
        if path.name != name:  # `cp -r`: what it names is what the original names
            raise NotOurs(f"it is a copy of the record of {name}", record.identity.instance)
        return record

    def observe(self) -> tuple[tuple[ObservedWorkload, ...], tuple[ForeignWorkload, ...]]:
        """Everything of ours, and what is in the way. Raises OSError."""
        read = self._read()
        known = self._claims(read)
        if self._lost(known, read):
            # A record is older than all that carries its run: after the processes, once more.
            read = self._read()
        repaired = [claim for claim in self._lost(known, read) if self._repair(claim, read)]
        if repaired:
            read = self._read()
        found = {path: workload for path, (_, workload) in read.good.items()}
        doubted = []
        for claim in self._lost(known, read):
            path = read.path_of(claim)
            if path is not None:
                found.pop(path, None)
            doubted.append((path, self._doubted(claim, path, read)))
        workloads = [*found.values(), *(workload for _, workload in doubted)]
        foreign_workloads = []
        reported = {path for path, _ in doubted}
        held = {read.held_by(claim) for claim in known.found}
        for path, error in read.bad.items():
            if path in reported:
                continue
            running = _is_locked(path)
            if running and path not in held and not isinstance(error, NotOurs):
                workloads.append(self._unknown(path, error))
            else:
                foreign_workloads.append(
                    ForeignWorkload(
                        _RUNTIME,
                        path.name,
                        path.name,
                        running=running,
                        reason=str(error),
                        claims=error.claims,
                        elsewhere=error.elsewhere,
                    )
                )
        runs = {record.run_id for record, _ in read.good.values()}
        for run, (pid, instance) in known.others.items():
            if run not in runs and procfs.exists(pid):
                reason = f"it was started for {instance}, and its record is gone"
                foreign_workloads.append(
                    ForeignWorkload(_RUNTIME, instance, f"PID {pid}", reason=reason)
                )
        return tuple(workloads), tuple(foreign_workloads)

    def twin(self, launch: Launch, spec: ProcessSpec) -> str | None:
        """Why a launch would run beside what has its instance or GPUs and no good record.

        Raises OSError.
        """
        self._learn(spec.user)
        wanted = launch.identity
        for claim in self._lost(self._find(), self._read()):
            its = claim.record.identity
            if its.instance == wanted.instance or {*its.gpus} & {*wanted.gpus}:
                return f"PID {claim.pid} runs for {its.instance}, and its record cannot be believed"
        return None

    def refuse_to_end(self, record: Record) -> None:
        """Raises RuntimeRefused where what is left of an ended run is its main process: then the
        record names other PIDs than the run has, and cannot be believed.
        """
        for claim in self._find().found:
            same = claim.record.run_id == record.run_id
            if same and claim.record.child not in (None, record.child):
                raise RuntimeRefused(
                    f"cannot end what is left of {record.name}: its record names other PIDs than "
                    f"PID {claim.pid}, which runs",
                    hint=_ANSWER,
                )

    # --- reading --------------------------------------------------------------------------

    def _read(self) -> _Records:
        read = _Records()
        for path in self.paths(hidden=True):
            try:
                if not path.is_symlink():
                    there = path.stat()
                    read.by_inode[there.st_dev, there.st_ino] = path
                if path.name.startswith("."):
                    continue
                read.names.add(path.name)
                record = self.load(path)
                if record is not None:
                    read.good[path] = record, records.as_workload(path, record)
                    self._learn(record.user)
                elif records.is_locked(path):
                    read.bad[path] = BadRecord(f"{RECORD} is missing")
                # else: cut short before it could write anything
            except FileNotFoundError:
                continue  # removed since it was listed
            except BadRecord as error:
                read.bad[path] = error
            except PermissionError as error:
                read.bad[path] = BadRecord(f"it cannot be read: {error.strerror}")
        # Of several directories that name one run its keeper's counts, else the first by name.
        first: dict[str, Path] = {}
        for path in sorted(read.good, key=lambda path: (not _is_locked(path), path.is_symlink())):
            record, _ = read.good[path]
            original = first.setdefault(record.run_id, path)
            if original != path:
                text = f"it is a copy of {original.name}: both name one run"
                read.bad[path] = NotOurs(text, record.identity.instance)
                del read.good[path]
        return read

    def _learn(self, user: str | None) -> None:
        """Remember as whom our main processes may run."""
        if (uid := procfs.user_id(user)) is not None:
            self._users.add(uid)

    def _find(self) -> Claims:
        return find_runs(self.scope, self.host, self._users)

    def _claims(self, read: _Records) -> Claims:
        now, key = self.steady(), read.key
        if self._walked is not None:
            then, before, found = self._walked
            if key == before and now - then < _PAUSE:
                return found
        found = self._find()
        self._walked = now, key, found
        return found

    @staticmethod
    def _lost(known: Claims, read: _Records) -> list[Claim]:
        return [one for one in known.found if not read.names_run(one) and one.runs()]

    # --- what is in doubt -----------------------------------------------------------------

    def _name_of(self, record: Record) -> str:
        """The name that a record has, if it is none of a copy."""
        return self.given_name(record.identity) if self.given_name is not None else record.name

    def _can_repair(self, claim: Claim) -> bool:
        record = claim.record
        ours = record.identity.host == self.host and record.name == self._name_of(record)
        return ours and record.child is not None

    def _repair(self, claim: Claim, read: _Records) -> bool:
        """Write the record of a run again; whether it was."""
        path = self.directory / claim.record.name
        held = read.held_by(claim)
        taken = path in read.good and path not in read.over and held != path  # by another run
        if taken or not self.repairs or not self._can_repair(claim):
            return False
        turn = self.turn(path.name)
        if not turn.acquire(blocking=False):
            return False  # somebody is at work on it: later
        try:
            if not claim.runs():
                return False
            if held not in (None, path) and not path.exists():
                held.rename(path)  # the exit status comes back with it
            records.write(path, claim.record)
        except OSError:
            return False  # it stays in doubt, and is told of
        finally:
            turn.release()
        return True

    def _doubted(self, claim: Claim, path: Path | None, read: _Records) -> ObservedWorkload:
        identity = claim.record.identity
        why = "its record is gone"
        if path in read.bad:
            why = f"its record cannot be believed: {read.bad[path]}"
        elif path in read.good:
            why = "its record cannot be believed: it names an earlier run"
        if identity.host != self.host:
            why = "it was started under another machine id"
        name = path.name if path is not None else claim.record.name
        hint = (
            _ANSWER if self._can_repair(claim) and not self.repairs else _way_out(claim.pid, path)
        )
        doubt = Doubt(f"{why}; PID {claim.pid} runs, and is left as it is", hint)
        seen = in_doubt(_RUNTIME, name, name, replace(identity, host=self.host), doubt)
        made = claim.record.created_at
        return replace(seen, pid=claim.pid, created_at=made, started_at=claim.record.started_at)

    def _unknown(self, path: Path, error: BadRecord) -> ObservedWorkload:
        """What holds a directory, and is no keeper that can be seen or believed from here."""
        pids = _holders(path)
        who = f"PID {', '.join(map(str, pids))} holds" if pids else "somebody holds"
        doubt = Doubt(
            f"its record cannot be believed: {error}; {who} {path}, so it may run",
            _way_out(pids[0] if len(pids) == 1 else None, path),
        )
        name = path.name.removeprefix(f"mic-{self.scope}-")
        instance = re.sub(r"-[0-9a-f]{8}$", "", name)
        identity = unknown_identity(self.scope, self.host, instance)
        return in_doubt(_RUNTIME, path.name, path.name, identity, doubt)


def _way_out(pid: int | None, path: Path | None) -> str:
    observe = f"look at it (ps -fp {pid}); " if pid is not None else ""
    away = f", then move {path} away" if path is not None else ""
    return (
        f"{observe}when it is not wanted, end it{f' (kill {pid})' if pid is not None else ''}{away}"
    )


def _is_locked(path: Path) -> bool:
    try:
        return records.is_locked(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # unknown is never absent


def _holders(path: Path) -> list[int]:
    """PIDs of who holds the lock on a directory, as far as they can be told."""
    try:
        return sorted(pid for pid in lock_pids(path) if pid > 0 and procfs.exists(pid))
    except OSError:
        return []
