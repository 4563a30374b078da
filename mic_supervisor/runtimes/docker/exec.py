"""One command inside a running container, with a deadline that also ends the command.

The answer is read here, because the SDK loses what comes before it has read the head: see
test_the_sdk_loses_what_a_command_says_before_it_is_read in tests/integration/test_docker_follow.py.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import requests
from docker import APIClient
from docker.errors import create_api_error_from_http_exception

from mic_supervisor.model import ObservedWorkload
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.errors import ERRORS, is_read_timeout
from mic_supervisor.runtimes.docker.follow import lines

TIMED_OUT = 124  # what timeout(1) exits with
_MOST = 64 << 10  # bytes of output that are kept
_HEADER = 8  # bytes: the stream's number, three of nothing, the length as big-endian 32 bits


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

    def ask(api: APIClient) -> tuple[int, str]:
        exec_id = str(api.exec_create(workload.ref, list(command))["Id"])
        said, late, code = bytearray(), False, None
        try:
            # A command that keeps talking is ended by the clock, one that falls silent by the
            # socket, at the latest after twice the time.
            for data in _output(api, exec_id, max(deadline - time.monotonic(), 0.05)):
                said += data[: _MOST - len(said)]
                if late := time.monotonic() > deadline:
                    break
        except ERRORS as error:
            if not is_read_timeout(error):
                raise
            late = True
        # None: the command closed its output and runs on.
        while not late and (code := api.exec_inspect(exec_id).get("ExitCode")) is None:
            time.sleep(0.02)
            late = time.monotonic() > deadline
        output = "\n".join(lines([bytes(said)]))
        if code is not None:
            return int(code), output
        if engine.local:
            with suppress(*ERRORS):  # gone, or not to be seen from here
                _kill(api, exec_id, workload.ref)
        return TIMED_OUT, f"no end within {timeout:g} s" + (f": {output}" if output else "")

    return engine.call(what, ask)


def _output(api: APIClient, exec_id: str, silence: float) -> Iterator[bytes]:
    """What a command says, as it comes. Engine API reference, ContainerAttach, "Stream format"."""
    url = f"{api.base_url}/v{api.api_version}/exec/{exec_id}/start"
    bounds = (api.timeout, silence)
    with api.post(url, json={"Detach": False, "Tty": False}, stream=True, timeout=bounds) as answer:
        try:
            answer.raise_for_status()
        except requests.HTTPError as error:
            create_api_error_from_http_exception(error)
        while header := answer.raw.read(_HEADER):
            length = struct.unpack(">xxxxL", header)[0]
            data = answer.raw.read(length)
            if len(data) < length:
                raise EOFError("the stream ends in the middle of a frame")
            yield data


def _kill(api: APIClient, exec_id: str, container: str) -> None:
    """End a command that ran too long, so that checks do not pile up in the container.

    Only a process whose cgroup names the container is touched.
    """
    answer = api.exec_inspect(exec_id)
    pid = answer.get("Pid")
    if not answer.get("Running") or not isinstance(pid, int) or pid <= 1:
        return
    if container in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8"):
        os.kill(pid, signal.SIGKILL)
