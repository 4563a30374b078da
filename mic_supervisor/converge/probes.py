"""Asks a running instance how it is: one try each, no memory, no verdict."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from mic_supervisor.backends import Backend
from mic_supervisor.converge.http_calls import Answer, HttpCalls, NoAnswer, lacks, reachable
from mic_supervisor.converge.listening import instead, is_own
from mic_supervisor.converge.tasks import blocking
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
from mic_supervisor.text import one_line, quoted

ALL_DUE = ("liveness", "readiness", "placements")
DEVICES = "devices"  # whether a container sees its GPUs: too dear to be asked with every look
_SEE_GPUS = ("nvidia-smi", "-L")
_SEE_TIMEOUT = 20.0  # seconds; with persistence mode off it wakes the GPU first
# What a server answers that wants a key: it is up, and says no more to a probe.
_GUARDED = frozenset({401, 403})
DEVICES_AGAIN = 5.0  # seconds after a look that did not see them, until another such look counts

Verdict = tuple[bool | None, str]
"""(passed, in a few words why not). None: the prober itself could not tell."""

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


class Checker:
    """Asks on the event loop. What may block, a command or a backend's code, runs in `pool`."""

    def __init__(self, pool: Executor) -> None:
        self._http = HttpCalls()
        self._pool = pool

    async def call(self, target: Target, what: HttpCall) -> Answer:
        """Send one call to the instance's port "http". Raises NoAnswer."""
        listen = target.instance.workload.listen
        return await self.send(listen, target.workload.identity.ports["http"], what)

    async def send(self, listen: str, port: int, what: HttpCall) -> Answer:
        """Send one call to who listens on that address and port. Raises NoAnswer."""
        return await self._http.ask(
            reachable(listen), port, what.method, what.path, body=what.body, timeout=what.timeout
        )

    async def placement_state(self, target: Target, placement: Placement) -> PlacementState:
        """What the server says of one model now."""
        status, body = await self._answer(target, placement.verify)
        ask = target.backend.placement_state
        found = await blocking(self._pool, ask, placement, status, body)
        reason = None if found.reason is None else one_line(found.reason)
        return replace(found, reason=reason)

    async def probe(
        self,
        target: Target,
        now: float,
        before: Health | None = None,
        due: Collection[str] = ALL_DUE,
    ) -> Health:
        """What the probes say, in the order in which they gate each other.

        `before` is the previous health: a startup probe that passed is not asked again, failures in
        a row are counted on, and what is not `due` is carried over. A check that several probes
        have in common is made once.
        """
        before = before or Health()
        probes = target.instance.probes
        verdicts: dict[tuple[Check, float], Verdict] = {}

        async def result(probe: Probe | None, was: ProbeResult | None) -> ProbeResult | None:
            if probe is None:
                return None
            key = (probe.check, probe.timeout)
            if key not in verdicts:
                verdicts[key] = await self._check(target, *key)
            return _counted(*verdicts[key], now, was, probe.period)

        startup = before.startup
        if startup is None or startup.ok is not True:
            startup = await result(_within_budget(target.instance), startup)
        if startup is not None and startup.ok is not True:
            return Health(startup=await self._explained(target, startup))
        liveness, readiness, placements = before.liveness, before.readiness, before.placements
        devices, surplus = before.devices, before.surplus
        if "liveness" in due:
            liveness = await result(probes.liveness, liveness)
        if "placements" in due:
            placements = tuple(
                [await self.placement_state(target, item) for item in target.instance.placements]
            )
        if "readiness" in due:
            readiness = await result(probes.readiness, readiness)
        if DEVICES in due:
            verdict = await blocking(self._pool, _devices, target)
            devices = _counted(*verdict, now, devices, DEVICES_AGAIN)
        if "placements" in due and target.instance.inventory is not None:
            surplus = await self._surplus(target)
        return Health(startup, liveness, readiness, placements, surplus=surplus, devices=devices)

    async def _check(self, target: Target, check: Check, timeout: float) -> Verdict:
        try:
            if isinstance(check, HttpCheck):
                return await self._get(target, check, timeout)
            if isinstance(check, TcpCheck):
                return await _connect(*_dialled(target, check), timeout)
            if isinstance(check, EngineCheck):
                return _engine(target.workload)
            return await blocking(self._pool, _exec, target, check, timeout)
        except KeyError as error:
            return None, f"its port {error} is not recorded"

    async def _get(self, target: Target, check: HttpCheck, timeout: float) -> Verdict:
        host, port = _published(target, check.port)
        try:
            answer = await self._http.ask(host, port, "GET", check.path, timeout=timeout)
        except NoAnswer as error:
            return None if error.own else False, f"GET {check.path}: {error}"
        if not answer.ok and answer.status not in _GUARDED:
            return False, f"GET {check.path} answers {answer.status}"
        passed = True, f"GET {check.path} answers {answer.status}"
        other, named = _amiss(answer, check)
        if other is None:
            return passed
        own, who = await blocking(
            self._pool, is_own, target.workload, target.instance.workload, port
        )
        if own is False:
            return False, f"port {port} is answered by {who}, which is not ours: {other}"
        # It wants a key; or nobody but ours listens there, and has another name by a setting that
        # is not in the file.
        if not answer.ok or (own is True and named):
            return passed
        if own is True:
            return False, other
        way_out = "; if it is this model, give it the same name in the file" if named else ""
        return False, f"port {port} may be answered by another program: {other}{way_out}"

    async def _explained(self, target: Target, startup: ProbeResult) -> ProbeResult:
        """A startup probe that has failed often enough, with what its server listens on instead."""
        probe = target.instance.probes.startup
        if probe is None or startup.ok is None or startup.failures < probe.failures:
            return startup
        if not isinstance(probe.check, HttpCheck | TcpCheck):
            return startup
        workload, spec = target.workload, target.instance.workload
        port = _inside(target, probe.check.port)
        if port is None:
            return startup
        found = await blocking(self._pool, instead, workload, spec, port)
        return replace(startup, reason=one_line(f"{startup.reason}{found}"))

    async def _surplus(self, target: Target) -> tuple[Placement, ...]:
        """The backend asks as it goes, from a thread of the pool."""
        loop = asyncio.get_running_loop()

        def ask(what: HttpCall) -> tuple[int | None, str]:
            answer = asyncio.run_coroutine_threadsafe(self._answer(target, what), loop)
            try:
                # Bounded here, too: a thread that waits for a loop that ended holds up the exit.
                return answer.result(what.timeout + 1.0)
            except TimeoutError:
                return None, ""

        return await blocking(self._pool, target.backend.surplus, target.instance, ask)

    async def _answer(self, target: Target, what: HttpCall) -> tuple[int | None, str]:
        try:
            answer = await self.call(target, what)
        except NoAnswer:
            return None, ""
        return answer.status, answer.body


