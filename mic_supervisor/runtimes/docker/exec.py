"""One command inside a running container, with a deadline that also ends the command."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from mic_supervisor.errors import MicError
from mic_supervisor.model import ObservedWorkload
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.errors import engine_errors, explain, is_read_timeout
from mic_supervisor.runtimes.docker.streams import frames, lines

TIMED_OUT = 124  # what timeout(1) exits with
_MOST = 64 << 10  # bytes of output that are kept


def run_check(
    engine: Engine, workload: ObservedWorkload, command: tuple[str, ...], timeout: float
) -> tuple[int, str]:
    """(exit code, output of both streams, cut after 64 KiB).

    After `timeout` seconds the code is 124, and the command is killed where the engine shares this
    machine's processes; the engine itself has no call for that. RuntimeRefused when the container
    does not run, RuntimeUnavailable when the engine does not answer.
    """
    what = f"cannot run {command[0] if command else 'a check'} in container {workload.name}"
    deadline = time.monotonic() + timeout
    exec_id = engine.call(what, lambda api: str(api.exec_create(workload.ref, list(command))["Id"]))
    try:
        output = _output(engine, what, exec_id, deadline)
    except _Late as late:
        _kill(engine, what, exec_id, workload.ref)
        said = f": {late.output}" if late.output else ""
        return TIMED_OUT, f"no end within {timeout:g} s{said}"
    code = engine.call(what, lambda api: api.exec_inspect(exec_id).get("ExitCode"))
    # None: the command closed its output and runs on.
    while code is None:
        if time.monotonic() > deadline:
            _kill(engine, what, exec_id, workload.ref)
            return TIMED_OUT, f"no end within {timeout:g} s: {output}"
        time.sleep(0.02)
        code = engine.call(what, lambda api: api.exec_inspect(exec_id).get("ExitCode"))
    return int(code), output


class _Late(Exception):
    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


def _output(engine: Engine, what: str, exec_id: str, deadline: float) -> str:
    parts: list[tuple[int, bytes]] = []
    kept = 0
    # One read may wait for the whole time that is left at its beginning, and each frame begins a
    # new one: a command that keeps talking is ended by the clock below, one that falls silent by
    # the socket, at the latest after twice the time.
    left = max(deadline - time.monotonic(), 0.05)
    try:
        response = engine.open(
            what,
            "POST",
            f"/exec/{exec_id}/start",
            body={"Detach": False, "Tty": False},
            silence=left,
        )
    except MicError as error:
        if error.__cause__ is not None and is_read_timeout(error.__cause__):
            raise _Late("") from error
        raise
    try:
        with response:
            for number, data in frames(response.raw.read):
                if kept < _MOST:
                    parts.append((number, data[: _MOST - kept]))
                    kept += len(data)
                if time.monotonic() > deadline:
                    raise _Late("\n".join(lines(parts)))
    except engine_errors() as error:
        if is_read_timeout(error):
            raise _Late("\n".join(lines(parts))) from error
        raise explain(what, error, engine.address) from error
    return "\n".join(lines(parts))


def _kill(engine: Engine, what: str, exec_id: str, container: str) -> None:
    """End a command that ran too long, so that checks do not pile up in the container.

    Only a process whose cgroup names the container is touched.
    """
    if not engine.local:
        return
    try:
        answer: Any = engine.call(what, lambda api: api.exec_inspect(exec_id))
    except MicError:
        return
    pid = answer.get("Pid")
    if not answer.get("Running") or not isinstance(pid, int) or pid <= 1:
        return
    try:
        if container in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8"):
            os.kill(pid, signal.SIGKILL)
    except OSError:
        return  # gone, or not to be seen from here
