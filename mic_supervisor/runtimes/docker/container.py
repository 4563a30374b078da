"""One container that is there: its log, commands inside it, its end; and the engine's events.

A stream that breaks is an error, never an end. The SDK ends a broken stream like a whole one; so
what an end means is looked at.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

from docker import APIClient
from docker.errors import APIError, NotFound
from docker.types import CancellableStream

from mic_supervisor.errors import MicError, RuntimeRefused, RuntimeUnavailable, StopFailed
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import ObservedWorkload, RunState
from mic_supervisor.runtimes import TIMED_OUT, lines
from mic_supervisor.runtimes.docker.engine import ERRORS, Engine, explain, is_read_timeout, refused

EVENTS = ("start", "die", "oom", "destroy", "health_status")


def log_lines(
    engine: Engine, workload: ObservedWorkload, tail: int | None, follow: bool
) -> Iterator[str]:
    """Lines of a container's log, see Runtime.logs."""
    what = f"cannot read the log of container {workload.name}"
    last: Literal["all"] | int = "all" if tail is None else max(tail, 0)
    if not follow:
        yield from lines([engine.call(what, lambda api: api.logs(workload.ref, tail=last))])
        return
    log = engine.call(what, lambda api: api.logs(workload.ref, stream=True, tail=last))
    try:
        yield from lines(log)
    finally:
        _hang_up(log)
    found = engine.container(what, workload.ref)
    state = found.get("State") if found is not None else None
    if isinstance(state, Mapping) and state.get("Running"):
        raise RuntimeUnavailable(f"{what}: the engine ended the stream")


def event_lines(engine: Engine, labels: Mapping[str, str], stop: threading.Event) -> Iterator[str]:
    """A line per event of a container with these labels, see DockerRuntime.events."""
    what = "cannot follow the engine's events"
    filters = {
        "type": "container",
        "event": list(EVENTS),
        "label": [f"{key}={value}" for key, value in labels.items()],
    }

    def ask(api: APIClient) -> CancellableStream[dict[str, Any]]:
        api.ping()  # the SDK tells of a refusal with the first event only
        return api.events(filters=filters, decode=True)

    events = engine.call(what, ask)
    over = threading.Event()
    threading.Thread(
        target=_watch, args=(events, stop, over), name="docker-events-stop", daemon=True
    ).start()
    try:
        yield f"listening to the engine at {engine.address}"
        for event in events:
            if stop.is_set():
                return
            if not _is_meant(event, labels):
                continue
            if event.get("Action") == "die":
                _written_down(engine, str(event.get("id")))
            yield _event_line(event)
    except ERRORS as error:
        if stop.is_set():
            return
        raise explain(what, error, engine.address) from error
    finally:
        over.set()
        _hang_up(events)
    if not stop.is_set():
        raise RuntimeUnavailable(f"{what}: the engine ended the stream")


def _watch(
    events: CancellableStream[dict[str, Any]], stop: threading.Event, over: threading.Event
) -> None:
    """Close the stream under its reader once `stop` is set, unless it is over by itself."""
    while not stop.wait(0.5):
        if over.is_set():
            return
    _hang_up(events)


def _hang_up(stream: CancellableStream[Any]) -> None:
    # Closed already: that was the aim.
    with suppress(*ERRORS):
        stream.close()


def _written_down(engine: Engine, ref: str) -> None:
    """Wait until the engine's list says that a container ended, or cannot be asked.

    An engine tells of a death before it cleans up, and lists the container as running until it is
    done with that, about 0.1 s later, of which it tells nobody (seen on Engine 20.10). It holds the
    container's lock meanwhile, and an inspection waits for it.
    """
    with suppress(MicError):
        engine.container("cannot inspect a container that ended", ref)


def _is_meant(event: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether an event is one that was asked for. An engine that filters none tells of every exec,
    which probes make all the time.

    What an event does not say speaks for it.
    """
    action, attributes = event.get("Action"), (event.get("Actor") or {}).get("Attributes")
    if isinstance(action, str) and action.partition(":")[0] not in EVENTS:
        return False
    return not attributes or labels.items() <= attributes.items()


def _event_line(event: Mapping[str, Any]) -> str:
    """For example "die mic-default-mam (exit code 137)"."""
    actor = event.get("Actor") or {}
    attributes = actor.get("Attributes") or {}
    action = event.get("Action") or event.get("status") or "changed"
    line = f"{action} {attributes.get('name') or actor.get('ID') or event.get('id')}"
    code = attributes.get("exitCode")
    return f"{line} (exit code {code})" if action == "die" and code is not None else line


# --- commands inside ----------------------------------------------------------------------------
#
# The answer is read here, because the SDK loses what comes before it has read the head: see
# test_the_sdk_loses_what_a_command_says_before_it_is_read in test_docker_follow.py, in
# tests/integration.

_MOST = 64 << 10  # bytes of output that are kept
_EXEC_BEGINS = 5.0  # seconds for a command to have a process
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
    deadline = time.monotonic() + _EXEC_BEGINS
    while answer.get("Running") and not answer.get("Pid") and time.monotonic() < deadline:
        time.sleep(0.05)  # before Engine 23 it runs before it has begun
        answer = api.exec_inspect(exec_id)
    pid = answer.get("Pid")
    if not answer.get("Running") or not isinstance(pid, int) or pid <= 1:
        return
    if container in (procfs.cgroup(pid) or ""):
        os.kill(pid, signal.SIGKILL)


# --- stopping and removing ----------------------------------------------------------------------


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
        deadline = time.monotonic() + engine.work_timeout
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
