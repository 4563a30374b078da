"""Host processes where systemd is not PID 1: one keeper per process, and records on disk.

What runs is what the records in a directory say, each checked against the kernel: PID and start
time of keeper and child, boot, PID namespace. This module keeps nothing that a restart would lose,
but for the launches that `restart` needs, which hold secrets. See program.py for the order in which
a process comes to be.
"""

from __future__ import annotations

import os
import select
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mic_supervisor import clocks
from mic_supervisor.errors import (
    MicError,
    PreflightFailed,
    RuntimeRefused,
    RuntimeUnavailable,
    StopFailed,
)
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import Launch, ObservedWorkload, ProcessSpec, RunState, RuntimeView
from mic_supervisor.runtimes import HostCommand, Progress, checks, commands
from mic_supervisor.runtimes.checks import ProcessRuntime, process_spec
from mic_supervisor.runtimes.identity import GivenName
from mic_supervisor.runtimes.keeper import logs, records
from mic_supervisor.runtimes.keeper.records import BadRecord, Record
from mic_supervisor.runtimes.keeper.run import (
    START_TIMEOUT,
    Options,
    await_exit_status,
    end_remains,
    end_tree,
    start_kept,
)
from mic_supervisor.runtimes.keeper.view import RecordsView

_REMOVE_TIMEOUT = 3.0  # seconds for a keeper that has written the exit status to be gone
_POLL = 1.0  # seconds between two looks for new records
_STOP = 0.25  # seconds between two looks at whether to stop listening


