"""Starts, ends and forgets transient units, and runs checks: the steps, on the bus's thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mic_supervisor import clocks
from mic_supervisor.errors import PreflightFailed, RuntimeRefused, RuntimeUnavailable
from mic_supervisor.host import programs
from mic_supervisor.runtimes import TIMED_OUT, HostCommand, checks
from mic_supervisor.runtimes.commands import POLL, Output
from mic_supervisor.runtimes.systemd.bus import Bus, Lost, Refused, variants
from mic_supervisor.runtimes.systemd.unit import (
    EXITED,
    SLICE,
    START_TIMEOUT,
    Process,
    Property,
    Unit,
    command,
    end_reason,
    exit_code,
    user,
)
from mic_supervisor.text import quoted


@dataclass(frozen=True, slots=True)
class EndTimeouts:
    """Seconds. `remains`: from TERM to KILL for what a main process leaves behind; `kill`: that a
    control group may take to die of KILL."""

    remains: float
    kill: float


FORGET_TIMEOUT = 5.0
"""Seconds that PID 1 may take to forget a unit that has ended."""

_JOB_MARGIN = 5.0  # seconds beyond PID 1's own bound
_FIRST_PAUSE = 0.005  # seconds between two looks, doubled each time
_LONGEST_PAUSE = 0.1
_KILL_PAUSE = 0.2  # seconds between two KILLs: a process may fork in between
_STALE = 600.0  # seconds; much longer than any start takes
EXISTS = "org.freedesktop.systemd1.UnitExists"


# systemd.exec(5), "Process exit codes": what PID 1's child ends with before the program runs.
_BEFORE = range(200, 246)
_STEPS = {
    200: "its working directory cannot be entered",
    203: "the program cannot be executed",
    205: "its limits cannot be set",
    216: "its group does not exist",
    217: "its user does not exist",
}

# Results of a job, see JobRemoved in org.freedesktop.systemd1(5).
_RESULTS = {
    "canceled": "somebody else cancelled it",
    "timeout": "it did not come up in time",
    "dependency": "something that it depends on failed",
    "collected": "systemd dropped the job",
}


class SpawnFailed(Exception):
    """A job that did not come to "done": the program was not executed, or not to its end."""

    def __init__(self, unit: Unit | None, result: str) -> None:
        super().__init__(result)
        self.unit = unit
        self.result = result

    @property
    def step(self) -> str | None:
        """What PID 1's child failed at before it executed the program."""
        if self.unit is None or self.unit.number("ExecMainCode") != EXITED:
            return None
        status = self.unit.number("ExecMainStatus")
        unknown = f"systemd could not set it up (status {status})"
        return _STEPS.get(status, unknown) if status in _BEFORE else None

    @property
    def ran(self) -> bool:
        """Whether the program was executed, and had ended before PID 1 took note of that."""
        return (
            self.result == "failed"
            and self.unit is not None
            and self.unit.number("ExecMainExitTimestamp") > 0
            and self.step is None
        )


async def start(bus: Bus, name: str, properties: Sequence[Property]) -> None:
    """Returns once the program was executed. The unit must not be loaded.

    Raises SpawnFailed, RuntimeRefused, Refused and Lost.
    """
    values = variants(properties)
    deadline = _now() + FORGET_TIMEOUT
    while True:
        try:
            result = await bus.job(
                *("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", values, []),
                timeout=START_TIMEOUT + _JOB_MARGIN,
            )
            break
        except Refused as error:
            # PID 1 forgets a unit a moment after it has ended.
            unit = await bus.unit(name) if error.name == EXISTS else None
            running = unit is not None and not unit.is_over
            if error.name != EXISTS or running or _now() >= deadline:
                raise
            await asyncio.sleep(_LONGEST_PAUSE)
    if result != "done":
        raise SpawnFailed(await bus.unit(name), result)


def spawn_reason(failure: SpawnFailed) -> str:
    """Why, as far as PID 1 itself tells."""
    if failure.result != "failed":
        reported = f"systemd ended the job with {quoted(failure.result)}"
        return _RESULTS.get(failure.result, reported)
    if failure.unit is None:
        return "systemd does not say why"
    return failure.step or end_reason(failure.unit) or "systemd does not say why"


