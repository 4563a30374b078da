"""Executes the steps of a plan, one call each, no decisions; and how far those of a lane are."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

from mic_supervisor.backends import Backend
from mic_supervisor.converge.http_calls import NoAnswer
from mic_supervisor.converge.newer import files_of
from mic_supervisor.converge.observe import Sources
from mic_supervisor.converge.probes import Checker, Target
from mic_supervisor.converge.tasks import Threads, blocking
from mic_supervisor.errors import LoadFailed, MicError, ReleaseFailed, StopFailed, Withdrawn
from mic_supervisor.gpu.owners import annotate, managed_refs
from mic_supervisor.model import (
    ContainerSpec,
    GpuInventory,
    LoadState,
    Placement,
    PlacementState,
    ProcessSpec,
    RuntimeView,
)
from mic_supervisor.plan.actions import (
    Change,
    Create,
    Drain,
    Load,
    Prepare,
    Release,
    Remove,
    Restart,
    Start,
    Step,
    Stop,
    ToModel,
    Unload,
)
from mic_supervisor.plan.health import Activity, Phase
from mic_supervisor.plan.memory import Floor
from mic_supervisor.plan.release import Refused, Released, check_release
from mic_supervisor.runtimes import HostCommand, HostCommands, Progress
from mic_supervisor.text import quoted

_RELEASE_POLL = 0.05  # seconds between two looks at GPUs that are about to be free
_DRAIN_POLL = 0.25  # seconds between two questions to a server that is drained
_VERIFY_TIMEOUT = 10.0  # seconds, from the answer to a load or unload until the server says so
_VERIFY_POLL = 0.1  # seconds between two looks at a model that was just loaded
_TURN_POLL = 0.5  # seconds between two tries to have one's turn
_LOG_LINES = 400
_SILENT = 3  # calls without an answer, in a row, after which nobody is waited for


@dataclass(frozen=True, slots=True)
class Lane:
    """Changes that are being carried out together, and how far each instance among them is.

    Their steps are carried out one after the other, but for those inside a server. Whoever looks at
    the machine meanwhile sees it from here: `status`, `/readyz`, the page.
    """

    instances: frozenset[str]
    gpus: frozenset[str]
    activities: dict[str, Activity] = field(default_factory=dict, compare=False)  # by instance
    # By instance, what its GPUs held when they were released for it.
    floors: dict[str, Mapping[str, Floor]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, changes: Iterable[Change]) -> Self:
        """As it is before its first step."""
        changes = [*changes]
        instances = frozenset(change.instance for change in changes)
        gpus = frozenset(uuid for change in changes for uuid in change.gpus)
        return cls(instances, gpus, dict.fromkeys(instances, Activity(Phase.PENDING)))

    def overlaps(self, other: Lane) -> bool:
        return bool(self.instances & other.instances or self.gpus & other.gpus)

    def enters(self, instance: str, phase: Phase) -> None:
        """A step begins for it, and whoever has not begun yet waits for that."""
        if phase is Phase.PENDING and self.activities[instance].phase is Phase.STARTING:
            return  # what it supersedes is removed behind its start
        self.activities[instance] = Activity(phase)
        for name, activity in self.activities.items():
            if name != instance and activity.phase is Phase.PENDING:
                said = f"waits for {instance}, which is {phase.value}"
                self.activities[name] = Activity(Phase.PENDING, said)

    def reports(self, instance: str, text: str) -> None:
        """What the step that is under way waits for, or how far it is."""
        self.activities[instance] = self.activities[instance]._replace(reason=text)


class Steps:
    """Runs steps. What blocks, a runtime's calls and a backend's code, does so in threads.

    `target_of` finds the instance and the backend for a workload that is to be talked to,
    `backend` a backend by its name.
    """

    def __init__(
        self,
        sources: Sources,
        target_of: Callable[[ToModel], Target],
        backend: Callable[[str], Backend],
        checker: Checker,
    ) -> None:
        self._sources = sources
        self._target_of = target_of
        self._backend = backend
        self._checker = checker
        # Rounds have others: a step may take hours, and each GPU and each slice may have one.
        self._pool = Threads(512, "mic-step")
        # Whether what is being prepared is not wanted any more; asked in any thread.
        self.withdrawn: Callable[[Prepare], bool] = lambda _step: False
        self._ending = asyncio.Event()
        self._preparing: dict[str, threading.Lock] = {}  # by model

    def end(self) -> None:
        """Have done with waiting for others' work: a drain under way fails, and nothing stops."""
        self._ending.set()

    async def run(self, step: Step, progress: Progress) -> Released | str | None:
        """Do it. Raises MicError in words for the operator. Of a Release: what it found; of a Load:
        the fingerprint of the files that were there to be loaded, where that is known.

        `progress` may be called from any thread.
        """
        match step:
            case Release():
                return await self._release(step, progress)
            case Drain():
                await self._drain(step, progress)
            case Load():
                return await self._load(step, progress)
            case Unload():
                await self._unload(step)
            case _:
                await blocking(self._pool, self._call, step, progress)
        return None

    def _call(self, step: Step, progress: Progress) -> None:
        """One call of a runtime, which blocks."""
        runtimes = self._sources.runtimes
        match step:
            case Prepare(launch=launch):
                if step.command:
                    self._run_command(step, progress)
                runtimes[launch.runtime].prepare(launch, self._while_wanted(step, progress))
            case Create(launch=launch):
                runtimes[launch.runtime].create(launch)
            case Start(launch=launch):
                runtimes[launch.runtime].start(launch)
            case Restart(workload=workload):
                runtimes[workload.runtime].restart(workload)
            case Stop(workload=workload, signal=signal, grace=grace):
                runtimes[workload.runtime].stop(workload, signal=signal, grace=grace)
            case Remove(workload=workload):
                runtimes[workload.runtime].remove(workload)
            case _:
                raise AssertionError(f"unknown step {step!r}")

    def _while_wanted(self, step: Prepare, progress: Progress) -> Progress:
        """The same, which ends the pull of an image that is not wanted any more."""
        if not isinstance(step.launch.spec, ContainerSpec):
            return progress

        def report(text: str) -> None:
            if self._given_up(step):
                raise Withdrawn(f"gave up, as it is not wanted any more, or we end: {text}")
            progress(text)

        return report

    def _given_up(self, step: Prepare) -> bool:
        return self._ending.is_set() or self.withdrawn(step)

    def _run_command(self, step: Prepare, progress: Progress) -> None:
        """The file's `prepare`. Of one model one at a time: what the first one fetched, the others
        find.
        """
        identity, spec = step.launch.identity, step.launch.spec
        assert step.asked is not None  # whose command it is
        what = HostCommand(
            instance=identity.instance,
            command=step.command,
            env=spec.env,
            user=spec.user,
            directory=(spec.working_dir if isinstance(spec, ProcessSpec) else None) or "/",
            timeout=step.asked.timeout,
        )

        hosts = [one for one in self._sources.runtimes.values() if isinstance(one, HostCommands)]
        turn = self._preparing.setdefault(identity.model, threading.Lock())
        while not turn.acquire(timeout=_TURN_POLL):
            if self._given_up(step):
                raise Withdrawn(f"gave up to wait for its turn to run {step.command[0]}")
        try:
            progress(f"prepare: running {step.command[0]}")
            hosts[0].run_command(what, progress, partial(self._given_up, step))
        finally:
            turn.release()

    async def _release(self, step: Release, progress: Progress) -> Released:
        """Until the GPUs are free, as plan/release.py judges each look at them."""
        began = time.monotonic()
        clear_since: float | None = None
        reported = ""
        while True:
            inventory = await blocking(self._pool, self._with_former, step)
            now = time.monotonic()
            for_memory = None if clear_since is None else now - clear_since
            verdict = check_release(
                step.gpus, step.floors, step.vram, inventory, now - began, for_memory
            )
            if isinstance(verdict, Released):
                return verdict
            if isinstance(verdict, Refused):
                raise ReleaseFailed(
                    f"cannot start {step.instance}: {verdict.reason}",
                    hint="see `mic-supervisor gpus`",
                )
            if not verdict.for_memory:
                clear_since = None
            elif clear_since is None:
                clear_since = now
            if verdict.reason != reported:
                progress(verdict.reason)
                reported = verdict.reason
            await asyncio.sleep(_RELEASE_POLL)

    def _with_former(self, step: Release) -> GpuInventory:
        views = [RuntimeView(item.runtime, (item,)) for item in step.former]
        return annotate(self._sources.gpus.observe(), managed_refs(views))

    async def _drain(self, step: Drain, progress: Progress) -> None:
        """A drain that runs out of time ends; the stop that follows is then a hard one."""
        identity = step.workload.identity
        try:
            backend, port = self._backend(identity.backend), identity.ports["http"]
        except (MicError, KeyError) as error:
            progress(f"it cannot be drained ({error}); stopping it anyway")
            return
        deadline = time.monotonic() + step.timeout
        progress("draining")
        silent, reported = 0, ""
        while (left := deadline - time.monotonic()) > 0:
            call = replace(step.call, timeout=min(step.call.timeout, left))
            try:
                answer = await self._checker.send(step.listen, port, call)
            except NoAnswer as error:
                silent += not error.own  # of which nothing follows for the server
                # Who has gone has nothing to finish for anyone; who is only slow may have.
                if error.refused or silent == _SILENT:
                    return
            else:
                silent = 0
                try:
                    if await blocking(self._pool, backend.is_drained, answer.status, answer.body):
                        return
                except MicError as error:
                    # Whether requests are in flight is unknown, which is not that there are none.
                    if reported != error.message:
                        reported = error.message
                        progress(f"{reported}; waiting")
            with suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_POLL):
                    await self._ending.wait()
            if self._ending.is_set():
                raise StopFailed(
                    f"cannot stop {step.instance}: it was still being drained when this "
                    "supervisor ended",
                    hint="the next one begins again",
                )
        progress(f"still busy after {step.timeout:g} s; stopping it anyway")

    async def _load(self, step: Load, progress: Progress) -> str | None:
        target, placement = self._target_of(step), step.placement
        progress(f"loading {placement.called}")
        # Before the load: what is changed meanwhile may not be in it.
        files = await blocking(self._pool, files_of, placement)

        def refused(why: object) -> LoadFailed:
            hint = f"see `mic-supervisor logs {step.instance}`"
            return LoadFailed(f"cannot load {placement.called}: {why}", hint=hint)

        try:
            answer = await self._checker.call(target, placement.load)
        except NoAnswer as error:
            raise refused(error) from error
        if not answer.ok:
            raise refused(await blocking(self._pool, self._why_not, target, step, answer.body))

        def loaded(state: PlacementState) -> bool:
            return state.state is LoadState.LOADED and state.digest == placement.digest

        state = await self._verified(target, placement, loaded)
        if not loaded(state):
            runs = ", ".join(f"{key}={value}" for key, value in state.summary)
            raise refused(
                "the server accepted the configuration but runs another one "
                f"({runs or state.reason or state.state.value})"
            )
        return files

    async def _unload(self, step: Unload) -> None:
        target, placement = self._target_of(step), step.placement
        what = f"cannot unload {placement.called}"
        try:
            answer = await self._checker.call(target, placement.unload)
        except NoAnswer as error:
            raise LoadFailed(f"{what}: {error}") from error
        if not answer.ok:
            raise LoadFailed(f"{what}: {quoted(answer.body, 300)}")

        def gone(state: PlacementState) -> bool:
            return state.state is not LoadState.LOADED

        if not gone(await self._verified(target, placement, gone)):
            raise LoadFailed(
                f"{what}: the server still has it {_VERIFY_TIMEOUT:g} s later",
                hint="requests to it may be under way",
            )

    async def _verified(
        self, target: Target, placement: Placement, enough: Callable[[PlacementState], bool]
    ) -> PlacementState:
        """What the server says of a model, once that is enough or has been waited for."""
        deadline = time.monotonic() + _VERIFY_TIMEOUT
        while True:
            state = await self._checker.placement_state(target, placement)
            if enough(state) or time.monotonic() >= deadline:
                return state
            await asyncio.sleep(_VERIFY_POLL)

    def _why_not(self, target: Target, step: Load, answer: str) -> str:
        runtime = self._sources.runtimes[step.workload.runtime]
        try:
            log = [*runtime.logs(step.workload, tail=_LOG_LINES)]
        except MicError:
            log = []  # the server's own words still tell something; the log only adds to them
        return target.backend.load_failure(answer, log, step.placement.model)