def has_devices(target: Target) -> bool:
    """Whether it is a container that was given GPUs, and can lose them without ending."""
    workload = target.instance.workload
    return isinstance(workload, ContainerSpec) and bool(workload.devices)


def _devices(target: Target) -> Verdict:
    """What `nvidia-smi -L` says inside. An image without it says nothing.

    After a `systemctl daemon-reload` in legacy mode it says "Failed to initialize NVML: Unknown
    Error", while outside all is well: NVIDIA/nvidia-container-toolkit, issue 48.
    """
    try:
        status, output = target.execute(target.workload, _SEE_GPUS, _SEE_TIMEOUT)
    except MicError as error:
        return None, error.message
    said = _last_line(output)
    if "Failed to initialize NVML" in output or (status == 0 and "GPU " not in output):
        return False, f"nvidia-smi says there: {said or 'nothing'}"
    if status == 0:
        return True, "it sees its GPUs"
    return None, f"nvidia-smi exits there with {status}: {said or 'it says nothing'}"


def _within_budget(instance: Instance) -> Probe | None:
    """The startup probe, with a period that lets all its failures count within the budget."""
    found = instance.probes.startup
    if found is None:
        return None
    return replace(found, period=min(found.period, instance.start_timeout / found.failures))


def _counted(
    ok: bool | None, reason: str, now: float, before: ProbeResult | None, period: float
) -> ProbeResult:
    """A failure counts once a period has passed since the last one that did.

    So whoever asks more often learns more, and hastens nothing that failures in a row lead to.
    """
    reason = one_line(reason)
    if ok is True:
        return ProbeResult(True, reason, now)
    failures, counted_at = (before.failures, before.counted_at) if before is not None else (0, None)
    if ok is False and (counted_at is None or now >= counted_at + period):
        failures, counted_at = failures + 1, now
    return ProbeResult(ok, reason, now, failures, counted_at)


