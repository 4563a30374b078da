"""Pulling into a real engine, from a small registry of our own."""

from __future__ import annotations

import base64
import concurrent.futures
import gzip
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mic_supervisor.errors import (
    PreflightFailed,
    Withdrawn,
)
from tests.integration.docker_world import (
    IMAGE,
    World,
    docker,
    refused,
    runtime,
)
from tests.support.waiting import until

pytestmark = pytest.mark.engine


class Registry:
    """The read half of the OCI distribution API, with one image and, if asked for, a password."""

    def __init__(self, password: str | None = None, slow: float = 0.0) -> None:
        self.requests: list[str] = []
        self.gone = False
        blob = os.urandom(3 << 20)
        tree = io.BytesIO()
        with tarfile.open(fileobj=tree, mode="w") as tar:
            member = tarfile.TarInfo("blob")
            member.size = len(blob)
            tar.addfile(member, io.BytesIO(blob))
        layer = gzip.compress(tree.getvalue(), 1)
        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [digest(tree.getvalue())]},
            }
        ).encode()
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": kind,
                "config": {
                    "mediaType": "application/vnd.docker.container.image.v1+json",
                    "size": len(config),
                    "digest": digest(config),
                },
                "layers": [
                    {
                        "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                        "size": len(layer),
                        "digest": digest(layer),
                    }
                ],
            }
        ).encode()
        registry = self
        self.go = threading.Event()  # until then a layer stays as it is
        self.go.set()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                registry.requests.append(f"{self.command} {self.path}")
                expected = "Basic " + base64.b64encode(f"me:{password}".encode()).decode()
                if password is not None and self.headers.get("Authorization") != expected:
                    self.answer(401, b"{}", {"WWW-Authenticate": 'Basic realm="r"'})
                elif self.path == "/v2/":
                    self.answer(200, b"{}")
                elif self.path.startswith("/v2/m/manifests/") and not self.path.endswith("nope"):
                    self.answer(200, manifest, {"Content-Type": kind})
                elif self.path == f"/v2/m/blobs/{digest(config)}":
                    self.answer(200, config)
                elif self.path == f"/v2/m/blobs/{digest(layer)}":
                    self.answer(200, layer)
                else:
                    error = {
                        "errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]
                    }
                    self.answer(404, json.dumps(error).encode())

            do_HEAD = do_GET

            def answer(self, status: int, body: bytes, headers: dict[str, str] = {}) -> None:  # noqa: B006
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Docker-Distribution-API-Version", "registry/2.0")
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    for start in range(0, len(body), 1 << 19):
                        if start and len(body) > 1 << 20:
                            registry.go.wait(60)
                        self.wfile.write(body[start : start + (1 << 19)])
                        if slow and len(body) > 1 << 20:
                            time.sleep(slow)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.image = f"{self.host}/m:1"
        self.layer = f"GET /v2/m/blobs/{digest(layer)}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for ref in docker("images", "-q", f"{self.host}/m").split():
            docker("rmi", "-f", ref)


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry(slow=0.15)
    yield registry
    registry.close()


@pytest.fixture
def private() -> Iterator[Registry]:
    registry = Registry(password="s3cret-word")
    yield registry
    registry.close()


def test_one_pull_for_all_lanes_with_progress(world: World, registry: Registry) -> None:
    launches = [world.launch(f"i{n}", image=registry.image) for n in range(4)]
    shown: dict[str, list[str]] = {launch.name: [] for launch in launches}
    registry.go.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = [pool.submit(world.runtime.prepare, x, shown[x.name].append) for x in launches]
        until(lambda: all(shown.values()), "all to wait for one pull")
        registry.go.set()
        for one in made:
            one.result()
    assert registry.requests.count(registry.layer) == 1
    assert docker("images", "-q", registry.image)
    assert all(shown.values())
    longest = max(shown.values(), key=len)
    assert longest[0] == f"pulling {registry.image}"
    assert longest[-1] == f"pulled {registry.image}"
    percents = [int(line.split()[-2]) for line in longest if line.endswith("%")]
    assert percents == sorted(percents)
    assert len(percents) > 1
    # It is there now: no pull, no word.
    world.runtime.prepare(launches[0], pytest.fail)


