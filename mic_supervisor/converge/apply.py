"""Executes the steps of a plan: one call each, no decisions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from mic_supervisor.backends import Backend
from mic_supervisor.converge import probes
from mic_supervisor.converge.http_client import NoAnswer
from mic_supervisor.converge.observe import Sources
from mic_supervisor.converge.probes import Target
from mic_supervisor.errors import LoadFailed, MicError, ReleaseFailed, StopFailed
from mic_supervisor.model import GpuInventory, LoadState, RuntimeView
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
    Unload,
)
from mic_supervisor.plan.release import Refused, Released, judge
from mic_supervisor.runtimes import Progress, Runtime

_RELEASE_LOOK = 0.05  # seconds between two looks at GPUs that are about to be free
_VERIFY_TIMEOUT = 10.0  # seconds, from the answer to a load until the server says it runs it
_LOG_LINES = 400
_SILENT = 3  # calls without an answer, in a row, after which nobody is waited for


class Steps:
    """Runs steps, blocking, from one thread per lane.

    `target_of` finds the instance and the backend for a workload that is to be talked to,
    `backend` a backend by its name.
    """

    def __init__(
        self,
        sources: Sources,
        target_of: Callable[[Load | Unload], Target],
        backend: Callable[[str], Backend],
    ) -> None:
        self._sources = sources
        self._target_of = target_of
        self._backend = backend
        self._ending = threading.Event()

    def end(self) -> None:
        """Have done with waiting for others' work: a drain under way fails, and nothing stops."""
        self._ending.set()

    def run(self, step: Step, progress: Progress) -> Released | None:
        """Do it. Raises MicError in words for the operator. Of a Release: what it found."""
        if isinstance(step, Prepare):
            self._runtime(step.launch.runtime).prepare(step.launch, progress)
        elif isinstance(step, Create):
            self._runtime(step.launch.runtime).create(step.launch)
        elif isinstance(step, Start):
            self._runtime(step.launch.runtime).start(step.launch)
        elif isinstance(step, Restart):
            self._runtime(step.workload.runtime).restart(step.workload)
        elif isinstance(step, Stop):
            runtime = self._runtime(step.workload.runtime)
            runtime.stop(step.workload, signal=step.signal, grace=step.grace)
        elif isinstance(step, Remove):
            self._runtime(step.workload.runtime).remove(step.workload)
        elif isinstance(step, Release):
            return self._release(step, progress)
        elif isinstance(step, Drain):
            self._drain(step, progress)
        elif isinstance(step, Load):
            self._load(step, progress)
        elif isinstance(step, Unload):
            self._unload(step)
        else:
            raise AssertionError(f"unknown step {step!r}")
        return None

    def _runtime(self, name: str) -> Runtime:
        return self._sources.runtimes[name]

    def _release(self, step: Release, progress: Progress) -> Released:
        """Until the GPUs are free, as plan/release.py judges each look at them."""
        began = time.monotonic()
        clear_since: float | None = None
        told = ""
        while True:
            inventory = self._with_former(step)
            now = time.monotonic()
            for_memory = None if clear_since is None else now - clear_since
            verdict = judge(step.gpus, step.floors, step.vram, inventory, now - began, for_memory)
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
            if verdict.reason != told:
                progress(verdict.reason)
                told = verdict.reason
            time.sleep(_RELEASE_LOOK)

    def _with_former(self, step: Release) -> GpuInventory:
        from mic_supervisor.gpu.owners import annotate, managed_refs

        views = [RuntimeView(item.runtime, (item,)) for item in step.former]
        return annotate(self._sources.gpus.observe(), managed_refs(views))

    def _drain(self, step: Drain, progress: Progress) -> None:
        """A drain that runs out of time ends; the stop that follows is then a hard one."""
        identity = step.workload.identity
        try:
            backend, port = self._backend(identity.backend), identity.ports["http"]
        except (MicError, KeyError) as error:
            progress(f"it cannot be drained ({error}); stopping it all the same")
            return
        deadline = time.monotonic() + step.timeout
        progress("draining")
        silent, told = 0, ""
        while (left := deadline - time.monotonic()) > 0:
            call = replace(step.call, timeout=min(step.call.timeout, left))
            try:
                answer = probes.send(step.listen, port, call)
            except NoAnswer as error:
                silent += 1
                # Who has gone has nothing to finish for anyone; who is only slow may have.
                if error.refused or silent == _SILENT:
                    return
            else:
                silent = 0
                try:
                    if backend.is_drained(answer.status, answer.body):
                        return
                except MicError as error:
                    # Whether requests are in flight is unknown, which is not that there are none.
                    if told != error.message:
                        told = error.message
                        progress(f"{told}; waiting")
            if self._ending.wait(0.25):
                raise StopFailed(
                    f"cannot stop {step.instance}: it was still being drained when this "
                    "supervisor ended",
                    hint="the next one begins again",
                )
        progress(f"still busy after {step.timeout:g} s; stopping it all the same")

    def _load(self, step: Load, progress: Progress) -> None:
        target, placement = self._target_of(step), step.placement
        progress(f"loading {placement.model}")
        try:
            answer = probes.call(target, placement.load)
        except NoAnswer as error:
            raise LoadFailed(
                f"cannot load {placement.model}: {error}",
                hint=f"see `mic-supervisor logs {step.instance}`",
            ) from error
        if not answer.ok:
            raise LoadFailed(
                f"cannot load {placement.model}: "
                + target.backend.load_failure(answer.body, self._log(step), placement.model),
                hint=f"see `mic-supervisor logs {step.instance}`",
            )
        deadline = time.monotonic() + _VERIFY_TIMEOUT
        while True:
            state = probes.placement_state(target, placement)
            if state.state is LoadState.LOADED and state.digest == placement.digest:
                return
            if time.monotonic() >= deadline:
                runs = ", ".join(f"{key}={value}" for key, value in state.summary)
                raise LoadFailed(
                    f"cannot load {placement.model}: the server took the configuration and runs "
                    f"another one ({runs or state.reason or state.state.value})",
                    hint=f"see `mic-supervisor logs {step.instance}`",
                )
            time.sleep(0.1)

    def _unload(self, step: Unload) -> None:
        try:
            answer = probes.call(self._target_of(step), step.placement.unload)
        except NoAnswer as error:
            raise LoadFailed(f"cannot unload {step.placement.model}: {error}") from error
        if not answer.ok:
            raise LoadFailed(f"cannot unload {step.placement.model}: {answer.body[:300]}")

    def _log(self, step: Load) -> list[str]:
        runtime = self._runtime(step.workload.runtime)
        try:
            return list(runtime.logs(step.workload, tail=_LOG_LINES))
        except MicError:
            return []  # the server's own words still tell something; the log only adds to them
