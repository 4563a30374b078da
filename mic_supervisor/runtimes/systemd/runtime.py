"""Host processes as transient systemd services, where systemd is PID 1.

PID 1 keeps what has to be kept: the exit status, the control group, the log, and in `Environment`
who a unit is. This module keeps nothing that a restart would lose, but for the launches that
`restart` needs, which hold secrets.

A unit that has ended stays loaded, as `active (exited)` or `failed`, until it is removed or started
again. No unit file is ever written, and PID 1 is never told to reload.

An administrator adds to every unit of ours with a drop-in in /etc/systemd/system/mic-.service.d/,
to those of one scope in mic-SCOPE-.service.d/ (systemd.unit(5), on names with dashes), and bounds
them together with one for mic.slice.
"""

from __future__ import annotations

import asyncio
import glob
import grp
import hashlib
import pwd
import queue
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mic_supervisor.config.env_file import format_env_file
from mic_supervisor.errors import (
    MicError,
    PreflightFailed,
    RuntimeRefused,
    RuntimeUnavailable,
    StopFailed,
)
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import (
    ForeignWorkload,
    Launch,
    Limits,
    ObservedWorkload,
    ProcessSpec,
    RuntimeView,
)
from mic_supervisor.runtimes import HostCommand, Progress, checks, commands
from mic_supervisor.runtimes.checks import ProcessRuntime, process_spec
from mic_supervisor.runtimes.identity import OWN_VARIABLES
from mic_supervisor.runtimes.systemd import jobs, journal
from mic_supervisor.runtimes.systemd import unit as units
from mic_supervisor.runtimes.systemd.bus import Bus, Lost, Refused, explain
from mic_supervisor.runtimes.systemd.unit import Property, Unit

if TYPE_CHECKING:
    from dbus_fast import Message

T = TypeVar("T")

_READ_TIMEOUT = 15.0  # seconds
_STOP = 0.25  # seconds between two looks at `stop`


