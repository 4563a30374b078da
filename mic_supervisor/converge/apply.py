"""Executes the steps of a plan: one call each, no decisions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace

from mic_supervisor.backends import Backend
from mic_supervisor.converge.http_calls import NoAnswer
from mic_supervisor.converge.observe import Sources
from mic_supervisor.converge.probes import Checker, Target
from mic_supervisor.converge.tasks import blocking
from mic_supervisor.errors import LoadFailed, MicError, ReleaseFailed, StopFailed
from mic_supervisor.gpu.owners import annotate, managed_refs
from mic_supervisor.model import (
    GpuInventory,
    LoadState,
    Placement,
    PlacementState,
    RuntimeView,
)
from mic_supervisor.plan.actions import (
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
from mic_supervisor.plan.release import Refused, Released, check_release
from mic_supervisor.runtimes import Progress
from mic_supervisor.text import quoted

_RELEASE_POLL = 0.05  # seconds between two looks at GPUs that are about to be free
_DRAIN_POLL = 0.25  # seconds between two questions to a server that is drained
_VERIFY_TIMEOUT = 10.0  # seconds, from the answer to a load or unload until the server says so
_VERIFY_POLL = 0.1  # seconds between two looks at a model that was just loaded
_LOG_LINES = 400
_SILENT = 3  # calls without an answer, in a row, after which nobody is waited for


class Steps:
    """Runs steps. What blocks, a runtime's calls and a backend's code, does so in `pool`.

    `target_of` finds the instance and the backend for a workload that is to be talked to,
    `backend` a backend by its name.
    """

    def __init__(
        self,
        sources: Sources,
        target_of: Callable[[ToModel], Target],
        backend: Callable[[str], Backend],
        checker: Checker,
        pool: Executor,
    ) -> None:
        self._sources = sources
        self._target_of = target_of
        self._backend = backend
        self._checker = checker
        self._pool = pool
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Have done with waiting for others' work: a drain under way fails, and nothing stops."""
        self._ending.set()

    async def run(self, step: Step, progress: Progress) -> Released | None:
        """Do it. Raises MicError in words for the operator. Of a Release: what it found.

        `progress` may be called from any thread.
        """
        match step:
            case Release():
                return await self._release(step, progress)
            case Drain():
                await self._drain(step, progress)
            case Load():
                await self._load(step, progress)
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
                runtimes[launch.runtime].prepare(launch, progress)
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

    async def _load(self, step: Load, progress: Progress) -> None:
        target, placement = self._target_of(step), step.placement
        progress(f"loading {placement.called}")

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