class KeeperRuntime(ProcessRuntime):
    """Runs host processes of one scope. See `Runtime` for the contract.

    `directory` holds a directory per workload, and `log_directory` its logs; both are made when
    they are first needed. A log is rotated at `log_max_size` bytes, and one rotated file kept.
    `kill_timeout` is how many seconds a tree may take to die of KILL: a driver may need long to
    take a GPU's memory back. What a main process leaves behind when it ends has `remains_grace`
    seconds between TERM and KILL. `given_name` tells copies of records from records: see
    identity.py. `repairs`: records that were damaged or lost are written again, which is for who
    has the scope's lock.
    """

    name = "subprocess"

    def __init__(
        self,
        scope: str,
        host: str,
        *,
        directory: Path,
        log_directory: Path,
        clock: Callable[[], float] = clocks.wall,
        steady: Callable[[], float] = clocks.steady,
        log_max_size: int = 25 << 20,
        kill_timeout: float = 30.0,
        remains_grace: float = 2.0,
        repairs: bool = False,
        enclosing_service: Callable[[], str | None] = procfs.enclosing_service,
        given_name: GivenName | None = None,
    ) -> None:
        super().__init__()
        self._scope = scope
        self._directory = directory
        self._logs = logs.LogStore(log_directory, directory)
        self._clock = clock  # for what is told
        self._options = Options(log_max_size, kill_timeout, remains_grace)
        self._enclosing_service = enclosing_service
        self._turns: dict[str, threading.Lock] = {}
        self._view = RecordsView(
            scope=scope,
            host=host,
            directory=directory,
            steady=steady,
            repairs=repairs,
            given_name=given_name,
            turn=self._turn,
        )

    # --- what runs ------------------------------------------------------------------------

    def observe(self) -> RuntimeView:
        """Everything that the records name, and processes of this scope that no record names."""
        try:
            workloads, foreign_workloads = self._view.observe()
        except OSError as error:
            return RuntimeView(self.name, error=f"cannot read the process records: {error}")
        return RuntimeView(self.name, workloads, foreign_workloads)

    def events(self, stop: threading.Event) -> Iterator[str]:
        """Names of workloads whose process has ended, as it happens, until `stop` is set.

        What starts and ends between two looks is told of as well. Where a keeper is killed, its
        record is told of, and again when its child ends; so is a record that cannot be read any
        more, or is gone, while its process ran. Does the work of keepers that were killed: what a
        main process left behind is ended. Raises RuntimeUnavailable when the records cannot be
        listed.
        """
        before: dict[str, tuple[str, int | None]] | None = None
        with _explained("watch the process records", RuntimeUnavailable):
            for path in self._view.paths():
                self._finish(path)
            while not stop.is_set():
                now = self._last_pids()
                for run, (name, _) in {**(before or now), **now}.items():
                    was = (before or now).get(run, (name, 0))[1]
                    pid = now.get(run, (name, None))[1]
                    if was not in (None, pid) and (was or pid is None):
                        self._finish(self._directory / name)
                        yield name
                before = now
                _await_an_end([pid for _, pid in now.values() if pid is not None], stop)

    def _last_pids(self) -> dict[str, tuple[str, int | None]]:
        """Run -> name, and the PID whose end is the run's: the keeper's, which comes after the exit
        status is written, else the main process's. None: it has ended.
        """
        found: dict[str, tuple[str, int | None]] = {}
        for path in self._view.paths():
            with suppress(BadRecord, OSError):  # `observe` tells of it
                record = records.load(path)
                if record is None or record.child is None:
                    continue
                last = next((one.pid for one in reversed(record.anchors) if one.runs()), None)
                over = records.read_exit(path, record.run_id)[0] is not None
                found[record.run_id] = path.name, None if over else last
        return found

    def _finish(self, path: Path) -> None:
        # A failure is told of by `observe`, and by `start` and `stop`, which try again.
        with self._turn(path.name), suppress(MicError, BadRecord, OSError):
            record = self._view.load(path)
            if record is not None and record.child is not None:
                seen = records.as_workload(path, record)
                if seen.state is RunState.EXITED:
                    self._clear(path, record, seen)

    # --- starting -------------------------------------------------------------------------

    def prepare(self, launch: Launch, progress: Progress) -> None:  # noqa: ARG002
        """Look for all that a start needs. Raises PreflightFailed."""
        spec = process_spec(launch)
        self._refuse_inside_service()
        with _explained(f"start {launch.name}", PreflightFailed):
            checks.preflight(spec)
            checks.make_directories(spec)
        if launch.name.startswith(".") or "/" in launch.name or len(launch.name.encode()) > 200:
            raise PreflightFailed(f"cannot keep a record called {launch.name!r}")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            usable = os.access(self._directory, os.W_OK | os.X_OK)
            problem = None if usable else "it cannot be written"
        except OSError as error:
            problem = error.strerror
        if problem is not None:
            raise PreflightFailed(
                f"cannot keep process records in {self._directory}: {problem}",
                hint="set MIC_RUN_DIR to a directory that can be written",
            )

    def run_command(
        self, what: HostCommand, progress: Progress, given_up: Callable[[], bool]
    ) -> None:
        """See HostCommands. It does not outlive this process, but for a kill -9."""
        with _explained(f"run {what.command[0]}", PreflightFailed):
            commands.run(what, progress, given_up, scope=self._scope)

    def start(self, launch: Launch) -> None:
        """Returns once the program was executed. Replaces an ended record of the same name."""
        spec = process_spec(launch)
        self._refuse_inside_service()
        path = self._directory / launch.name
        with _explained(f"start {launch.name}", RuntimeRefused), self._turn(launch.name):
            checks.make_directories(spec)
            twin = self._view.twin(launch, spec)
            if twin is not None:
                raise RuntimeRefused(
                    f"cannot start {launch.name}: {twin}",
                    hint="see `mic-supervisor status`, which shows what to do",
                )
            handle = self._lock_for_start(path)
            if handle is not None:
                try:
                    if not self._runs(path, locked=False):
                        self._start(path, launch, spec, handle)
                finally:
                    os.close(handle)
        self._launches[launch.name] = launch

    def _start(self, path: Path, launch: Launch, spec: ProcessSpec, handle: int) -> None:
        boot, namespace = records.machine()
        record = Record(
            name=launch.name,
            identity=launch.identity,
            run_id=str(uuid.uuid4()),
            boot_id=boot,
            pid_namespace=namespace,
            created_at=self._clock(),
            user=spec.user,
            working_dir=spec.working_dir or "/",
        )
        log_path = self._logs.make(launch.name, record.run_id)
        start_kept(path, record, spec, log_path, handle, self._options)
        self._logs.prune(launch.name, now=self._clock())

    def _refuse_inside_service(self) -> None:
        unit = self._enclosing_service()
        if unit is not None:
            raise PreflightFailed(
                f"cannot start a process from within {unit}: "
                "systemd would end it whenever that unit is restarted",
                hint="set MIC_PROCESS_RUNTIME=systemd",
            )

    def _lock_for_start(self, path: Path) -> int | None:
        """The lock on the record; None when the process runs, or another start has just made it."""
        give_up = time.monotonic() + START_TIMEOUT
        while time.monotonic() < give_up:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may be removed meanwhile
            handle = records.lock(path, 0.05)
            if handle is not None or self._runs(path):
                return handle
        raise RuntimeRefused(
            f"cannot start {path.name}: its record is held by an earlier run that does not end"
        )

    def _runs(self, path: Path, *, locked: bool | None = None) -> bool:
        """Whether its main process runs. Ends what a run that has ended left behind."""
        try:
            record = self._view.load(path)
            if record is None:
                return False
            seen = records.as_workload(path, record, locked=locked)
        except BadRecord as error:
            raise RuntimeRefused(
                f"cannot start {path.name}: there is a record of that name: {error}",
                hint=f"look at it and move it away: {path}",
            ) from error
        if seen.state is RunState.UNKNOWN:
            raise RuntimeRefused(f"cannot start {path.name}: {seen.error}")
        if seen.state is RunState.RUNNING:
            return seen.pid is not None
        self._clear(path, record, seen)
        return False

    # --- stopping -------------------------------------------------------------------------

    def stop(self, workload: ObservedWorkload, *, signal: str, grace: float) -> None:
        """Returns when no process of the tree is left and the exit status is on disk."""
        number = checks.stop_signal(workload, signal)
        path = self._directory / workload.name
        with self._turn(workload.name), _explained(f"stop {workload.name}", StopFailed):
            record = self._await_start(path)
            if record is None:
                return
            seen = records.as_workload(path, record)
            if seen.state is RunState.UNKNOWN:
                raise StopFailed(f"cannot stop {workload.name}: {seen.error}")
            if seen.state is RunState.EXITED:
                self._clear(path, record, seen)
                return
            end_tree(path, record, number, grace, self._options)
            await_exit_status(path, record, at=self._clock())

    def _await_start(self, path: Path) -> Record | None:
        """The record, once a start that is under way has come to its end; None when it is gone."""
        give_up = time.monotonic() + START_TIMEOUT
        while True:
            record = self._view.load(path)
            if record is None or record.child is not None or not records.is_locked(path):
                return record
            if time.monotonic() >= give_up:
                raise StopFailed(f"cannot stop {path.name}: its start does not come to an end")
            time.sleep(0.02)

    def _clear(self, path: Path, record: Record, seen: ObservedWorkload) -> None:
        if records.read_exit(path, record.run_id)[0] is None:
            self._view.refuse_to_end(record)
            end_remains(path, record, seen, self._options, at=self._clock())

    def remove(self, workload: ObservedWorkload) -> None:
        """Delete the record and the logs of a process that has ended."""
        path = self._directory / workload.name
        action = f"remove {workload.name}"
        with self._turn(workload.name), _explained(action, RuntimeRefused):
            if not path.exists():
                return
            record = self._view.load(path)
            if record is not None:
                seen = records.as_workload(path, record)
                if seen.state is not RunState.EXITED:
                    raise RuntimeRefused(f"cannot {action}: it still runs", hint="stop it first")
                self._clear(path, record, seen)
            handle = records.lock(path, _REMOVE_TIMEOUT)
            if handle is None:
                if path.exists():
                    raise RuntimeRefused(f"cannot {action}: its record is held by a start")
                return
            try:
                self._logs.remove(workload.name)
                records.discard(path)
            finally:
                os.close(handle)
        self._launches.pop(workload.name, None)

    # --- looking at one -------------------------------------------------------------------

    def logs(
        self, workload: ObservedWorkload, *, tail: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Following ends when the process has ended and all of its log was read."""
        path = self._directory / workload.name
        with _explained(f"read the log of {workload.name}", RuntimeRefused):
            record = records.load(path)
            run = None if record is None else record.run_id

            def ended() -> bool:
                now = records.load(path)
                if now is None or now.run_id != run:
                    return True
                return records.as_workload(path, now).state is RunState.EXITED

            log_path = self._logs.of(workload.name, run)
            yield from logs.read(log_path, tail=tail, follow=follow, ended=ended)

    def previous_logs(
        self, workload: ObservedWorkload, *, tail: int | None = None
    ) -> Iterator[str]:
        """As `logs`, of the run before this one; nothing where there was none."""
        with _explained(f"read the log of {workload.name}", RuntimeRefused):
            log_path = self._logs.previous(workload.name)
            if log_path is not None:
                yield from logs.read(log_path, tail=tail)

    def run_check(
        self, workload: ObservedWorkload, command: tuple[str, ...], timeout: float
    ) -> tuple[int, str]:
        """(exit code, output) of `command`, run as the workload's user in its directory.

        124 when it was ended after `timeout` seconds. Raises RuntimeRefused when it cannot be run,
        which says nothing about the workload.
        """
        action = f"run {command[0] if command else 'an empty check'}"
        with _explained(action, RuntimeRefused):
            record = records.load(self._directory / workload.name)
            if record is None or not command:
                raise RuntimeRefused(f"cannot {action}: there is no record of {workload.name}")
            who = checks.account(record.user)
            return checks.run_check(command, timeout, who, record.working_dir)

    def _turn(self, name: str) -> threading.Lock:
        """One thread at a time changes a record."""
        return self._turns.setdefault(name, threading.Lock())


def _await_an_end(pids: list[int], stop: threading.Event) -> None:
    """Wait until one of them ends, or it is time to look for new ones."""
    again = time.monotonic() + _POLL
    poll = select.poll()
    with ExitStack() as files:
        for pid in pids:
            with suppress(OSError):  # it ended since: the next look finds it over
                handle = os.pidfd_open(pid)
                files.callback(os.close, handle)
                poll.register(handle, select.POLLIN)
        while not stop.is_set() and time.monotonic() < again:
            if poll.poll(_STOP * 1000):
                return


@contextmanager
def _explained(action: str, kind: type[MicError]) -> Iterator[None]:
    try:
        yield
    except BadRecord as error:
        raise kind(f"cannot {action}: its record is not to be trusted: {error}") from error
    except OSError as error:
        raise kind(f"cannot {action}: {error}") from error