# --- ending -----------------------------------------------------------------------------------


async def end(bus: Bus, unit: Unit, number: int, grace: float, timeout: EndTimeouts) -> None:
    """Signal the main process, wait `grace` seconds at most, then kill until nothing is left.

    What the main process leaves behind when it ends in time is asked too. Raises StopFailed.
    """
    deadline = _now() + grace
    if unit.active != "deactivating" and unit.main_pid is not None:
        await _signal(bus, unit.name, "main", number)
        await _signal(bus, unit.name, "main", signal.SIGCONT)  # or a stopped one never hears of it
    if await _await_main(bus, unit.name, deadline):
        await end_remains(bus, unit.name, timeout, by=deadline)
    else:
        await _kill(bus, unit.name, timeout.kill)


async def end_remains(
    bus: Bus, name: str, timeout: EndTimeouts, *, by: float | None = None
) -> None:
    """TERM for what is left of a unit whose main process has ended, then KILL.

    `by`: KILL no later than that, in the loop's time. Raises StopFailed.
    """
    deadline = _now() + timeout.remains
    deadline = deadline if by is None else min(deadline, by)
    asked: set[int] = set()
    async for unit, remains in _looks(bus, name, deadline):
        if _now() >= deadline:
            await _kill(bus, name, timeout.kill)
            return
        # PID 1 asks by itself where it is ending the unit.
        fresh = {process.pid for process in remains} - asked
        if unit is not None and unit.is_over and fresh:
            await _signal(bus, name, "all", signal.SIGTERM)
            await _signal(bus, name, "all", signal.SIGCONT)
            asked |= fresh


async def _await_main(bus: Bus, name: str, deadline: float) -> bool:
    """Whether the main process has ended by the deadline."""
    async for unit, _ in _looks(bus, name, deadline):
        if unit is None or unit.is_over or unit.main_pid is None:
            return True
        if _now() >= deadline:
            return False
    return True


async def _looks(
    bus: Bus, name: str, deadline: float
) -> AsyncIterator[tuple[Unit | None, tuple[Process, ...]]]:
    """A unit and what is in its control group, until nothing is left; one look at the deadline."""
    pause = _FIRST_PAUSE
    while True:
        unit, remains = await bus.unit(name), await bus.processes(name)
        if not remains and (unit is None or unit.is_over):
            return
        yield unit, remains
        await asyncio.sleep(min(pause, max(0.0, deadline - _now())))
        pause = min(pause * 2, _LONGEST_PAUSE)


async def _kill(bus: Bus, name: str, timeout: float) -> None:
    give_up, again = _now() + timeout, 0.0
    async for _, remains in _looks(bus, name, give_up):
        if _now() >= give_up:
            raise checks.survived(name, _named(remains))
        if _now() >= again:
            await _signal(bus, name, "all", signal.SIGKILL)
            again = _now() + _KILL_PAUSE


async def _signal(bus: Bus, name: str, whom: str, number: int) -> None:
    try:
        await bus.call("KillUnit", "ssi", name, whom, int(number))
    except Refused as error:
        if error.name not in _NOBODY:
            raise


# Whoever was to get the signal has ended since the look; the next look tells.
_NOBODY = frozenset(
    f"org.freedesktop.systemd1.{name}"
    for name in ("NoSuchUnit", "NoSuchProcess", "UnitNotLoaded", "UnitInactive")
)


def _named(remains: Sequence[Process]) -> str:
    return "PID " + ", ".join(map(str, remains)) if remains else "systemd says that a part of it"


# --- forgetting -------------------------------------------------------------------------------


