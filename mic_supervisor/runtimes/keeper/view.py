"""What runs of a scope: what its records say, and, where they cannot be believed, the kernel.

A run whose record is damaged or gone still has its GPUs. It is told of as in doubt, until whoever
has the scope's lock writes its record again.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.model import (
    Doubt,
    Identity,
    Launch,
    ObservedWorkload,
    ProcessSpec,
    RunState,
    Stranger,
)
from mic_supervisor.runtimes.copies import GivenName
from mic_supervisor.runtimes.keeper import claims as evidence
from mic_supervisor.runtimes.keeper import records
from mic_supervisor.runtimes.keeper.claims import Claim, Claims
from mic_supervisor.runtimes.keeper.program import RECORD
from mic_supervisor.runtimes.keeper.records import BadRecord, Machine, Record
from mic_supervisor.runtimes.systemd_unit import unknown_identity

_RUNTIME = "subprocess"
_PAUSE = 10.0  # seconds between two walks through every environment, where nothing calls for one
_ANSWER = "start the daemon, or run `mic-supervisor apply`: it writes the record again"
_GONE = "its record is gone"


class NotOurs(BadRecord):
    """A record that can be believed, and says that it is another scope's or machine's."""


class _Records:
    """One reading of the directory: what its records say, and why the others cannot be believed."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.good: dict[Path, tuple[Record, ObservedWorkload]] = {}
        self.bad: dict[Path, BadRecord] = {}

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

    @property
    def key(self) -> tuple[object, ...]:
        """What a change of calls for a walk: a name that is gone may be a record that is lost."""
        bad = frozenset((path.name, str(error)) for path, error in self.bad.items())
        return frozenset(self.names), bad, frozenset(self.over)

    @property
    def over(self) -> dict[Path, str]:
        """The runs that have ended, as their records say."""
        return {
            path: record.run_id
            for path, (record, one) in self.good.items()
            if one.state is RunState.EXITED
        }


