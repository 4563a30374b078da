"""The Docker runtime through the real SDK against an engine that misbehaves."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from docker.transport import UnixHTTPAdapter

from mic_supervisor.errors import RuntimeUnavailable, WorkloadGone
from mic_supervisor.model import RuntimeView
from mic_supervisor.runtimes.docker.create import labels
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.unit.runtimes.docker.engine_fake import (
    IDENTITY,
    LAUNCH,
    OURS,
    WORKLOAD,
    Answer,
    FakeEngine,
    Handler,
    fails,
    half,
    hang,
    hang_up,
    refuse,
    reply,
)

# --- The API version --------------------------------------------------------------------------


def test_a_current_engine_is_asked_once(runtime: DockerRuntime, fake: FakeEngine) -> None:
    assert runtime.observe().error is None
    assert fake.requests == [("1.44", "GET /containers/json")]


def test_podman_names_itself_in_the_head_of_its_answers(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    def podman(handler: Handler) -> None:
        handler.send_response(200)
        for name, value in (("Libpod-API-Version", "4.3.1"), ("Content-Length", "2")):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"[]")

    for answer, name in ((podman, "Podman 4.3.1"), (reply([]), None), (podman, "Podman 4.3.1")):
        fake.answers["GET /containers/json"] = answer
        view = runtime.observe()
        assert (view.error, view.ignores_gpus) == (None, name)


@pytest.mark.parametrize(
    ("speaks", "refusal"),
    [
        ("1.41", "client version {version} is too new. Maximum supported API version is {speaks}"),
        (
            "1.60",
            "client version {version} is too old. Minimum supported API version is {speaks}, "
            "please upgrade your client to a newer version",
        ),
    ],
)
def test_an_engine_that_does_not_speak_ours_is_asked_for_its_version_once(
    runtime: DockerRuntime, fake: FakeEngine, speaks: str, refusal: str
) -> None:
    fake.speaks, fake.refusal = speaks, refusal
    assert runtime.observe().error is None
    assert runtime.observe().error is None
    assert fake.requests == [
        ("1.44", "GET /containers/json"),
        ("", "GET /version"),
        (speaks, "GET /containers/json"),
        (speaks, "GET /containers/json"),
    ]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Has one lane look, with the others' work between its connection and its first byte."""
    first, over = threading.Event(), threading.Event()

    def wait(*_: object, **__: object) -> None:
        """Is called with a connection in hand, on which nothing was sent yet."""
        if not first.is_set():
            first.set()
            assert over.wait(60)

    def look(runtime: DockerRuntime, meanwhile: Callable[[], object]) -> RuntimeView:
        monkeypatch.setattr(UnixHTTPAdapter, "add_headers", wait)
        seen = lane.submit(runtime.observe)
        assert first.wait(60)
        meanwhile()
        over.set()
        return seen.result(60)

    with ThreadPoolExecutor(1) as lane:
        yield look


def test_a_lane_that_finds_the_version_leaves_the_calls_of_others_alone(
    runtime: DockerRuntime, fake: FakeEngine, late: Callable[..., RuntimeView]
) -> None:
    fake.speaks = "1.41"
    assert late(runtime, runtime.observe).error is None


def test_looks_at_many_containers_leave_the_calls_of_others_alone(
    runtime: DockerRuntime, fake: FakeEngine, late: Callable[..., RuntimeView]
) -> None:
    def inspect() -> None:
        for number in range(100):
            fake.answers[f"GET /containers/{number}/json"] = refuse(404, "No such container")
            with pytest.raises(WorkloadGone):
                runtime.inspect(replace(WORKLOAD, ref=f"{number}"))

    assert late(runtime, inspect).error is None


def test_an_engine_replaced_by_another_version(runtime: DockerRuntime, fake: FakeEngine) -> None:
    for speaks in ("1.41", "1.43"):
        fake.speaks = speaks
        assert runtime.observe().error is None


def test_every_look_is_over_a_new_connection(runtime: DockerRuntime, fake: FakeEngine) -> None:
    """An engine that is told to stop takes none, and ends its containers: what it goes on saying on
    the old ones must not be acted upon.
    """
    for count in (1, 2):
        assert runtime.observe().error is None
        assert len(fake.connections) == count


def test_an_engine_without_device_requests(runtime: DockerRuntime, fake: FakeEngine) -> None:
    fake.speaks = "1.38"
    view = runtime.observe()
    assert view.error == (
        f"cannot use the Docker Engine at {fake.path}: it speaks API 1.38, and GPUs need "
        "API 1.40 or later"
    )
    assert view.hint == "upgrade it to Docker Engine 20.10 or later"


