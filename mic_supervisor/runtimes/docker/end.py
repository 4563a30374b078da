"""Stopping and removing containers, until the engine says that it is done."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mic_supervisor.errors import RuntimeRefused, StopFailed
from mic_supervisor.model import ObservedWorkload, RunState
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.errors import engine_errors, is_read_timeout, said

if TYPE_CHECKING:
    from docker import APIClient


def stop(
    engine: Engine, workload: ObservedWorkload, signal: str, grace: float, kill_wait: float
) -> None:
    """`signal`, at most `grace` seconds, then KILL, and at most `kill_wait` seconds for that.

    The signal is sent by name rather than with the engine's own stop call, which sends the one that
    the container was created with. KILL of a container's first process ends all of them: they live
    in its PID namespace.
    """
    what = f"cannot stop container {workload.name}"
    if workload.state is RunState.PAUSED:
        _unpause(engine, what, workload.ref)
    if not _signal(engine, what, workload.ref, signal):
        return
    if grace > 0 and _ends_within(engine, what, workload.ref, grace):
        return
    if not _signal(engine, what, workload.ref, "SIGKILL"):
        return
    if not _ends_within(engine, what, workload.ref, kill_wait):
        raise StopFailed(
            f"{what}: it is still there {kill_wait:g} s after SIGKILL",
            hint="a process in it hangs in the kernel, often in the GPU driver; see: "
            f"docker top {workload.name} -o pid,stat,wchan,args; dmesg",
        )


def remove(engine: Engine, what: str, ref: str, *, force: bool = False) -> None:
    """Remove a container and its anonymous volumes; one that is not there is success."""

    def ask(api: APIClient) -> None:
        from docker.errors import APIError, NotFound

        deadline = time.monotonic() + engine.patience
        while True:
            try:
                return api.remove_container(ref, v=True, force=force)
            except NotFound:
                return None
            except APIError as error:
                if "already in progress" not in said(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    try:
        engine.call(what, ask, patient=True)
    except RuntimeRefused as error:
        # Two wordings: "You cannot remove a running container", "container is running".
        if "running container" in error.message or "container is running" in error.message:
            raise RuntimeRefused(f"{what}: it still runs", hint="stop it first") from error
        raise


def _signal(engine: Engine, what: str, ref: str, signal: str) -> bool:
    """Whether there was anything to signal."""

    def ask(api: APIClient) -> bool:
        from docker.errors import APIError

        try:
            api.kill(ref, signal)
        except APIError as error:
            if "is not running" in said(error) or "no such container" in said(error).lower():
                return False
            raise
        return True

    return engine.call(what, ask)


def _ends_within(engine: Engine, what: str, ref: str, seconds: float) -> bool:
    def ask(api: APIClient) -> bool:
        from docker.errors import NotFound

        # The stub says int; requests takes (connect, read) as well.
        bounds: Any = (engine.timeout, seconds)
        try:
            answer = api.wait(ref, timeout=bounds, condition="not-running")
        except NotFound:
            return True
        except engine_errors() as error:
            if is_read_timeout(error):
                return False
            raise
        return not answer.get("Error")

    return engine.call(what, ask)


def _unpause(engine: Engine, what: str, ref: str) -> None:
    def ask(api: APIClient) -> None:
        from docker.errors import APIError

        try:
            api.unpause(ref)
        except APIError as error:
            if "not paused" not in said(error) and "no such container" not in said(error).lower():
                raise

    engine.call(what, ask)
