"""Stopping and removing containers, until the engine says that it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from docker import APIClient
from docker.errors import APIError, NotFound

from mic_supervisor.errors import RuntimeRefused, StopFailed
from mic_supervisor.model import ObservedWorkload, RunState
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.errors import ERRORS, is_read_timeout, refused

_GONE = "o such container"  # "No", or "no" behind "Cannot kill container"


def stop(
    engine: Engine, workload: ObservedWorkload, signal: str, grace: float, kill_wait: float
) -> None:
    """`signal`, at most `grace` seconds, then KILL, and at most `kill_wait` seconds for that.

    The signal is sent by name rather than with the engine's own stop call, which sends the one that
    the container was created with. KILL of a container's first process ends all of them: they live
    in its PID namespace.
    """
    what, ref = f"cannot stop container {workload.name}", workload.ref
    if workload.state is RunState.PAUSED:
        _unless(engine, what, lambda api: api.unpause(ref), "not paused", _GONE)
    if not _unless(engine, what, lambda api: api.kill(ref, signal), "is not running", _GONE):
        return
    if grace > 0 and _ends_within(engine, what, ref, grace):
        return
    if not _unless(engine, what, lambda api: api.kill(ref, "SIGKILL"), "is not running", _GONE):
        return
    if not _ends_within(engine, what, ref, kill_wait):
        raise StopFailed(
            f"{what}: it is still there {kill_wait:g} s after SIGKILL",
            hint="a process in it hangs in the kernel, often in the GPU driver; see: "
            f"docker top {workload.name} -o pid,stat,wchan,args; dmesg",
        )


def remove(engine: Engine, what: str, ref: str, *, force: bool = False) -> None:
    """Remove a container and its anonymous volumes; one that is not there is success."""

    def ask(api: APIClient) -> None:
        deadline = time.monotonic() + engine.patience
        while True:
            try:
                return api.remove_container(ref, v=True, force=force)
            except NotFound:
                return None
            except APIError as error:
                if "already in progress" not in refused(error)[1] or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    try:
        engine.call(what, ask, patient=True)
    except RuntimeRefused as error:
        # Two wordings: "You cannot remove a running container", "container is running".
        if "running container" in error.message or "container is running" in error.message:
            raise RuntimeRefused(f"{what}: it still runs", hint="stop it first") from error
        raise


def _unless(engine: Engine, what: str, act: Callable[[APIClient], object], *refusals: str) -> bool:
    """Act; False where the engine's refusal holds one of these texts."""

    def ask(api: APIClient) -> bool:
        try:
            act(api)
        except APIError as error:
            if not any(text in refused(error)[1] for text in refusals):
                raise
            return False
        return True

    return engine.call(what, ask)


def _ends_within(engine: Engine, what: str, ref: str, seconds: float) -> bool:
    def ask(api: APIClient) -> bool:
        # The stub says int; requests takes (connect, read) as well.
        bounds: Any = (engine.timeout, seconds)
        try:
            answer = api.wait(ref, timeout=bounds, condition="not-running")
        except NotFound:
            return True
        except ERRORS as error:
            if is_read_timeout(error):
                return False
            raise
        return not answer.get("Error")

    return engine.call(what, ask)
