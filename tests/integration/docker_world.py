"""A Docker runtime in a scope of its own, for the tests against a real engine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.errors import MicError
from mic_supervisor.model import ContainerSpec, Identity, Launch, ObservedWorkload
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.support.waiting import until

IMAGE = "mic-test/busybox:1"
GPU = "GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10"
IGNORES_TERM = ("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")


def docker(*words: str) -> str:
    return subprocess.run(
        ["docker", *words], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def runtime(scope: str, docker_config: Path | None = None) -> DockerRuntime:
    return DockerRuntime(
        scope, "host1", base_url=os.environ.get("DOCKER_HOST"), docker_config=docker_config
    )


class World:
    """A runtime in a scope of its own, and launches for it."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.runtime = runtime(scope)

    def launch(self, instance: str = "a", **fields: Any) -> Launch:
        fields = {"image": IMAGE, "command": ("sleep", "100000"), **fields}
        identity = Identity(
            scope=self.scope,
            host="host1",
            instance=instance,
            model="MAM",
            backend="container",
            gpus=(GPU,),
            ports={"http": 20000},
            spec={"image": IMAGE, "note": "höhe"},
            spec_hash="abc123",
        )
        name = f"mic-{self.scope}-{instance}-abc12345"
        return Launch(name, "docker", identity, ContainerSpec(**fields))

    def ours(self) -> tuple[ObservedWorkload, ...]:
        view = self.runtime.observe()
        assert view.error is None
        return view.workloads

    def one(self) -> ObservedWorkload:
        (workload,) = self.ours()
        return workload

    def up(self, instance: str = "a", **fields: Any) -> ObservedWorkload:
        launch = self.launch(instance, **fields)
        self.runtime.create(launch)
        self.runtime.start(launch)
        return next(w for w in self.ours() if w.name == launch.name)

    def logged(self, workload: ObservedWorkload, line: str) -> None:
        until(lambda: line in list(self.runtime.logs(workload)), "the line in the log")


def refused(call: Callable[[], object]) -> MicError:
    with pytest.raises(MicError) as caught:
        call()
    return caught.value


def environ_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