async def forget(bus: Bus, name: str) -> None:
    """Have PID 1 unload a unit that has ended. Raises RuntimeRefused, Refused and Lost."""
    deadline = _now() + FORGET_TIMEOUT
    pause = _FIRST_PAUSE
    while (unit := await bus.unit(name)) is not None:
        if _now() >= deadline:
            raise RuntimeRefused(
                f"cannot remove {name}: systemd keeps it as {unit.active} ({unit.sub})",
                hint=f"see systemctl list-jobs and systemctl status {name}",
            )
        try:
            if unit.active == "failed":
                await bus.call("ResetFailedUnit", "s", name, repeat=True)
            elif unit.active != "inactive":
                await bus.job("StopUnit", "ss", name, "replace", timeout=FORGET_TIMEOUT)
        except Refused as error:
            if error.name not in _NOBODY:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


async def discard(bus: Bus, name: str) -> None:
    """After a start that failed: nothing of it stays, whatever state it is in."""
    if await bus.unit(name) is not None:
        await _kill(bus, name, FORGET_TIMEOUT)
        await forget(bus, name)


# --- the environment file ---------------------------------------------------------------------


_writing = threading.Lock()  # until a file has its time, a sweep would take it for stale


def write_secret(path: Path, text: str) -> None:
    """0600, in a directory that only we may enter. Raises RuntimeUnavailable."""
    with _writing:
        _write_secret(path, text)


