"""Runs a health check beside a unit, as a unit of its own.

The supervisor's own unit is confined: it may neither become another user nor see all that an
instance sees. PID 1 runs the check as the instance's user, in its directory, and ends whatever the
check started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import uuid
from pathlib import Path

from mic_supervisor.errors import PreflightFailed, RuntimeRefused
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.systemd.bus import Bus, Lost, Refused, variants
from mic_supervisor.runtimes.systemd.jobs import SpawnFailed, spawn_reason
from mic_supervisor.runtimes.systemd.unit import SLICE, Property, command, user
from mic_supervisor.runtimes.systemd.view import Unit, exit_code

_MOST_OUTPUT = 4096  # bytes that are kept
_END_TIMEOUT = 1.0  # seconds from TERM to KILL, and for the rest of the output
_MARGIN = 5.0  # seconds beyond PID 1's own bound


async def run(bus: Bus, unit: Unit, argv: tuple[str, ...], timeout: float) -> tuple[int, str]:
    """(exit code, output); TIMED_OUT when PID 1 ended it after `timeout` seconds.

    Raises RuntimeRefused when it cannot be run, Refused and Lost.
    """
    name = f"run-mic-check-{uuid.uuid4().hex[:16]}.service"
    # Looking up a user may take a while where a directory service is asked.
    properties = await asyncio.to_thread(_properties, unit, argv, timeout)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(writer, True)
    output = _Output(reader)
    try:
        try:
            result = await bus.job(
                *("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail"),
                *(variants(properties), []),
                timeout=timeout + _END_TIMEOUT + _MARGIN,
                descriptors=[writer],
            )
        finally:
            os.close(writer)
        code = 0
        if result != "done":
            code = _code(await bus.unit(name), result, argv)
        await output.rest(_END_TIMEOUT)
    finally:
        output.close()
        # The last reference: PID 1 forgets it. It does so too when this connection ends.
        with contextlib.suppress(Refused, Lost):
            await bus.call("UnrefUnit", "s", name)
    text = output.text()
    if code == checks.TIMED_OUT:
        return code, f"it did not end within {timeout:g} s" + (f": {text}" if text else "")
    return code, text


def _code(unit: Unit | None, result: str, argv: tuple[str, ...]) -> int:
    if unit is not None and unit.text("Result") == "timeout":
        return checks.TIMED_OUT
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
    variables = {"PATH": checks.DEFAULT_PATH, "HOME": home, "LANG": "C.UTF-8"}
    return [
        Property("Description", "s", f"Health check of {unit.name}"),
        Property("Slice", "s", SLICE),
        Property("Type", "s", "oneshot"),
        Property("TimeoutStartUSec", "t", max(1, round(timeout * 1e6))),
        Property("TimeoutStopUSec", "t", round(_END_TIMEOUT * 1e6)),
        command(_program(argv[0], directory), argv),
        Property("Environment", "as", [f"{key}={value}" for key, value in variables.items()]),
        Property("WorkingDirectory", "s", directory),
        *user(who),
        Property("StandardOutputFileDescriptor", "h", 0),
        Property("StandardErrorFileDescriptor", "h", 0),
        # A check every few seconds would fill the journal with its comings and goings.
        Property("LogLevelMax", "i", 0),
        # It stays until its result was read, and no longer, even if we are killed before that.
        Property("AddRef", "b", True),
        Property("CollectMode", "s", "inactive-or-failed"),
    ]


def _program(name: str, directory: str) -> str:
    if "/" in name:
        return str(Path(directory) / name)
    found = shutil.which(name, path=checks.DEFAULT_PATH)
    if found is None:
        raise RuntimeRefused(f"cannot run {name}: it is not on the PATH {checks.DEFAULT_PATH}")
    return found


class _Output:
    """Reads a pipe on the running loop, and keeps the beginning of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._kept = bytearray()
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            part = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return
        if not part:
            self._loop.remove_reader(self._descriptor)
            self._over.set()
        self._kept += part[: max(0, _MOST_OUTPUT - len(self._kept))]

    async def rest(self, timeout: float) -> None:
        """Until all was read; what a process outside of the unit holds open is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._over.wait()

    def text(self) -> str:
        return self._kept.decode(errors="replace").strip()

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
