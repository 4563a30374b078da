"""What modules of this folder share; one that has a `world` or a `job` of its own says so."""

from __future__ import annotations

from collections.abc import Iterator

import docker
import pytest

from tests.integration.docker_world import IMAGE
from tests.integration.docker_world import World as DockerWorld
from tests.integration.job_world import World as JobWorld
from tests.integration.job_world import world as job_world


@pytest.fixture
def world(engine: docker.APIClient, busybox_image: str, scope: str) -> Iterator[DockerWorld]:
    """A Docker runtime in a scope of its own; `scope` removes what the test leaves."""
    assert busybox_image == IMAGE
    made = DockerWorld(scope)
    yield made
    made.runtime.close()


@pytest.fixture
def job(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    busybox_image: str,
    server_image: str,
) -> Iterator[JobWorld]:
    """A file and the command, on the real engine."""
    with job_world(tmp_path_factory.mktemp("job"), engine) as made:
        yield made