class ProcessView:
    """The look of one runtime at its directory, see SubprocessRuntime.

    `mends`: it writes records again, so the scope's lock is held. `turn` gives the lock of a name.
    """

    def __init__(
        self,
        scope: str,
        host: str,
        directory: Path,
        steady: Callable[[], float],
        *,
        mends: bool,
        given_name: GivenName | None,
        turn: Callable[[str], threading.Lock],
    ) -> None:
        self._scope = scope
        self._host = host
        self._directory = directory
        self._steady = steady
        self._mends = mends
        self._given_name = given_name
        self._turn = turn
        self._users: set[int] = set()
        self._walked: tuple[float, tuple[object, ...], Claims] | None = None

    def paths(self) -> list[Path]:
        try:
            paths = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return []
        return [path for path in paths if not path.name.startswith(".") and path.is_dir()]

    def load(self, path: Path) -> Record | None:
        """The record in `path`; None when there is none. Raises BadRecord for another's, too."""
        record = records.load(path)
        if record is not None and record.identity.scope != self._scope:
            raise NotOurs(f"it belongs to scope {record.identity.scope}")
        if record is not None and record.identity.host != self._host:
            raise NotOurs("it was started on another machine")
        if record is not None and self._given_name is not None:
            name = self._given_name(record.identity)
            if path.name != name:  # `cp -r`: what it names is what the original names
                raise _Copy(
                    f"it is a copy of the record of {name}", claims=record.identity.instance
                )
        return record

    def look(self) -> tuple[tuple[ObservedWorkload, ...], tuple[Stranger, ...]]:
        """Everything of ours, and what is in the way. Raises OSError."""
        here = records.machine()
        read = self._read(here)
        claims = self._claims(read, here)
        if self._lost(claims, read):
            # A record is older than all that carries its run: after the processes, once more.
            read = self._read(here)
        lost = self._lost(claims, read)
        mended = [claim for claim in lost if self._mends and self._mend(claim, read)]
        if mended:
            read = self._read(here)
            lost = self._lost(claims, read)
        found = [workload for _, workload in read.good.values()]
        strangers = []
        told = set()
        for claim in lost:
            path = self._place(claim, read)
            if path is not None:
                told.add(path)
                found = [one for one in found if one.name != path.name]
            found.append(self._doubted(claim, path, read))
        held = {_held_by(claim, read) for claim in claims.found}
        for path, error in read.bad.items():
            if path in told:
                continue
            running = _is_locked(path)
            if running and path not in held and not isinstance(error, NotOurs | _Copy):
                found.append(self._unknown(path, error))
            else:
                strangers.append(
                    Stranger(_RUNTIME, path.name, path.name, (), running, str(error), error.claims)
                )
        runs = {record.run_id for record, _ in read.good.values()}
        runs |= {claim.record.run_id for claim in claims.found}
        strangers += [
            Stranger(
                _RUNTIME,
                instance,
                f"PID {pid}",
                reason=f"it was started for {instance}, and its record is gone",
            )
            for run, (pid, instance) in claims.others.items()
            if run not in runs and Path(f"/proc/{pid}").exists()
        ]
        return tuple(found), tuple(strangers)

    def twin(self, launch: Launch, spec: ProcessSpec) -> str | None:
        """Why a launch would run beside what has its instance or GPUs and no good record.

        Raises OSError.
        """
        here = records.machine()
        users = {uid for uid in (evidence.user_id(spec.user),) if uid is not None}
        self._users |= users
        claims = evidence.find(self._scope, self._host, self._users, here)
        wanted = launch.identity
        for claim in self._lost(claims, self._read(here)):
            its = claim.record.identity
            if its.instance == wanted.instance or {*its.gpus} & {*wanted.gpus}:
                return f"PID {claim.pid} runs for {its.instance}, and its record cannot be believed"
        return None

    def refuse_to_end(self, record: Record) -> None:
        """Raises RuntimeRefused where what is left of an ended run is its main process: then the
        record names other PIDs than the run has, and cannot be believed.
        """
        claims = evidence.find(self._scope, self._host, self._users, records.machine())
        for claim in claims.found:
            same = claim.record.run_id == record.run_id
            if same and claim.record.child not in (None, record.child):
                raise RuntimeRefused(
                    f"cannot end what is left of {record.name}: its record names other PIDs than "
                    f"PID {claim.pid}, which runs",
                    hint=_ANSWER,
                )

    # --- reading --------------------------------------------------------------------------

    def _read(self, here: Machine) -> _Records:
        read = _Records()
        for path in self.paths():
            read.names.add(path.name)
            try:
                record = self.load(path)
                if record is not None:
                    read.good[path] = record, records.judge(path, record, here)
                    if (uid := evidence.user_id(record.user)) is not None:
                        self._users.add(uid)
                elif records.is_locked(path):
                    read.bad[path] = BadRecord(f"{RECORD} is missing")
                # else: cut short before it could write anything
            except FileNotFoundError:
                continue  # removed since it was listed
            except BadRecord as error:
                read.bad[path] = error
            except PermissionError as error:
                read.bad[path] = BadRecord(f"it cannot be read: {error.strerror}")
        self._tell_copies(read)
        return read

    def _tell_copies(self, read: _Records) -> None:
        """Of several directories that name one run its keeper's counts, else the first by name."""
        by_run: dict[str, list[Path]] = {}
        for path, (record, _) in read.good.items():
            by_run.setdefault(record.run_id, []).append(path)
        for paths in by_run.values():
            first, *copies = sorted(
                paths, key=lambda path: (not _is_locked(path), path.is_symlink(), path.name)
            )
            for path in copies:
                claims = read.good.pop(path)[0].identity.instance
                read.bad[path] = _Copy(f"it is a copy of {first.name}: both name one run", claims)

    def _claims(self, read: _Records, here: Machine) -> Claims:
        now, key = self._steady(), read.key
        if self._walked is not None:
            then, before, claims = self._walked
            if key == before and now - then < _PAUSE:
                return claims
        claims = evidence.find(self._scope, self._host, self._users, here)
        self._walked = now, key, claims
        return claims

    @staticmethod
    def _lost(claims: Claims, read: _Records) -> list[Claim]:
        return [one for one in claims.found if not read.names_run(one) and one.runs()]

    # --- what is in doubt -----------------------------------------------------------------

    def _mend(self, claim: Claim, read: _Records) -> bool:
        """Write the record of a run again; whether it was."""
        if not self._can_mend(claim):
            return False
        path = self._directory / claim.record.name
        held = self._held(claim)
        if path in read.good and path not in read.over and held != path:
            return False  # another run has its place
        turn = self._turn(path.name)
        if not turn.acquire(blocking=False):
            return False  # somebody is at work on it: later
        try:
            if not claim.runs():
                return False
            if held not in (None, path) and not path.exists():
                held.rename(path)  # log and exit status come back with it
            records.write(path, claim.record)
        except OSError:
            return False  # it stays in doubt, and is told of
        finally:
            turn.release()
        return True

    def _place(self, claim: Claim, read: _Records) -> Path | None:
        """The listed directory of a run: its keeper's, else one of its name that no other has."""
        named = self._directory / claim.record.name
        return _held_by(claim, read) or (named if named in {*read.bad, *read.over} else None)

    def _can_mend(self, claim: Claim) -> bool:
        record = claim.record
        given = self._given_name(record.identity) if self._given_name is not None else record.name
        ours = record.identity.host == self._host and record.name == given
        return ours and record.child is not None

    def _held(self, claim: Claim) -> Path | None:
        """The directory that its keeper holds, whatever it is called by now."""
        try:
            return _same([*self._directory.iterdir()], claim)
        except FileNotFoundError:
            return None

    def _doubted(self, claim: Claim, path: Path | None, read: _Records) -> ObservedWorkload:
        identity = claim.record.identity
        bad = read.bad.get(path) if path is not None else None
        why = f"its record cannot be believed: {bad}" if bad else _GONE
        if path in read.good:
            why = "its record cannot be believed: it names an earlier run"
        if identity.host != self._host:
            why = "it was started under another machine id"
        name = path.name if path is not None else claim.record.name
        hint = _ANSWER if self._can_mend(claim) and not self._mends else _way_out(claim.pid, path)
        doubt = Doubt(f"{why}; PID {claim.pid} runs, and is left as it is", hint)
        return _workload(name, replace(identity, host=self._host), doubt, claim)

    def _unknown(self, path: Path, error: BadRecord) -> ObservedWorkload:
        """What holds a directory, and is no keeper that can be seen or believed from here."""
        pids = _holders(path)
        who = f"PID {', '.join(map(str, pids))} holds" if pids else "somebody holds"
        doubt = Doubt(
            f"its record cannot be believed: {error}; {who} {path}, so it may run",
            _way_out(pids[0] if len(pids) == 1 else None, path),
        )
        name = path.name.removeprefix(f"mic-{self._scope}-")
        instance = re.sub(r"-[0-9a-f]{8}$", "", name)
        return _workload(path.name, unknown_identity(self._scope, self._host, instance), doubt)