def _write_secret(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(path.parent)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # A clock that is set makes no file of a start under way stale: see _sweep.
            os.utime(descriptor, (clocks.steady(), clocks.steady()))
    except OSError as error:
        raise RuntimeUnavailable(
            f"cannot write {path}: {error.strerror}",
            hint="run as root, or set MIC_RUN_DIR to a directory that can be written",
        ) from error


def _sweep(directory: Path) -> None:
    """Delete what starts that were cut short have left. Their times are steady."""
    for entry in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # its start is over meanwhile
            if not 0.0 <= clocks.steady() - entry.stat().st_mtime <= _STALE:
                entry.unlink()


def _now() -> float:
    return asyncio.get_running_loop().time()


# --- health checks ------------------------------------------------------------------------------
#
# A check is a unit of its own. The supervisor's own unit is confined: it may neither become another
# user nor see all that an instance sees. PID 1 runs the check as the instance's user, in its
# directory, and ends whatever the check started.

_END_TIMEOUT = 1.0  # seconds from TERM to KILL, and for the rest of the output


async def run_check(bus: Bus, unit: Unit, argv: tuple[str, ...], timeout: float) -> tuple[int, str]:
    """(exit code, output); TIMED_OUT when PID 1 ended it after `timeout` seconds.

    Raises RuntimeRefused when it cannot be run, Refused and Lost.
    """
    name = f"run-mic-check-{uuid.uuid4().hex[:16]}.service"
    # Looking up a user may take a while where a directory service is asked.
    properties = await asyncio.to_thread(_properties, unit, argv, timeout)
    output = bytearray()

    def keep(part: bytes) -> None:
        output.extend(part[: max(0, checks.MOST_OUTPUT - len(output))])

    async with _to_end(bus, name, properties, timeout, keep) as result:
        code = 0 if result == "done" else _code(await bus.unit(name), result, argv)
    text = output.decode(errors="replace").strip()
    return checks.timed_out(timeout, text) if code == TIMED_OUT else (code, text)


async def run_command(
    bus: Bus,
    name: str,
    properties: Sequence[Property],
    what: HostCommand,
    output: Output,
    given_up: Callable[[], bool],
) -> int | None:
    """The exit code, TIMED_OUT when PID 1 ended it after its time; None: it was given up.

    What a supervisor that was killed left of that name is ended first. Raises as `run_check`.
    """

    async def watch() -> None:
        while not given_up():
            await asyncio.sleep(POLL)
            output.show()
        with contextlib.suppress(Refused, Lost):
            await bus.call("StopUnit", "ss", name, "replace")

    await discard(bus, name)
    watching = asyncio.create_task(watch())
    try:
        async with _to_end(bus, name, properties, what.timeout, output.add) as result:
            if watching.done():
                await _kill(bus, name, FORGET_TIMEOUT)
                return None
            return 0 if result == "done" else _code(await bus.unit(name), result, what.command)
    finally:
        watching.cancel()
        await asyncio.wait([watching])


@contextlib.asynccontextmanager
async def _to_end(
    bus: Bus,
    name: str,
    properties: Sequence[Property],
    timeout: float,
    keep: Callable[[bytes], None],
) -> AsyncIterator[str]:
    """The result of the job of a unit of type oneshot, once it has ended; `keep` gets its output.

    PID 1 knows the unit until the end of the context.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(reader, "rb", 0) as pipe:
        reading = asyncio.create_task(_read(pipe, keep))
        try:
            try:
                result = await bus.job(
                    *("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail"),
                    *(variants(properties), []),
                    timeout=timeout + _END_TIMEOUT + _JOB_MARGIN,
                    descriptors=[writer],
                )
            finally:
                os.close(writer)
            # What a process outside of the unit holds open is not waited for.
            await asyncio.wait([reading], timeout=_END_TIMEOUT)
            yield result
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            # The last reference: PID 1 forgets it. It does so too when this connection ends.
            with contextlib.suppress(Refused, Lost):
                await bus.call("UnrefUnit", "s", name)


def _code(unit: Unit | None, result: str, argv: tuple[str, ...]) -> int:
    if unit is not None and unit.text("Result") == "timeout":
        return TIMED_OUT
    failure = SpawnFailed(unit, result)
    code = None if unit is None else exit_code(unit)
    if code is None or not failure.ran:
        raise RuntimeRefused(f"cannot run {argv[0]}: {spawn_reason(failure)}")
    return code


def _properties(unit: Unit, argv: tuple[str, ...], timeout: float) -> list[Property]:
    who = ":".join(filter(None, (unit.text("User"), unit.text("Group")))) or None
    directory = unit.text("WorkingDirectory") or "/"
    try:
        home = checks.account(who).home
    except PreflightFailed:
        home = "/"  # the user is gone; PID 1 will say so
    try:
        program = checks.find_program(argv[0], Path(directory), programs.DEFAULT_PATH)
    except PreflightFailed as error:
        raise RuntimeRefused(error.message) from error
    variables = programs.plain_environment(home)
    return [
        Property("Description", "s", f"Health check of {unit.name}"),
        *_oneshot(str(program), argv, timeout, _END_TIMEOUT, directory, who),
        Property("Environment", "as", [f"{key}={value}" for key, value in variables.items()]),
        # A check every few seconds would fill the journal with its comings and goings.
        Property("LogLevelMax", "i", 0),
    ]


def command_properties(
    what: HostCommand, environment_path: str, end_timeout: float, bound: str | None
) -> list[Property]:
    """`bound` is the service with which it ends."""
    binding = () if bound is None else ("BindsTo", "After")
    return [
        Property("Description", "s", f"Preparation of {what.instance}"),
        *_oneshot(
            *(what.command[0], what.command, what.timeout, end_timeout),
            *(what.directory, what.user),
        ),
        Property("EnvironmentFiles", "a(sb)", [[environment_path, False]]),
        *(Property(name, "as", [bound]) for name in binding),
    ]


def _oneshot(
    program: str,
    argv: tuple[str, ...],
    timeout: float,
    end_timeout: float,
    directory: str,
    who: str | None,
) -> list[Property]:
    return [
        Property("Slice", "s", SLICE),
        Property("Type", "s", "oneshot"),
        Property("TimeoutStartUSec", "t", max(1, round(timeout * 1e6))),
        Property("TimeoutStopUSec", "t", round(end_timeout * 1e6)),
        command(program, argv),
        Property("WorkingDirectory", "s", directory),
        *user(who),
        Property("StandardOutputFileDescriptor", "h", 0),
        Property("StandardErrorFileDescriptor", "h", 0),
        # It stays until its result was read, and no longer, even if we are killed before that.
        Property("AddRef", "b", True),
        Property("CollectMode", "s", "inactive-or-failed"),
    ]


async def _read(pipe: BinaryIO, keep: Callable[[bytes], None]) -> None:
    """Read a pipe to its end."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        while part := await reader.read(1 << 16):
            keep(part)
    finally:
        transport.close()
