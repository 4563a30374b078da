"""The components that other tests rely on do what those tests take for granted."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError

from tests.support import scopes, triton
from tests.support.triton import TritonRepository
from tests.support.waiting import http, until

pytestmark = pytest.mark.engine


@pytest.fixture
def run(engine: docker.APIClient, scope: str) -> Callable[..., str]:
    """Starts a container of this test's scope with port `inside` published, and returns its id."""

    def start(image: str, command: list[str], inside: int, port: int, **host: Any) -> str:
        config = engine.create_host_config(port_bindings={inside: ("127.0.0.1", port)}, **host)
        container = engine.create_container(
            image,
            command,
            ports=[inside],
            labels={scopes.LABEL: scope},
            host_config=config,
        )
        engine.start(container)
        return str(container["Id"])

    return start


def _exit_code(engine: docker.APIClient, container: str) -> int:
    return int(engine.inspect_container(container)["State"]["ExitCode"])


def test_model_server_does_what_it_is_told(
    engine: docker.APIClient,
    server_image: str,
    run: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    container = run(server_image, ["model-server", "--port", "9000"], 9000, port)
    until(lambda: http(f"{url}/health").status == 200, f"{url}/health")
    assert http(f"{url}/args").json() == ["--port", "9000"]
    assert http(f"{url}/health?status=503", "PUT", "sick") == (200, "")
    assert http(f"{url}/health") == (503, "sick")
    assert http(f"{url}/health", "DELETE").status == 200
    assert http(f"{url}/health") == (200, "ok")
    http(f"{url}/exit?code=3", "POST")
    engine.wait(container, timeout=60)
    assert _exit_code(engine, container) == 3


def test_model_server_ends_on_sigterm_as_pid_1(
    engine: docker.APIClient,
    server_image: str,
    run: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    port = free_port()
    container = run(server_image, ["model-server"], 8000, port)
    until(lambda: http(f"http://127.0.0.1:{port}/health").status == 200, "the server")
    begun = time.monotonic()
    engine.stop(container, timeout=20)
    assert time.monotonic() - begun < 18
    assert _exit_code(engine, container) == 0


@pytest.mark.usefixtures("device_requests")
def test_a_requested_gpu_reaches_the_container(
    engine: docker.APIClient, busybox_image: str, run: Callable[..., str]
) -> None:
    uuid = "GPU-00000000-0000-0000-0000-000000000001"
    request = docker.types.DeviceRequest(device_ids=[uuid], capabilities=[["gpu"]])
    container = run(busybox_image, ["sleep", "60"], 8000, 0, device_requests=[request])
    pid = engine.inspect_container(container)["State"]["Pid"]
    wanted = f"NVIDIA_VISIBLE_DEVICES={uuid}".encode()
    environment = Path(f"/proc/{pid}/environ")  # of runc, at first
    until(lambda: wanted in environment.read_bytes().split(b"\0"), "its environment")


def test_a_scope_is_removed_and_nothing_else(engine: docker.APIClient, busybox_image: str) -> None:
    mine, other = scopes.new_scope(), scopes.new_scope()
    made = {
        name: engine.create_container(busybox_image, labels={scopes.LABEL: name})["Id"]
        for name in (mine, other)
    }
    try:
        scopes.remove_containers(engine, mine)
        assert scopes.containers(engine, mine) == []
        assert [c["Id"] for c in scopes.containers(engine, other)] == [made[other]]
    finally:
        scopes.remove_containers(engine, other)


def test_leftovers_of_a_test_that_was_killed_are_removed(
    engine: docker.APIClient, busybox_image: str, scope: str
) -> None:
    gone = f"{scopes.PREFIX}-4194999-abcdef"  # above the kernel's highest PID, 4194304
    for name in (gone, scope):
        engine.create_container(busybox_image, labels={scopes.LABEL: name})
    scopes.remove_stale(engine)
    assert scopes.containers(engine, gone) == []
    assert len(scopes.containers(engine, scope)) == 1


@pytest.mark.triton
def test_triton_loads_infers_and_stops_within_seconds(
    engine: docker.APIClient,
    triton_image: str,
    triton_repository: TritonRepository,
    run: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    triton_repository.model("MAM")
    triton_repository.model("Broken", syntax_error=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    container = run(
        triton_image,
        [
            *["tritonserver", "--model-repository=/models", "--model-control-mode=explicit"],
            *["--id=here", "--strict-readiness=false", "--exit-timeout-secs=5"],
        ],
        8000,
        port,
        shm_size="256m",
        binds=[f"{triton_repository.path}:/models:ro"],
    )
    until(lambda: http(f"{url}/v2/health/live").status == 200, "the server")
    assert http(f"{url}/v2").json()["name"] == "here"

    body = triton.load_request(triton.model_config("MAM", count=2))
    loaded = http(f"{url}/v2/repository/models/MAM/load", "POST", body, timeout=60)
    assert loaded.status == 200, loaded.text
    config = http(f"{url}/v2/models/MAM/config").json()
    assert [(g["kind"], g["count"]) for g in config["instance_group"]] == [("KIND_CPU", 2)]

    answer = http(f"{url}/v2/models/MAM/infer", "POST", triton.infer_request(1.0, 2.5))
    assert answer.json()["outputs"][0]["data"] == [1.0, 2.5]

    body = triton.load_request(triton.model_config("Broken"))
    refused = http(f"{url}/v2/repository/models/Broken/load", "POST", body, timeout=60)
    assert refused.status != 200
    assert "SyntaxError" in refused.text

    begun = time.monotonic()
    engine.stop(container, timeout=30)
    assert time.monotonic() - begun < 28
    assert _exit_code(engine, container) == 0


def test_an_unknown_image_is_refused_not_fetched(engine: docker.APIClient) -> None:
    with pytest.raises(APIError):
        engine.create_container("mic-test/nobody-made-this:1")
