"""A scope for each test, and the removal of what carries it, of nothing else."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, NotFound

LABEL = "io.mic.scope"
PREFIX = "test"


def new_scope() -> str:
    """Holds the PID of its maker, so that a later run can tell that the test is over."""
    return f"{PREFIX}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def containers(engine: docker.APIClient, scope: str) -> list[dict[str, Any]]:
    """All containers of a scope, running or not, as the engine's list shows them, by name."""
    found = engine.containers(all=True, filters={"label": f"{LABEL}={scope}"})
    return sorted(found, key=lambda c: c["Names"] or [""])


def remove_containers(engine: docker.APIClient, scope: str) -> None:
    for container in containers(engine, scope):
        _remove(engine, container["Id"])


def remove_stale(engine: docker.APIClient) -> None:
    """Removes the containers of tests whose process has ended without tidying up."""
    for container in engine.containers(all=True, filters={"label": LABEL}):
        prefix, _, rest = container["Labels"][LABEL].partition("-")
        pid = rest.partition("-")[0]
        if prefix == PREFIX and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(engine, container["Id"])


def _remove(engine: docker.APIClient, container: str) -> None:
    try:
        engine.remove_container(container, force=True, v=True)
    except NotFound:
        return
    except APIError as error:
        if "already in progress" not in str(error):
            raise


def processes(scope: str, *, keepers: bool = False) -> list[int]:
    """PIDs of the processes whose environment names this scope, this one excepted; a keeper is told
    of it as part of who it keeps."""
    wanted, kept = f"MIC_SCOPE={scope}".encode(), f'"scope":"{scope}"'.encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in environment or (keepers and any(kept in one for one in environment)):
            found.append(int(entry.name))
    return sorted(found)


def runs(pid: int) -> bool:
    """Whether it does more than wait to be reaped by somebody who is not ours."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def end_processes(scope: str, seconds: float = 10.0, *, keepers: bool = True) -> None:
    """Kills every process of a scope until none is left: a keeper may start one meanwhile, or have
    been started itself by a daemon that is gone."""
    end = time.monotonic() + seconds
    while (left := processes(scope, keepers=keepers)) and time.monotonic() < end:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    if left:
        raise AssertionError(f"processes of {scope} do not end: {left}")