def test_a_pull_that_is_given_up(world: World, registry: Registry) -> None:
    launch = world.launch("i", image=registry.image)

    def give_up(text: str) -> None:
        if text.endswith("%"):
            raise Withdrawn("gave up")

    registry.go.clear()
    with pytest.raises(Withdrawn):
        world.runtime.prepare(launch, give_up)
    assert not docker("images", "-q", registry.image)
    registry.go.set()
    world.runtime.prepare(launch, lambda _: None)  # nobody waits for the one before
    assert docker("images", "-q", registry.image)


def test_a_tag_that_the_registry_lacks(world: World, registry: Registry) -> None:
    image = f"{registry.host}/m:nope"
    error = refused(lambda: world.runtime.prepare(world.launch(image=image), lambda line: None))
    assert isinstance(error, PreflightFailed)
    assert str(error) == f"cannot pull {image}: {registry.host} has no such image or tag"
    assert error.hint == "check the image's name and tag in gpus.yaml"


def test_a_private_registry(
    world: World, private: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    launch = world.launch(image=private.image)
    error = refused(lambda: world.runtime.prepare(launch, lambda line: None))
    assert isinstance(error, PreflightFailed)
    assert str(error) == (
        f"cannot pull {private.image}: {private.host} gives no access to it, or has no such image"
    )
    assert f"docker login {private.host}" in (error.hint or "")

    def config(password: str) -> None:
        auth = base64.b64encode(f"me:{password}".encode()).decode()
        text = json.dumps({"auths": {private.host: {"auth": auth}}})
        (tmp_path / "config.json").write_text(text)

    for place in (tmp_path, tmp_path / "config.json"):
        other = runtime(world.scope, place)
        config("wrong-word")
        error = refused(lambda: other.prepare(launch, lambda line: None))  # noqa: B023
        assert "gives no access to it" in str(error)
        config("s3cret-word")
        other.prepare(launch, lambda line: None)
        docker("rmi", "-f", private.image)
    text = caplog.text + str(error) + str(error.hint)
    for secret in ("s3cret-word", "wrong-word", base64.b64encode(b"me:s3cret-word").decode()):
        assert secret not in text


def test_credentials_from_a_helper(
    world: World, private: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-test"
    answer = json.dumps({"ServerURL": "x", "Username": "me", "Secret": "s3cret-word"})
    helper.write_text(f"#!/bin/sh\n[ \"$1\" = get ] && cat > {tmp_path}/asked && echo '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {private.host: "test"}}))
    other = runtime(world.scope, tmp_path)
    other.prepare(world.launch(image=private.image), lambda line: None)
    assert (tmp_path / "asked").read_text() == private.host


def test_a_helper_needs_the_home_that_systemd_does_not_set(
    world: World, private: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-home"
    answer = json.dumps({"ServerURL": "x", "Username": "me", "Secret": "s3cret-word"})
    nothing = "echo credentials not found; echo no token in /there >&2; exit 1"
    helper.write_text(f"#!/bin/sh\n[ -d \"$HOME\" ] || {{ {nothing}; }}\necho '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("HOME")
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {private.host: "home"}}))
    other = runtime(world.scope, tmp_path)
    launch = world.launch(image=private.image)
    other.prepare(launch, lambda line: None)
    docker("rmi", "-f", private.image)
    monkeypatch.setenv("HOME", f"{tmp_path}/none")
    error = refused(lambda: other.prepare(launch, lambda line: None))
    assert "it went out without credentials: docker-credential-home is configured" in str(error)
    assert str(error).endswith("and gives none: “no token in /there”")


def test_a_registry_that_is_not_there(world: World, free_port: Callable[[], int]) -> None:
    image = f"127.0.0.1:{free_port()}/x:1"
    error = refused(lambda: world.runtime.prepare(world.launch(image=image), lambda line: None))
    assert isinstance(error, PreflightFailed)
    assert str(error).startswith(f"cannot pull {image}: {image[:-4]} cannot be reached (")
    assert "connection refused" in str(error)


def test_what_cannot_be_pulled(world: World) -> None:
    for image, cause in (
        ("sha256:" + "0" * 64, "it is the id of an image that is not on this machine"),
        ("Bad/Name:1", "that is not the name of an image"),
    ):
        launch = world.launch(image=image)
        error = refused(lambda: world.runtime.prepare(launch, lambda line: None))  # noqa: B023
        assert isinstance(error, PreflightFailed)
        assert str(error) == f"cannot pull {image}: {cause}"


def test_an_image_by_id_that_is_there(world: World) -> None:
    ref = docker("images", "-q", "--no-trunc", IMAGE)
    world.runtime.prepare(world.launch(image=ref), pytest.fail)
    world.up(image=ref)