class _Copy(BadRecord):
    """A directory that names the run of another one."""


def _workload(
    name: str, identity: Identity, doubt: Doubt, claim: Claim | None = None
) -> ObservedWorkload:
    return ObservedWorkload(
        runtime=_RUNTIME,
        name=name,
        ref=name,
        identity=identity,
        state=RunState.UNKNOWN,
        pid=claim.pid if claim is not None else None,
        created_at=claim.record.created_at if claim is not None else None,
        started_at=claim.record.started_at if claim is not None else None,
        error=doubt.reason,
        doubt=doubt,
    )


def _way_out(pid: int | None, path: Path | None) -> str:
    look = f"look at it (ps -fp {pid}); " if pid is not None else ""
    away = f", then move {path} away" if path is not None else ""
    return f"{look}when it is not wanted, end it{f' (kill {pid})' if pid is not None else ''}{away}"


def _held_by(claim: Claim, read: _Records) -> Path | None:
    return _same([*read.bad, *read.good], claim)


def _same(paths: Iterable[Path], claim: Claim) -> Path | None:
    for path in paths:
        try:
            there = path.stat()
        except OSError:
            continue
        if claim.directory == (there.st_dev, there.st_ino) and not path.is_symlink():
            return path
    return None


def _is_locked(path: Path) -> bool:
    try:
        return records.is_locked(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # unknown is never absent


def _holders(path: Path) -> list[int]:
    """PIDs that /proc/locks(5) names for the lock on a directory."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    found = (line.split() for line in lines)
    return sorted(
        int(fields[4])
        for fields in found
        if len(fields) > 5
        and fields[1] == "FLOCK"
        and fields[5].rpartition(":")[2] == str(inode)
        and int(fields[4]) > 0
        and os.path.exists(f"/proc/{fields[4]}")  # noqa: PTH110
    )