class SystemdRuntime(ProcessRuntime):
    """Runs host processes of one scope. See `Runtime` for the contract.

    `bus_address` is a D-Bus address, None the system bus. Environments are passed to PID 1 in
    files below `directory`, which are deleted once the program was executed. What a main process
    leaves behind has `remains_grace` seconds between TERM and KILL; `kill_timeout` is how many a
    control group may take to die of KILL: a driver may need long to take a GPU's memory back.
    """

    name = units.RUNTIME

    def __init__(
        self,
        scope: str,
        host: str,
        *,
        bus_address: str | None = None,
        directory: Path = Path("/run/mic"),
        remains_grace: float = 2.0,
        kill_timeout: float = 30.0,
    ) -> None:
        super().__init__()
        self._scope = scope
        self._host = host
        self._directory = directory / "environ" / scope
        self._end_timeouts = jobs.EndTimeouts(remains_grace, kill_timeout)
        self._ending = remains_grace + kill_timeout + 30.0  # seconds for all that ends something
        self._bus = Bus(bus_address)
        self._turns: dict[str, asyncio.Lock] = {}

    def close(self) -> None:
        """Hang up; a later call connects again. What runs goes on."""
        self._bus.close()

    # --- what runs ------------------------------------------------------------------------

    def observe(self) -> RuntimeView:
        """Every loaded unit that is called as ours are; a list, and a question for each."""
        try:
            found = self._do("read the units of systemd", self._units(), _READ_TIMEOUT)
        except MicError as error:
            return RuntimeView(self.name, error=error.message, hint=error.hint)
        classified = [units.classify(unit, self._scope, self._host) for unit in found]
        return RuntimeView(
            self.name,
            tuple(one for one in classified if isinstance(one, ObservedWorkload)),
            tuple(one for one in classified if isinstance(one, ForeignWorkload)),
        )

    async def _units(self) -> list[Unit]:
        listed = await self._bus.units(units.pattern(self._scope))
        found = await asyncio.gather(
            *(self._read_unit(name, path) for name, path in sorted(listed))
        )
        return [unit for unit in found if unit is not None]

    async def _read_unit(self, name: str, path: str | None = None) -> Unit | None:
        """A unit, and what is left in its control group where its main process has ended."""
        unit = await self._bus.unit(name, path)
        if unit is None or not unit.is_over or not unit.text("ControlGroup"):
            return unit
        return replace(unit, remains=await self._bus.processes(name))

    async def _read_ours(self, name: str, action: str) -> Unit | None:
        unit = await self._read_unit(name)
        if unit is not None:
            reason = units.foreign_reason(unit, self._scope, self._host)
            if reason is not None:
                raise RuntimeRefused(
                    f"cannot {action}: there is a unit of that name: {reason}",
                    hint=f"look at it: systemctl status {name}",
                )
        return unit

    # --- starting -------------------------------------------------------------------------

    def prepare(self, launch: Launch, progress: Progress) -> None:  # noqa: ARG002
        """Look for all that a start needs. Raises PreflightFailed."""
        spec = process_spec(launch)
        # A unit has a control group to bound memory and CPU with; a bare process has none.
        plain = Limits(nofile=spec.limits.nofile, memlock=spec.limits.memlock)
        checks.preflight(replace(spec, limits=plain))
        _check_account(spec.user)
        units.check_texts(spec.command)
        units.check_variables(self._variables(spec))

    def run_command(
        self, what: HostCommand, progress: Progress, given_up: Callable[[], bool]
    ) -> None:
        """See HostCommands. A unit of its own: this program may write next to nowhere. It ends with
        the service that this program is part of, however that ends.
        """
        action, output = f"run {what.command[0]}", commands.Output(progress)
        _check_account(what.user)
        units.check_texts(what.command)
        variables = checks.environment(what, checks.account(what.user))
        units.check_variables(variables)
        digest = hashlib.sha256(f"{self._scope}/{what.instance}".encode()).hexdigest()[:16]
        name = f"run-mic-prepare-{digest}.service"
        path = self._directory / f"prepare-{uuid.uuid4().hex}"  # nobody else's, who deletes it
        environment = glob.escape(str(path))
        bound = procfs.enclosing_service()
        properties = jobs.command_properties(what, environment, commands.END_TIMEOUT, bound)
        jobs.write_secret(path, format_env_file(variables))
        try:
            work = jobs.run_command(self._bus, name, properties, what, output, given_up)
            code = self._do(action, work, what.timeout + self._ending, PreflightFailed)
        finally:
            path.unlink(missing_ok=True)
        if code is None:
            raise commands.withdrawn(what)
        output.show()
        commands.check_verdict(what, code, output)

    def start(self, launch: Launch) -> None:
        """Returns once the program was executed. Replaces an ended unit of the same name."""
        spec = process_spec(launch)
        action = f"start {launch.name}"
        number = checks.signal_number(spec.stop_signal)
        if number is None:
            raise RuntimeRefused(f"cannot {action}: there is no signal {spec.stop_signal}")
        variables = self._variables(spec)
        name = units.unit_name(launch.name)
        path = self._directory / hashlib.sha256(name.encode()).hexdigest()[:32]
        # PID 1 would look for the program in a PATH of its own.
        program = checks.find_program(
            spec.command[0], Path(spec.working_dir or "/"), variables["PATH"]
        )
        # It takes the path of an environment file for a pattern.
        properties = units.properties(launch, spec, str(program), number, glob.escape(str(path)))
        secret = path, format_env_file(variables)
        timeout = units.START_TIMEOUT + self._ending
        failed = self._do(action, self._start(name, properties, secret, action), timeout)
        if failed is not None:
            reason, invocation = failed
            reported = journal.spawn_failure(name, invocation) if invocation else None
            if reported is None and invocation and spec.directories:
                reported = journal.last_words(invocation)
            raise RuntimeRefused(
                f"cannot {action}: {reported or reason}", hint=f"see journalctl --unit {name}"
            )
        self._launches[launch.name] = launch

    async def _start(
        self,
        name: str,
        properties: Sequence[Property],
        secret: tuple[Path, str],
        action: str,
    ) -> tuple[str, str] | None:
        """None, or why the program could not be executed, and the invocation that tried."""
        async with self._turn(name):
            unit = await self._read_ours(name, action)
            if unit is not None and unit.main_pid is not None and unit.active != "deactivating":
                return None
            if unit is not None:
                await jobs.end_remains(self._bus, name, self._end_timeouts)
                await jobs.forget(self._bus, name)
            jobs.write_secret(*secret)
            try:
                await jobs.start(self._bus, name, properties)
            except Refused as error:
                unit = await self._read_ours(name, action) if error.name == jobs.EXISTS else None
                if unit is None or unit.is_over:
                    raise
                # Another program has just started it.
            except jobs.SpawnFailed as failure:
                if failure.ran:
                    return None
                await jobs.discard(self._bus, name)
                invocation = failure.unit.invocation if failure.unit is not None else ""
                return jobs.spawn_reason(failure), invocation
            finally:
                secret[0].unlink(missing_ok=True)
        return None

    def _variables(self, spec: ProcessSpec) -> dict[str, str]:
        """What the specification sets; who it is stands in the unit itself."""
        found = checks.environment(spec, checks.account(spec.user))
        return {name: found[name] for name in found if name not in OWN_VARIABLES}

    # --- stopping -------------------------------------------------------------------------

    def stop(self, workload: ObservedWorkload, *, signal: str, grace: float) -> None:
        """Returns when nothing of the control group is left. The unit stays, with its exit code."""
        number = checks.stop_signal(workload, signal)
        action = f"stop {workload.name}"
        work = self._stop(workload.ref, action, number, grace)
        self._do(action, work, grace + self._ending, StopFailed)

    async def _stop(self, name: str, action: str, number: int, grace: float) -> None:
        async with self._turn(name):
            unit = await self._read_ours(name, action)
            if unit is not None:
                await jobs.end(self._bus, unit, number, grace, self._end_timeouts)

    def remove(self, workload: ObservedWorkload) -> None:
        """Have PID 1 forget a unit that has ended. Its log goes when journald rotates it away."""
        action = f"remove {workload.name}"
        self._do(action, self._remove(workload.ref, action), self._ending)
        self._launches.pop(workload.name, None)

    async def _remove(self, name: str, action: str) -> None:
        async with self._turn(name):
            unit = await self._read_ours(name, action)
            if unit is None:
                return
            if not unit.is_over or unit.remains:
                raise RuntimeRefused(f"cannot {action}: it still runs", hint="stop it first")
            await jobs.forget(self._bus, name)

    # --- looking at one -------------------------------------------------------------------

    def logs(
        self, workload: ObservedWorkload, *, tail: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Of the run that PID 1 knows. Following ends when it has ended and all of it was read."""
        what = f"read the log of {workload.name}"
        unit = self._do(what, self._read_unit(workload.ref), _READ_TIMEOUT)
        if unit is None or not unit.invocation:
            raise RuntimeRefused(
                f"cannot {what}: systemd no longer knows the unit",
                hint=f"see journalctl --unit {workload.ref}",
            )
        run = unit.invocation

        def ended() -> bool:
            now = self._do(what, self._read_unit(workload.ref), _READ_TIMEOUT)
            return now is None or now.invocation != run or (now.is_over and not now.remains)

        yield from journal.read(what, run, tail=tail, follow=follow, ended=ended)

    def previous_logs(
        self, workload: ObservedWorkload, *, tail: int | None = None
    ) -> Iterator[str]:
        """As `logs`, of the instance's run before this one.

        That run may have been another specification's, and its unit may be gone. Raises
        RuntimeRefused where the journal holds none.
        """
        what = f"read the log of {workload.name}"
        unit = self._do(what, self._read_unit(workload.ref), _READ_TIMEOUT)
        begun = unit.begun if unit is not None else None
        identity = workload.identity
        run = None
        if begun is not None:
            run = journal.previous(what, identity.scope, identity.instance, begun)
        if run is None:
            raise RuntimeRefused(f"cannot {what}: the journal holds no run before this one")
        yield from journal.read(what, run, tail=tail)

    def run_check(
        self, workload: ObservedWorkload, command: tuple[str, ...], timeout: float
    ) -> tuple[int, str]:
        """(exit code, output) of `command`, run as the workload's user in its directory.

        124 when it was ended after `timeout` seconds. Raises RuntimeRefused when it cannot be run,
        which says nothing about the workload.
        """
        action = f"run {command[0] if command else 'an empty check'}"
        if not command:
            raise RuntimeRefused(f"cannot {action}")
        return self._do(action, self._check(workload, command, timeout, action), timeout + 15.0)

    async def _check(
        self, workload: ObservedWorkload, command: tuple[str, ...], timeout: float, action: str
    ) -> tuple[int, str]:
        unit = await self._read_ours(workload.ref, action)
        if unit is None:
            raise RuntimeRefused(f"cannot {action}: there is no unit {workload.ref}")
        return await jobs.run_check(self._bus, unit, command, timeout)

    # --- events ---------------------------------------------------------------------------

    def events(self, stop: threading.Event) -> Iterator[str]:
        """A line per change of a unit of ours, until `stop` is set.

        The first line says that changes are being listened for: whoever wants to miss nothing looks
        at everything once then. RuntimeUnavailable when the connection breaks. Also ends what a
        main process left behind that ended well, which PID 1 lets run.
        """
        what = "follow the changes of systemd's units"
        changes: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        prefix = units.path_prefix(self._scope)

        def callback(message: Message | None) -> None:
            change = _change(message, prefix) if message is not None else None
            if message is None or change is not None:
                changes.put(change)

        self._do(what, self._bus.listen(callback), _READ_TIMEOUT)
        states: dict[str, str] = {}
        try:
            yield "listening to systemd"
            self._tidy()
            while not stop.is_set():
                try:
                    change = changes.get(timeout=_STOP)
                except queue.Empty:
                    continue
                if change is None:
                    raise RuntimeUnavailable(f"cannot {what}: the connection to D-Bus was lost")
                name, state = change
                if states.get(name) == state:
                    continue  # something else about it changed
                states[name] = state
                if state == "active (exited)":
                    self._tidy()
                yield f"{name}: {state}"
        finally:
            self._bus.unlisten(callback)

    def _tidy(self) -> None:
        """End what is left of every unit of ours whose main process has ended."""
        for workload in self.observe().workloads:
            try:
                action = f"end what is left of {workload.name}"
                self._do(action, self._end_remains(workload.ref), self._ending)
            except MicError:
                continue  # `observe` tells of it, and `start` and `stop` try again

    async def _end_remains(self, name: str) -> None:
        async with self._turn(name):
            unit = await self._read_unit(name)
            if unit is not None and unit.is_over and unit.remains:
                await jobs.end_remains(self._bus, name, self._end_timeouts)

    # --- helpers --------------------------------------------------------------------------

    def _do(
        self,
        action: str,
        work: Coroutine[Any, Any, T],
        timeout: float,
        kind: Callable[..., MicError] | None = None,
    ) -> T:
        """Blocking. `kind` is what a refusal is raised as, where RuntimeRefused is not meant."""
        try:
            return self._bus.run(work, timeout=timeout)
        except (Refused, Lost, RuntimeRefused) as error:
            reported = error if isinstance(error, RuntimeRefused) else explain(action, error)
            if kind is not None and isinstance(reported, RuntimeRefused):
                reported = kind(reported.message, hint=reported.hint)
            raise reported from error.__cause__
        except OSError as error:  # no descriptor is free, or no memory
            reported = (kind or RuntimeRefused)(f"cannot {action}: {error.strerror or error}")
            raise reported from error

    def _turn(self, name: str) -> asyncio.Lock:
        """One task at a time changes a unit. On the bus's thread."""
        return self._turns.setdefault(name, asyncio.Lock())


def _change(message: Message, prefix: str) -> tuple[str, str] | None:
    """(unit, state) of a signal of PID 1 that is about one of ours."""
    if message.member == "UnitRemoved":
        name, path = message.body
        return (str(name), "gone") if str(path).startswith(prefix) else None
    path = message.path or ""
    if message.member != "PropertiesChanged" or not path.startswith(prefix):
        return None
    _, changed, _ = message.body
    states = [changed[key].value for key in ("ActiveState", "SubState") if key in changed]
    if len(states) != 2:
        return None
    return units.name_of(path), f"{states[0]} ({states[1]})"


def _check_account(user: str | None) -> None:
    """Numbers, too, have to stand for somebody, see `User=`. Raises PreflightFailed."""
    name, _, group = (user or "").partition(":")
    try:
        if name.isdigit():
            pwd.getpwuid(int(name))
        if group.isdigit():
            grp.getgrgid(int(group))
    except KeyError:
        raise PreflightFailed(
            f"cannot run as {user}: systemd knows no such user or group",
            hint="create it: systemd runs nothing for numbers without a name",
        ) from None