# --- No engine, or none that answers as one ---------------------------------------------------


def test_a_socket_that_nobody_serves(tmp_path: Path) -> None:
    path = tmp_path / "d.sock"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    view = DockerRuntime("s", "h", base_url=f"unix://{path}", docker_config=None).observe()
    assert view.error == f"cannot list containers: no Docker Engine listens at {path}"
    assert (view.hint or "").startswith("start it with: systemctl start docker")


@pytest.mark.parametrize(
    ("answer", "cause", "hint"),
    [
        (hang_up, "the engine at {path} hung up in the middle of the call", "journalctl -u docker"),
        (half, "the engine at {path} hung up in the middle of the call", "journalctl -u docker"),
        (
            lambda h: h.send(200, b"<html>"),
            "what answers at {path} is not a Docker Engine",
            "check MIC_DOCKER_HOST",
        ),
        (
            reply({"hello": "world"}),
            "what answers at {path} is not a Docker Engine",
            "check MIC_DOCKER_HOST",
        ),
        (
            reply({"error": "no message"}, 400),
            "what answers at {path} is not a Docker Engine",
            "check MIC_DOCKER_HOST",
        ),
        (
            lambda h: h.send(200, b"[" * 100_000),
            "what answers at {path} is not a Docker Engine",
            "check MIC_DOCKER_HOST",
        ),
        (
            lambda h: h.send(200, b'[{"Id": ' + b"9" * 5000 + b"}]"),
            "what answers at {path} is not a Docker Engine",
            "check MIC_DOCKER_HOST",
        ),
        (
            reply([{"Id": "c1"}, None]),
            "what answers at {path} is not a Docker Engine",
            "check MIC_DOCKER_HOST",
        ),
        (
            lambda h: h.wfile.write(b"HTTP/1.1 2"),
            "what answers at {path} is not a Docker Engine",
            "check MIC_DOCKER_HOST",
        ),
        (
            lambda h: h.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"),
            "",  # whatever it is, it is said
            "",
        ),
        (lambda h: h.send(500, b"panic: oh no\ngoroutine 1"), "“panic: oh no”", ""),
        (
            refuse(503, "starting"),
            "the engine at {path} is not ready (“starting”)",
            "journalctl -u docker",
        ),
        (
            refuse(403, "Forbidden"),
            "{path} does not allow the call (“Forbidden”)",
            "socket proxy",
        ),
        (
            refuse(
                500,
                'connection error: desc = "transport: dial unix '
                '/run/containerd/containerd.sock: connect: connection refused": unavailable',
            ),
            "the engine cannot reach containerd",
            "systemctl status containerd",
        ),
    ],
)
def test_an_engine_that_cannot_be_listed_is_unknown(
    runtime: DockerRuntime, fake: FakeEngine, answer: Answer, cause: str, hint: str
) -> None:
    fake.answers["GET /containers/json"] = answer
    view = runtime.observe()
    assert (view.workloads, view.foreign_workloads) == ((), ())
    assert (view.error or "").startswith(f"cannot list containers: {cause.format(path=fake.path)}")
    assert hint in (view.hint or "")
    # And it comes back by itself.
    fake.answers["GET /containers/json"] = reply([])
    assert runtime.observe().error is None


def test_an_engine_that_hangs_is_unknown(impatient: DockerRuntime, fake: FakeEngine) -> None:
    fake.answers["GET /containers/json"] = hang()
    view = impatient.observe()
    assert (
        view.error == f"cannot list containers: the engine at {fake.path} does not answer in time"
    )
    assert "journalctl -u docker" in (view.hint or "")


def test_an_engine_that_restarts_between_two_calls(tmp_path: Path) -> None:
    path = tmp_path / "d.sock"
    fake = FakeEngine(path)
    runtime = DockerRuntime("s", "h", base_url=fake.url, docker_config=None, timeout=60.0)
    assert runtime.observe().error is None
    fake.close()
    path.unlink()
    assert "there is no Docker socket" in (runtime.observe().error or "")
    again = FakeEngine(path)
    assert runtime.observe().error is None
    again.close()


@pytest.mark.parametrize(
    "url", ["tcp://127.0.0.1:1", "tcp://host:port", "ftp://x", "http://[", "nonsense"]
)
def test_addresses_of_no_engine(url: str) -> None:
    view = DockerRuntime("s", "h", base_url=url, docker_config=None, timeout=0.5).observe()
    assert view.error is not None
    assert view.hint is not None