def _amiss(answer: Answer, check: HttpCheck) -> tuple[str | None, bool]:
    """What speaks against its being the server that was asked for, None for nothing; and whether
    that is no more than another name in its place.
    """
    if not check.expect and not check.listed:
        return None, False
    if not answer.ok:
        return f"GET {check.path} answers {answer.status}", False
    try:
        document = answer.json()
    except (ValueError, RecursionError):
        return f"GET {check.path} answers no JSON", False
    for key, value in check.expect:
        found = document.get(key) if isinstance(document, dict) else None
        if found != value:
            shown = quoted(str(found), 200)
            return f"{key} is {shown}, not {value!r}", isinstance(found, str)
    for path, value in check.listed:
        found = _member(document, path)
        if not isinstance(found, list) or value not in found:
            listed = found if isinstance(found, list) else ()
            names = [one for one in listed if isinstance(one, str)]
            has = f"has {quoted(', '.join(names), 200)} and " if names else ""
            return f"{path} {has}lacks {value}", bool(names)
    return None, False


def _member(document: Any, path: str) -> Any:
    """What stands at a path of a JSON document; None where nothing does.

    "system.argv" is a member of a member, "data[].id" the list of that member of each item.
    """
    name, _, rest = path.partition(".")
    each = name.endswith("[]")
    found = document.get(name.removesuffix("[]")) if isinstance(document, dict) else None
    if each:
        return [_member(one, rest) for one in found] if isinstance(found, list) else None
    return _member(found, rest) if rest else found


def _dialled(target: Target, check: TcpCheck) -> tuple[str | None, int]:
    """Address and port of a TCP probe; no address where the container has none yet."""
    host, port = _published(target, check.port)
    workload = target.instance.workload
    if isinstance(workload, ContainerSpec) and workload.network == "bridge":
        # The engine's own proxy accepts on the published port for a dead listener, too.
        return target.workload.address, _inside(target, check.port) or port
    return host, port


def _inside(target: Target, name: str) -> int | None:
    """The port where the workload itself is to listen; None where it is not recorded."""
    workload, published = target.instance.workload, target.workload.identity.ports.get(name)
    if published is None or not isinstance(workload, ContainerSpec) or workload.network == "host":
        return published
    inside = {item.name: item.container for item in workload.ports}
    return inside.get(name) or published


async def _connect(host: str | None, port: int, timeout: float) -> Verdict:
    if host is None:
        return None, "the container has no address on its bridge"
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return False, f"port {port} does not answer within {timeout:g} s"
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        return None if lacks(error) else False, f"port {port}: {said}"
    writer.close()
    return True, f"port {port} accepts connections"


def _engine(workload: ObservedWorkload) -> Verdict:
    if workload.engine_health is None:
        return None, "the image declares no health check"
    return workload.engine_health == "healthy", f"Docker says {workload.engine_health}"


def _exec(target: Target, check: ExecCheck, timeout: float) -> Verdict:
    ports, workload = target.workload.identity.ports, target.instance.workload
    command = tuple(text_of(workload, item, ports, target.indices) for item in check.command)
    try:
        status, output = target.execute(target.workload, command, timeout)
    except MicError as error:
        return None, error.message
    said = _last_line(output)
    return status == 0, f"{command[0]} exits with {status}" + (f": {said}" if said else "")


def _last_line(output: str) -> str:
    """The last thing that a command said, in quotes; empty: nothing."""
    lines = output.strip().splitlines()
    return quoted(lines[-1], 200) if lines else ""


def _published(target: Target, name: str) -> tuple[str, int]:
    return reachable(target.instance.workload.listen), target.workload.identity.ports[name]
