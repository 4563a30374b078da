"""A real Podman behind Docker's API: it takes requests for GPUs and ignores them."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException
from docker.types import DeviceRequest

from tests.mock_nvml import MockGpu, MockNvml, mock_uuid
from tests.support import scopes
from tests.support.mic import Mic
from tests.support.ports import PortBlock
from tests.support.require import program
from tests.support.waiting import until

pytestmark = pytest.mark.slow

IGNORES = r"Podman [\d.]+ takes a request for a GPU and ignores it"
FILE = """
    version: 1
    models:
      a: {backend: container, image: "localhost/mic-test:latest", command: [/x]}
    gpus: {0: a}
"""


@pytest.fixture(scope="module")
def podman() -> Iterator[str]:
    """The URL of one of its own: its files are in a directory, and it sees no network."""
    found = program("podman", "podman")
    # A socket's path may have 107 characters.
    home = Path(tempfile.mkdtemp(prefix="mic-podman-", dir="/run"))
    url = f"unix://{home}/podman.sock"
    command = [
        *(program("unshare", "util-linux"), "--net", found, "--storage-driver", "vfs"),
        *("--root", str(home / "root"), "--runroot", str(home / "run")),
        *("--tmpdir", str(home / "tmp"), "--cgroup-manager", "cgroupfs"),
        *("--events-backend", "file", "system", "service", "--time", "0", url),
    ]

    def answers() -> bool:
        try:
            return docker.APIClient(url, version="auto").ping() is True
        except DockerException:
            return False

    with (home / "log").open("wb") as log:
        service = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(answers, "Podman", timeout=60)
        yield url
    finally:
        service.kill()
        service.wait()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def mic(tmp_path: Path, podman: str) -> Iterator[Mic]:
    nvml = MockNvml(tmp_path)
    nvml.set([MockGpu()])
    with closing(PortBlock()) as ports:
        made = Mic(tmp_path / "mic", scopes.new_scope(), ports)
        made.env |= {"MIC_GPU_SOURCE": "nvml", "MIC_DOCKER_HOST": podman, **nvml.env()}
        made.write(FILE)
        yield made
        made.close()


def test_podman_ignores_a_request_for_a_gpu(podman: str) -> None:
    """Why all this is needed: a newer one may do better."""
    api = docker.APIClient(podman, version="auto", timeout=60)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())
    api.import_image_from_data(tar.getvalue(), repository="localhost/mic-test")
    request = DeviceRequest(device_ids=[mock_uuid(0)], capabilities=[["gpu"]])
    host = api.create_host_config(device_requests=[request], network_mode="none")
    made = api.create_container("localhost/mic-test:latest", ["/x"], host_config=host)
    assert not api.inspect_container(made)["HostConfig"].get("DeviceRequests")
    api.remove_container(made)


def test_what_needs_a_gpu_is_blocked_with_the_way_out(mic: Mic) -> None:
    mic.run()

    def code() -> str | None:
        (row,) = mic.status()["instances"]
        return str(row["code"]) if row["phase"] == "blocked" else None

    until(lambda: code() == "gpus_ignored", "the block", timeout=60)
    blocked = rf"! blocked  a-a0000000 on GPU 0: {IGNORES}\n    hint: install Docker Engine, and "
    assert re.match(blocked, mic("plan", rc=0).stdout)


def test_doctor_says_so(mic: Mic) -> None:
    # Podman runs other programs to answer, and the machine may be busy.
    answers = re.compile(r"docker: Podman [\d.]+ \(API [\d.]+\) answers at")

    def answered() -> str:
        text = mic("doctor").stdout
        return text if answers.search(text) else ""

    lines = until(answered, "an answer", timeout=120)
    assert re.search(f"docker gpus: {IGNORES}: no model that needs one is started there", lines)
