"""The real runtime, over the real SDK, on an engine that does what a test says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.unit.runtimes.docker.engine_fake import FakeEngine


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(tmp_path / "d.sock")
    yield fake
    fake.close()


def made(fake: FakeEngine, timeout: float) -> Iterator[DockerRuntime]:
    runtime = DockerRuntime(
        "default",
        "h",
        base_url=fake.url,
        docker_config=None,
        timeout=timeout,
        work_timeout=timeout,
        kill_wait=0.3,
    )
    yield runtime
    runtime.close()


@pytest.fixture
def runtime(fake: FakeEngine) -> Iterator[DockerRuntime]:
    """It waits for an answer for longer than a busy machine takes."""
    yield from made(fake, 60.0)


@pytest.fixture
def impatient(fake: FakeEngine) -> Iterator[DockerRuntime]:
    """For an engine that does not answer, or in vain."""
    yield from made(fake, 0.5)
