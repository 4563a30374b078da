"""Asks a running instance how it is: one try each, no memory, no verdict."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from mic_supervisor.backends import Backend
from mic_supervisor.converge.http_client import Answer, NoAnswer, request
from mic_supervisor.errors import MicError
from mic_supervisor.model import (
    Check,
    ContainerSpec,
    EngineCheck,
    ExecCheck,
    Health,
    HttpCall,
    HttpCheck,
    Instance,
    ObservedWorkload,
    Placement,
    PlacementState,
    Probe,
    ProbeResult,
    TcpCheck,
)
from mic_supervisor.plan.launch import text_of

ALL_DUE = ("liveness", "readiness", "placements")
DEVICES = "devices"  # whether a container sees its GPUs: too dear to be asked with every look
_SEE_GPUS = ("nvidia-smi", "-L")
_SEE_TIMEOUT = 20.0  # seconds; with persistence mode off it wakes the GPU first
DEVICES_AGAIN = 5.0  # seconds after a look that did not see them, until another such look counts

Exec = Callable[[ObservedWorkload, tuple[str, ...], float], tuple[int, str]]
"""Runs a command where the workload runs, within so many seconds: (exit status, output)."""


@dataclass(frozen=True, slots=True)
class Target:
    """A workload that is alive, and the instance whose probes are asked of it.

    `indices` is what `${gpu_indices}` stands for in an exec probe.
    """

    instance: Instance
    workload: ObservedWorkload
    backend: Backend
    execute: Exec
    indices: str = ""


def probe(target: Target, check: Check, timeout: float) -> tuple[bool | None, str]:
    """(passed, in a few words why not). None: the prober itself could not tell."""
    try:
        if isinstance(check, HttpCheck):
            return _http(target, check, timeout)
        if isinstance(check, TcpCheck):
            return _tcp(target, check, timeout)
        if isinstance(check, EngineCheck):
            return _engine(target.workload)
        return _exec(target, check, timeout)
    except KeyError as error:
        return None, f"its port {error} is not recorded"


def call(target: Target, what: HttpCall) -> Answer:
    """Send one call to the instance's port "http". Raises NoAnswer."""
    listen = target.instance.workload.listen
    return send(listen, target.workload.identity.ports["http"], what)


def send(listen: str, port: int, what: HttpCall) -> Answer:
    """Send one call to who listens on that address and port. Raises NoAnswer."""
    host = reachable(listen)
    return request(host, port, what.method, what.path, body=what.body, timeout=what.timeout)


def placement_state(target: Target, placement: Placement) -> PlacementState:
    """What the server says of one model now."""
    try:
        answer = call(target, placement.verify)
    except NoAnswer:
        return target.backend.placement_state(placement, None, "")
    return target.backend.placement_state(placement, answer.status, answer.body)


def look(
    target: Target,
    now: float,
    before: Health | None = None,
    due: Collection[str] = ALL_DUE,
) -> Health:
    """What the probes say, in the order in which they gate each other.

    `before` is the previous health: a startup probe that passed is not asked again, failures in a
    row are counted on, and what is not `due` is carried over.
    """
    before = before or Health()
    probes = target.instance.probes
    startup = before.startup
    if startup is None or startup.ok is not True:
        startup = _result(target, _within_budget(target.instance), startup, now)
    if startup is not None and startup.ok is not True:
        return Health(startup=startup)
    liveness, readiness, placements = before.liveness, before.readiness, before.placements
    if "liveness" in due:
        liveness = _result(target, probes.liveness, liveness, now)
    if "placements" in due:
        placements = tuple(placement_state(target, item) for item in target.instance.placements)
    if "readiness" in due:
        readiness = _result(target, probes.readiness, readiness, now)
    devices = before.devices
    if DEVICES in due:
        devices = _devices(target, before.devices, now)
    surplus = before.surplus
    if "placements" in due and target.instance.inventory is not None:
        surplus = target.backend.surplus(target.instance, lambda what: _ask(target, what))
    return Health(startup, liveness, readiness, placements, surplus=surplus, devices=devices)


def _ask(target: Target, what: HttpCall) -> tuple[int | None, str]:
    try:
        answer = call(target, what)
    except NoAnswer:
        return None, ""
    return answer.status, answer.body


def has_devices(target: Target) -> bool:
    """Whether it is a container that was given GPUs, and can lose them without ending."""
    workload = target.instance.workload
    return isinstance(workload, ContainerSpec) and bool(workload.devices)


