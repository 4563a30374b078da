"""Fixtures that stand for real components. One that is missing fails in CI, and skips elsewhere."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import APIError, DockerException, ImageNotFound
from docker.types import DeviceRequest
from hypothesis import settings

from tests.setup import mlserver
from tests.support import scopes, systemd
from tests.support.mic import Mic
from tests.support.ports import PortBlock
from tests.support.require import missing
from tests.support.systemd import SystemdMachine
from tests.support.triton import TritonRepository

# On a busy machine an example may take any time.
settings.register_profile("any machine", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=30)
settings.load_profile("any machine")

# A background job of a script ignores SIGINT, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests with one name, xdist runs the first alone, and says that all have passed."""
    counts = Counter(item.nodeid for item in items)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise pytest.UsageError(f"several tests have one name: {', '.join(repeated)}")


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.APIClient]:
    """The low-level client of a real Docker Engine: DOCKER_HOST's, else the default socket's."""
    try:
        client = docker.from_env(timeout=60).api
        client.ping()
    except (DockerException, OSError) as error:
        missing(f"no Docker Engine answers ({error})")
    scopes.remove_stale(client)
    yield client
    client.close()


def _image(engine: docker.APIClient, tag: str) -> str:
    try:
        engine.inspect_image(tag)  # type: ignore[no-untyped-call]
    except ImageNotFound:
        missing(f"the engine has no image {tag}")
    return tag


@pytest.fixture(scope="session")
def busybox_image(engine: docker.APIClient) -> str:
    """2 MB, starts in a tenth of a second; sh, sleep, httpd, nc."""
    return _image(engine, "mic-test/busybox:1")


@pytest.fixture(scope="session")
def python_image(engine: docker.APIClient) -> str:
    return _image(engine, "mic-test/python:1")


@pytest.fixture(scope="session")
def server_image(engine: docker.APIClient) -> str:
    """`model-server`: see mic_supervisor/demo/server.py for what it can be told."""
    return _image(engine, "mic-test/server:1")


@pytest.fixture(scope="session")
def triton_image(engine: docker.APIClient) -> str:
    """A real tritonserver 2.51 on PATH, with the python backend; no GPU: KIND_CPU only."""
    return _image(engine, "mic-test/triton:1")


@pytest.fixture(scope="session")
def systemd_image(engine: docker.APIClient) -> str:
    """systemd as PID 1; `tests.support.systemd.machine` boots it, one at a time."""
    return _image(engine, systemd.IMAGE)


@pytest.fixture(scope="module")
def systemd_machine(engine: docker.APIClient, systemd_image: str) -> Iterator[SystemdMachine]:
    """A booted machine with the project installed and mic.service not started."""
    scope = scopes.new_scope()
    with systemd.machine(engine, scope) as machine:
        machine.install()
        machine.boot()
        yield machine


@pytest.fixture(scope="session")
def mlserver_program() -> Path:
    """A real `mlserver`, which serves a model as a host process and needs no GPU."""
    found = mlserver.program()
    if found is None:
        missing("mlserver is not set up")
    return found


@pytest.fixture(scope="session")
def device_requests(engine: docker.APIClient, busybox_image: str) -> None:
    """An engine that accepts requests for GPUs, as one with the NVIDIA runtime does."""
    config = engine.create_host_config(
        device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])]
    )
    container = engine.create_container(busybox_image, ["true"], host_config=config)["Id"]
    try:
        engine.start(container)
    except APIError as error:
        missing(
            f"the engine refuses requests for GPUs ({error.explanation})",
            "stop that engine and run make test, which starts one that accepts them",
        )
    finally:
        engine.remove_container(container, force=True)


@pytest.fixture
def scope(request: pytest.FixtureRequest) -> Iterator[str]:
    """A MIC_SCOPE of this test's own; what carries it is removed afterwards, and nothing else."""
    name = scopes.new_scope()
    uses_engine = "engine" in request.fixturenames
    client = request.getfixturevalue("engine") if uses_engine else None
    yield name
    scopes.end_processes(name)
    if client is not None:
        scopes.remove_containers(client, name)


@pytest.fixture
def ports() -> Iterator[PortBlock]:
    """Ports that no other test uses now."""
    block = PortBlock()
    yield block
    block.close()


@pytest.fixture
def free_port(ports: PortBlock) -> Callable[[], int]:
    return ports.take


@pytest.fixture
def mic(tmp_path: Path, scope: str, ports: PortBlock) -> Iterator[Mic]:
    """The command in a world of its own: simulated GPUs, processes without systemd."""
    runner = Mic(tmp_path / "mic", scope, ports)
    yield runner
    runner.close()


@pytest.fixture
def triton_repository(tmp_path: Path) -> TritonRepository:
    """An empty model repository; call `.model()` on it."""
    path = tmp_path / "model_repository"
    path.mkdir()
    return TritonRepository(path)


def pytest_report_header() -> str:
    strict = "fail" if os.environ.get("CI") else "are skipped, with the reason"
    return f"components that are missing: their tests {strict}"