def test_a_broken_client_configuration_is_named(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    for text in (
        '{"auths": {"r": {"auth": "%%%"}}}',
        '{"auths": {"r": 1}}',
        '{"auths": [1]}',
        "[1]",
    ):
        (tmp_path / "config.json").write_text(text)
        runtime = DockerRuntime("s", "h", base_url=fake.url, docker_config=None)
        assert "config.json" in (runtime.observe().hint or "")


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.prepare(LAUNCH, lambda line: None),
        lambda r: r.create(LAUNCH),
        lambda r: r.start(LAUNCH),
        lambda r: r.restart(WORKLOAD),
        lambda r: r.stop(WORKLOAD, signal="SIGTERM", grace=1),
        lambda r: r.remove(WORKLOAD),
        lambda r: r.inspect(WORKLOAD),
        lambda r: list(r.logs(WORKLOAD)),
        lambda r: list(r.events(threading.Event())),
        lambda r: r.run_check(WORKLOAD, ("true",), 1),
        lambda r: r.version(),
    ],
)
def test_every_call_says_unavailable_when_there_is_no_engine(
    tmp_path: Path, call: Callable[[DockerRuntime], object]
) -> None:
    path = tmp_path / "none.sock"
    runtime = DockerRuntime("s", "h", base_url=f"unix://{path}", docker_config=None)
    error = fails(lambda: call(runtime))
    assert isinstance(error, RuntimeUnavailable)
    assert str(error).endswith(f": there is no Docker socket at {path}")
    assert str(error).startswith("cannot ")
    assert error.hint


# --- Labels that come from an image ------------------------------------------------------------

LISTED = {
    "Id": "c1",
    "Names": ["/mic-mam"],
    "ImageID": "sha256:a",
    "Labels": labels(IDENTITY),
    "State": "running",
    "Status": "Up 2 minutes",
}
COMMITTED = {"Config": {"Labels": labels(IDENTITY)}}
IMAGE = "GET /images/sha256:a/json"


def test_each_image_is_looked_at_once(runtime: DockerRuntime, fake: FakeEngine) -> None:
    others = {**LISTED, "Id": "c2", "Labels": {}, "ImageID": "sha256:b"}
    fake.answers |= {"GET /containers/json": reply([LISTED, others]), IMAGE: reply(COMMITTED)}
    for _ in range(3):
        view = runtime.observe()
        assert view.workloads == ()
        assert [one.ref for one in view.foreign_workloads] == ["c1", "c2"]
    assert fake.asked(IMAGE) == 1
    assert fake.asked("GET /images/sha256:b/json") == 0  # nothing of ours is said of it


@pytest.mark.parametrize(
    "answer",
    [refuse(404, "No such image: sha256:a"), refuse(403, "Forbidden"), reply({"Config": None})],
)
def test_an_image_that_tells_nothing_takes_no_container_away(
    runtime: DockerRuntime, fake: FakeEngine, answer: Answer
) -> None:
    fake.answers |= {"GET /containers/json": reply([LISTED]), IMAGE: answer}
    assert [one.ref for one in runtime.observe().workloads] == ["c1"]


def test_an_image_that_the_engine_does_not_tell_of_leaves_all_unknown(
    impatient: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {"GET /containers/json": reply([LISTED]), IMAGE: hang(1.5)}
    view = impatient.observe()
    assert (view.workloads, view.foreign_workloads) == ((), ())
    assert (view.error or "").startswith("cannot inspect image sha256:a")
    fake.answers[IMAGE] = reply({"Config": {"Labels": None}})
    assert [one.ref for one in impatient.observe().workloads] == ["c1"]


def test_a_copy_under_the_name_is_neither_started_nor_removed(
    impatient: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {
        "POST /containers/create": hang(1.5),
        "GET /containers/mic-mam/json": reply({**OURS, "Image": "sha256:a"}),
        "POST /containers/c1/start": lambda h: h.send(204, b""),
        "DELETE /containers/c1": lambda h: h.send(204, b""),
        IMAGE: reply(COMMITTED),
    }
    fails(lambda: impatient.create(LAUNCH))
    error = fails(lambda: impatient.start(LAUNCH))
    assert "its labels are those of its image" in str(error)
    assert fake.asked("DELETE /containers/c1") == fake.asked("POST /containers/c1/start") == 0


def test_no_two_containers_have_the_same_labels(runtime: DockerRuntime, fake: FakeEngine) -> None:
    made: list[str] = []

    def create(handler: Handler) -> None:
        made.append(json.loads(handler.body)["Labels"]["io.mic.made"])
        handler.send(201, b'{"Id": "c1"}')

    fake.answers["POST /containers/create"] = create
    for _ in range(2):
        runtime.create(LAUNCH)
    assert len({*made}) == 2
