"""Asks a running instance how it is: one try each, and no verdict."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mic_supervisor.backends import Backend
from mic_supervisor.converge.http_calls import Answer, HttpCalls, NoAnswer, lacks, reachable
from mic_supervisor.converge.listening import instead, is_own
from mic_supervisor.converge.requests import Requests, Verdict, counted
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
    LoadState,
    ObservedWorkload,
    Placement,
    PlacementState,
    Probe,
    ProbeResult,
    Progress,
    TcpCheck,
    WarmUp,
)
from mic_supervisor.plan.assess import passes
from mic_supervisor.plan.launch import text_of
from mic_supervisor.text import one_line, quoted

ALL_DUE = ("liveness", "readiness", "placements")
DEVICES = "devices"  # whether a container sees its GPUs: too dear to be asked with every look
_SEE_GPUS = ("nvidia-smi", "-L")
_SEE_TIMEOUT = 20.0  # seconds; with persistence mode off it wakes the GPU first
# What a server answers that wants a key: it is up, and says no more to a probe.
_GUARDED = frozenset({401, 403})
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


class Checker:
    """Asks on the event loop. What may block, a command or a backend's code, runs in `pool`."""

    def __init__(self, pool: Executor) -> None:
        self._http = HttpCalls()
        self._pool = pool
        self._requests: dict[str, Requests] = {}  # by the workload's ref

    def forget(self, ref: str) -> None:
        """Give up what outlasts the looks at a workload."""
        if (requests := self._requests.pop(ref, None)) is not None:
            requests.close()

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
        verdicts: dict[tuple[Check | Progress | None, float], Verdict | None] = {}

        async def asked(what: Check | Progress | None, timeout: float) -> Verdict | None:
            if (what, timeout) not in verdicts:
                verdicts[what, timeout] = await self._ask(target, what, timeout, now)
            return verdicts[what, timeout]

        async def result(probe: Probe | None, was: ProbeResult | None) -> ProbeResult | None:
            if probe is None:
                return None
            found = await asked(probe.check, probe.timeout)
            if found is None or found[0] is True:
                found = await asked(probe.progress, probe.timeout) or found
            return was if found is None else _counted(*found, now, was, probe.period)

        startup = before.startup
        if startup is None or startup.ok is not True:
            startup = await result(_within_budget(target.instance), startup)
        if startup is not None and startup.ok is not True:
            return Health(startup=await self._explained(target, startup))
        liveness, readiness, placements = before.liveness, before.readiness, before.placements
        devices, surplus, warm_up = before.devices, before.surplus, before.warm_up
        if "placements" in due:
            placements = tuple(
                [await self.placement_state(target, item) for item in target.instance.placements]
            )
        warming = target.instance.warm_up if all_loaded(target.instance, placements) else None
        if warming is not None and not passes(warm_up):
            start = _within_budget(target.instance)
            said = await self._ask(target, warming, 0.0, now) or (None, "not known yet")
            warm_up = _counted(*said, now, warm_up, start.period if start is not None else 5.0)
            if not passes(warm_up):
                return Health(startup, placements=placements, devices=devices, warm_up=warm_up)
        if "liveness" in due:
            liveness = await result(probes.liveness, liveness)
        if "readiness" in due:
            readiness = await result(probes.readiness, readiness)
        if DEVICES in due:
            verdict = await blocking(self._pool, _devices, target)
            devices = _counted(*verdict, now, devices, DEVICES_AGAIN)
        if "placements" in due and target.instance.inventory is not None:
            surplus = await self._surplus(target)
        return Health(startup, liveness, readiness, placements, surplus, devices, warm_up)

    async def _ask(
        self, target: Target, check: Check | Progress | WarmUp | None, timeout: float, now: float
    ) -> Verdict | None:
        """None: nothing is asked, or nothing is known yet."""
        if check is None:
            return None
        try:
            if isinstance(check, WarmUp):
                return self._requests_to(target).warm_up(check)
            if isinstance(check, Progress):
                return await self._progress(target, check, timeout, now)
            if isinstance(check, HttpCheck):
                return await self._get(target, check, timeout)
            if isinstance(check, TcpCheck):
                return await _connect(*_dialled(target, check), timeout)
            if isinstance(check, EngineCheck):
                return _engine(target.workload)
            return await blocking(self._pool, _exec, target, check, timeout)
        except KeyError as error:
            return None, f"its port {error} is not recorded"

    async def _progress(
        self, target: Target, what: Progress, timeout: float, now: float
    ) -> Verdict | None:
        requests = self._requests_to(target)
        text = fault = ""
        try:
            answer = await self._http.ask(
                *_published(target, what.port), "GET", what.path, timeout=timeout
            )
        except NoAnswer as error:
            fault = f"GET {what.path}: {error}"
            if error.own:
                return None, fault
        else:
            if answer.ok:
                text = answer.body
            else:
                fault = f"GET {what.path} answers {answer.status}"
        return requests.progress(what, counted(text, what.metric), fault, now)

    def _requests_to(self, target: Target) -> Requests:
        """Raises KeyError where its port is not recorded."""
        port = target.workload.identity.ports["http"]
        send = partial(self.send, target.instance.workload.listen, port)
        return self._requests.setdefault(target.workload.ref, Requests(send))

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


def all_loaded(instance: Instance, placements: Iterable[PlacementState]) -> bool:
    """Whether every model is loaded as the file says."""
    loaded = {item.model: item.digest for item in placements if item.state is LoadState.LOADED}
    return all(loaded.get(item.model) == item.digest for item in instance.placements)


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