def _devices(target: Target, before: ProbeResult | None, now: float) -> ProbeResult:
    """What `nvidia-smi -L` says inside. An image without it says nothing.

    After a `systemctl daemon-reload` in legacy mode it says "Failed to initialize NVML: Unknown
    Error", while outside all is well: NVIDIA/nvidia-container-toolkit, issue 48.
    """
    try:
        status, output = target.execute(target.workload, _SEE_GPUS, _SEE_TIMEOUT)
    except MicError as error:
        return _counted(None, error.message, now, before, DEVICES_AGAIN)
    said = (output.strip().splitlines() or [""])[-1][:200]
    if "Failed to initialize NVML" in output or (status == 0 and "GPU " not in output):
        reason = f"nvidia-smi says there: {said or 'nothing'}"
        return _counted(False, reason, now, before, DEVICES_AGAIN)
    if status == 0:
        return _counted(True, "it sees its GPUs", now, before, DEVICES_AGAIN)
    reason = f"nvidia-smi exits there with {status}: {said}"
    return _counted(None, reason, now, before, DEVICES_AGAIN)


def _within_budget(instance: Instance) -> Probe | None:
    """The startup probe, with a period that lets all its failures count within the budget."""
    found = instance.probes.startup
    if found is None:
        return None
    return replace(found, period=min(found.period, instance.start_timeout / found.failures))


def _result(
    target: Target, probe_: Probe | None, before: ProbeResult | None, now: float
) -> ProbeResult | None:
    if probe_ is None:
        return None
    ok, reason = probe(target, probe_.check, probe_.timeout)
    return _counted(ok, reason, now, before, probe_.period)


def _counted(
    ok: bool | None, reason: str, now: float, before: ProbeResult | None, period: float
) -> ProbeResult:
    """A failure counts once a period has passed since the last one that did.

    So whoever asks more often learns more, and hastens nothing that failures in a row lead to.
    """
    if ok is True:
        return ProbeResult(True, reason, now)
    failures, counted_at = (before.failures, before.counted_at) if before is not None else (0, None)
    if ok is False and (counted_at is None or now >= counted_at + period):
        failures, counted_at = failures + 1, now
    return ProbeResult(ok, reason, now, failures, counted_at)


def _http(target: Target, check: HttpCheck, timeout: float) -> tuple[bool | None, str]:
    host, port = _published(target, check.port)
    try:
        answer = request(host, port, "GET", check.path, timeout=timeout)
    except NoAnswer as error:
        return False, f"GET {check.path}: {error}"
    if not answer.ok:
        return False, f"GET {check.path} answers {answer.status}"
    if check.expect or check.listed:
        try:
            document = answer.json()
        except ValueError:
            return False, f"GET {check.path} answers no JSON: another program has port {port}"
        for key, value in check.expect:
            found = document.get(key) if isinstance(document, dict) else None
            if found != value:
                return False, f"port {port} is answered by {found!r}, not by {value!r}"
        for place, value in check.listed:
            found = _member(document, place)
            if not isinstance(found, list) or value not in found:
                return False, f"port {port} is answered by another program: {place} lacks {value}"
    return True, f"GET {check.path} answers {answer.status}"


def _member(document: Any, place: str) -> Any:
    """What stands at a path of a JSON document; None where nothing does.

    "system.argv" is a member of a member, "data[].id" the list of that member of each item.
    """
    name, _, rest = place.partition(".")
    each = name.endswith("[]")
    found = document.get(name.removesuffix("[]")) if isinstance(document, dict) else None
    if each:
        return [_member(one, rest) for one in found] if isinstance(found, list) else None
    return _member(found, rest) if rest else found


def _tcp(target: Target, check: TcpCheck, timeout: float) -> tuple[bool | None, str]:
    host, port = _published(target, check.port)
    workload = target.instance.workload
    if isinstance(workload, ContainerSpec) and workload.network == "bridge":
        # The engine's own proxy accepts on the published port for a dead listener, too.
        if target.workload.address is None:
            return None, "the container has no address on its bridge"
        inside = {item.name: item.container or port for item in workload.ports}
        host, port = target.workload.address, inside[check.port]
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except TimeoutError:
        return False, f"port {port} does not answer within {timeout:g} s"
    except OSError as error:
        return False, f"port {port}: {error.strerror or error}"
    return True, f"port {port} accepts connections"


def _engine(workload: ObservedWorkload) -> tuple[bool | None, str]:
    if workload.engine_health is None:
        return None, "the image declares no health check"
    return workload.engine_health == "healthy", f"Docker says {workload.engine_health}"


def _exec(target: Target, check: ExecCheck, timeout: float) -> tuple[bool | None, str]:
    ports, workload = target.workload.identity.ports, target.instance.workload
    command = tuple(text_of(workload, item, ports, target.indices) for item in check.command)
    try:
        status, output = target.execute(target.workload, command, timeout)
    except MicError as error:
        return None, error.message
    last = output.strip().splitlines()[-1:]
    shown = f": {last[0][:200]}" if last else ""
    return status == 0, f"{command[0]} exits with {status}{shown}"


def _published(target: Target, name: str) -> tuple[str, int]:
    return reachable(target.instance.workload.listen), target.workload.identity.ports[name]


def reachable(listen: str) -> str:
    """The address under which this machine reaches who listens on `listen`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)
