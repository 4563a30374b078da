"""Containers of a Docker Engine: `runtime.DockerRuntime`; and no Docker by choice: `DockerOff`.

This file loads no SDK: where Docker is switched off (MIC_DOCKER_HOST=none), nothing needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from mic_supervisor.errors import PreflightFailed, RuntimeRefused
from mic_supervisor.model import Launch, ObservedWorkload, RuntimeView
from mic_supervisor.runtimes import Progress

REASON = "Docker is switched off (MIC_DOCKER_HOST=none)"
HINT = "set MIC_DOCKER_HOST to an engine's address, or unset it"


class DockerOff:
    """Known to run nothing, where an engine that does not answer runs nobody knows what.

    Fits the protocol `Runtime`. The planner reads `RuntimeView.off` and asks for nothing; a call
    that comes all the same is refused.
    """

    name = "docker"
    creates_ahead = True

    def observe(self) -> RuntimeView:
        return RuntimeView(self.name, off=REASON, hint=HINT)

    def prepare(self, launch: Launch, progress: Progress) -> None:  # noqa: ARG002
        raise PreflightFailed(f"cannot run {launch.name}: {REASON}", hint=HINT)

    def create(self, launch: Launch) -> None:
        _refuse(f"cannot create {launch.name}")

    def start(self, launch: Launch) -> None:
        _refuse(f"cannot start {launch.name}")

    def restart(self, workload: ObservedWorkload) -> None:
        _refuse(f"cannot start {workload.name}")

    def stop(self, workload: ObservedWorkload, **_how: Any) -> None:
        # Success would say that it is gone.
        _refuse(f"cannot stop {workload.name}")

    def remove(self, workload: ObservedWorkload) -> None:
        _refuse(f"cannot remove {workload.name}")

    def logs(self, workload: ObservedWorkload, **_options: Any) -> Iterator[str]:
        _refuse(f"cannot read the log of {workload.name}")

    previous_logs = logs

    def run_check(self, workload: ObservedWorkload, *_check: Any, **_as: Any) -> tuple[int, str]:
        _refuse(f"cannot run a check in {workload.name}")

    def events(self, stop: threading.Event) -> Iterator[str]:
        """None ever comes; it ends when `stop` is set."""
        stop.wait()
        return iter(())

    def close(self) -> None:
        pass


def _refuse(what: str) -> NoReturn:
    raise RuntimeRefused(f"{what}: {REASON}", hint=HINT)
