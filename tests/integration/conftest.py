"""What modules of this folder share; one that has a `world` or a `job` of its own says so."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import ImageNotFound

from tests.integration.docker_world import IMAGE
from tests.integration.docker_world import World as DockerWorld
from tests.integration.engine_proxy import EngineProxy, engine_proxy
from tests.integration.job_world import World as JobWorld
from tests.integration.job_world import world as job_world
from tests.support import systemd
from tests.support.require import missing

# The longest first, for workers that take a module at a time (`--no-loadscope-reorder`): what
# takes a minute and comes last keeps one of them busy alone. There is one machine with systemd at a
# time, so that two modules with one are far from each other.
FIRST = (
    "test_chaos",
    "test_systemd_runtime",
    "test_demo",
    "test_starts_killed",
    "test_main_job_changes",
    "test_pause_and_target",
    "test_systemd_service",
    "test_broken_engine",
    "test_start_stop",
    "test_triton_ways",
    "test_plug_ins",
    "test_systemd_daemon",
    "test_common_keys",
    "test_comfyui",
    "test_broken_starts",
    "test_ownership",
    "test_packages",
    "test_broken_state",
    "test_endpoints",
    "test_main_job_cli",
    "test_watch_file",
    "test_six_commands",
    "test_daemon_control",
    "test_http_schema",
    "test_who_may",
    "test_broken_records",
    "test_operator_on_systemd",
    "test_who_may",
    "test_page_browser",
    "test_daemon_ends",
    "test_set_clock",
    "test_daemon_outage",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def world(engine: docker.APIClient, busybox_image: str, scope: str) -> Iterator[DockerWorld]:
    """A Docker runtime in a scope of its own; `scope` removes what the test leaves."""
    assert busybox_image == IMAGE
    made = DockerWorld(scope)
    yield made
    made.runtime.close()


@pytest.fixture(
    scope="module",
    params=[(systemd.IMAGE, "3.11"), ("mic-test/trixie:1", "3.13")],
    ids=["Debian 12", "Debian 13"],
)
def debian(request: pytest.FixtureRequest, engine: docker.APIClient) -> tuple[str, str]:
    """An image in which systemd runs, and the Python that a package for it is made for."""
    image, python = request.param
    try:
        engine.inspect_image(image)  # type: ignore[no-untyped-call]
    except ImageNotFound:
        missing(f"the engine has no image {image}")
    return image, python


@pytest.fixture
def proxy() -> Iterator[EngineProxy]:
    """Between a program and the real engine, for what an engine does not do on demand."""
    # A socket's path may have 107 characters, and pytest's own may be longer.
    with (
        tempfile.TemporaryDirectory(prefix="mic-") as directory,
        engine_proxy(Path(directory)) as made,
    ):
        yield made


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
