"""The Docker runtime through the real SDK against an engine that misbehaves."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mic_supervisor.errors import (
    RuntimeRefused,
    RuntimeUnavailable,
    StopFailed,
    WorkloadGone,
)
from mic_supervisor.model import (
    ContainerSpec,
    Launch,
)
from mic_supervisor.runtimes.docker.create import labels
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.unit.runtimes.docker.engine_fake import (
    IDENTITY,
    LAUNCH,
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

OURS = {
    "Id": "c1",
    "Path": "/serve",
    "Config": {"Labels": labels(IDENTITY), "Image": "x:1"},
    "State": {"Status": "created", "StartedAt": "0001-01-01T00:00:00Z"},
}


# --- The API version --------------------------------------------------------------------------


def test_a_current_engine_is_asked_once(runtime: DockerRuntime, fake: FakeEngine) -> None:
    assert runtime.observe().error is None
    assert fake.requests == [("1.44", "GET /containers/json")]


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
        f"cannot use the Docker Engine at {fake.path}: it speaks API 1.38, and GPUs can be asked "
        "for from 1.40 on"
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
        (hang(), "the engine at {path} does not answer in time", "journalctl -u docker"),
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
            lambda h: h.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"),
            "",  # whatever it is, it is said
            "",
        ),
        (lambda h: h.send(500, b"panic: oh no\ngoroutine 1"), "panic: oh no", ""),
        (
            refuse(503, "starting"),
            "the engine at {path} is not ready (starting)",
            "journalctl -u docker",
        ),
        (
            refuse(403, "Forbidden"),
            "{path} does not allow the call (Forbidden)",
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
    began = time.monotonic()
    view = runtime.observe()
    assert time.monotonic() - began < 2
    assert (view.workloads, view.strangers) == ((), ())
    assert (view.error or "").startswith(f"cannot list containers: {cause.format(path=fake.path)}")
    assert hint in (view.hint or "")
    # And it comes back by itself.
    fake.answers["GET /containers/json"] = reply([])
    assert runtime.observe().error is None


def test_an_engine_that_restarts_between_two_calls(tmp_path: Path) -> None:
    path = tmp_path / "d.sock"
    fake = FakeEngine(path)
    runtime = DockerRuntime("s", "h", base_url=fake.url, docker_config=None, timeout=1)
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


# --- Creating and starting --------------------------------------------------------------------


def test_a_create_that_is_not_answered_leaves_nothing(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {
        "POST /containers/create": hang(1.5),
        "GET /containers/mic-mam/json": reply(OURS),
        "DELETE /containers/c1": lambda h: h.send(204, b""),
    }
    error = fails(lambda: runtime.create(LAUNCH))
    assert isinstance(error, RuntimeUnavailable)
    assert str(error).endswith("does not answer in time")
    assert fake.asked("DELETE /containers/c1") == 1


def test_a_stranger_of_the_same_name_is_never_removed(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {
        "POST /containers/create": hang(1.5),
        "GET /containers/mic-mam/json": reply({**OURS, "Config": {"Labels": {}}}),
        "DELETE /containers/c1": lambda h: h.send(204, b""),
    }
    fails(lambda: runtime.create(LAUNCH))
    assert fake.asked("DELETE /containers/c1") == 0


NAME_TAKEN = 'Conflict. The container name "/mic-mam" is already in use by container "c1".'


NO_PATH = {key: value for key, value in OURS.items() if key != "Path"}


def conflicts(fake: FakeEngine, *found: object) -> None:
    """A name that is taken, by what each of `found` says in turn; then it is free."""
    looks = [*found]

    def create(handler: Handler) -> None:
        if looks:
            handler.refuse(409, NAME_TAKEN)
        else:
            handler.send(201, b'{"Id": "c2"}')

    def look(handler: Handler) -> None:
        first = looks.pop(0)
        if first is None:
            handler.refuse(404, "No such container: mic-mam")
        else:
            reply(first)(handler)

    fake.answers |= {"POST /containers/create": create, "GET /containers/mic-mam/json": look}


def test_what_an_earlier_call_created_is_what_was_asked_for(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    """The supervisor was killed, and the engine went on with the create that it had asked for."""
    of_its_image = {"maintainer": "somebody", **labels(IDENTITY)}
    conflicts(fake, {**NO_PATH, "Config": {"Labels": of_its_image}}, {})
    runtime.create(LAUNCH)
    assert fake.asked("POST /containers/create") == 1


@pytest.mark.parametrize("state", ["removing", None])
def test_a_name_that_is_about_to_be_free_is_waited_for(
    runtime: DockerRuntime, fake: FakeEngine, state: str | None
) -> None:
    going = None if state is None else {**OURS, "State": {"Status": state}}
    conflicts(fake, going, going)
    runtime.create(LAUNCH)
    assert fake.asked("POST /containers/create") == 3


@pytest.mark.parametrize(
    ("status", "spec_hash", "who"),
    [
        ("exited", "abc", "it runs instance mam"),
        ("created", "another", "it runs instance mam"),
    ],
)
def test_what_is_not_what_would_be_created_has_its_name(
    runtime: DockerRuntime, fake: FakeEngine, status: str, spec_hash: str, who: str
) -> None:
    there = labels(replace(IDENTITY, spec_hash=spec_hash))
    conflicts(fake, {**OURS, "Config": {"Labels": there}, "State": {"Status": status}}, {})
    error = fails(lambda: runtime.create(LAUNCH))
    assert isinstance(error, RuntimeRefused)
    assert "its name is taken by container c1" in str(error)
    assert str(error).endswith(who)


def test_a_name_that_does_not_get_free_is_given_up(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    conflicts(fake, *[None] * 100)
    assert str(fails(lambda: runtime.create(LAUNCH))) == (
        "cannot create container mic-mam: another container had its name until just now"
    )


@pytest.mark.parametrize(
    "answer",
    [
        refuse(404, "No such container: c1"),
        refuse(409, "container is marked for removal and cannot be started"),
    ],
)
def test_what_is_removed_before_it_starts_is_gone(
    runtime: DockerRuntime, fake: FakeEngine, answer: Answer
) -> None:
    fake.answers["POST /containers/c1/start"] = answer
    assert isinstance(fails(lambda: runtime.restart(WORKLOAD)), WorkloadGone)
    assert isinstance(fails(lambda: runtime.start(LAUNCH)), WorkloadGone)


def starts(fake: FakeEngine, start: Answer) -> None:
    fake.answers |= {
        "GET /containers/mic-mam/json": reply(OURS),
        "POST /containers/c1/start": start,
        "DELETE /containers/c1": lambda h: h.send(204, b""),
    }


def test_no_nvidia_toolkit(runtime: DockerRuntime, fake: FakeEngine) -> None:
    starts(fake, refuse(500, 'could not select device driver "" with capabilities: [[gpu]]'))
    error = fails(lambda: runtime.start(LAUNCH))
    assert isinstance(error, RuntimeRefused)
    assert str(error) == (
        "cannot start container mic-mam: the engine cannot hand out GPUs, it has no NVIDIA "
        "Container Toolkit"
    )
    assert "nvidia-ctk runtime configure" in (error.hint or "")
    assert fake.asked("DELETE /containers/c1") == 1


def test_a_failed_start_whose_remains_stay(runtime: DockerRuntime, fake: FakeEngine) -> None:
    starts(fake, refuse(500, "no such thing"))
    fake.answers["DELETE /containers/c1"] = refuse(500, "device or resource busy")
    assert str(fails(lambda: runtime.start(LAUNCH))) == (
        "cannot start container mic-mam: no such thing; and cannot remove container mic-mam: "
        "device or resource busy"
    )


def test_a_start_that_is_not_answered_is_unknown_and_removes_nothing(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    starts(fake, hang(1.5))
    assert isinstance(fails(lambda: runtime.start(LAUNCH)), RuntimeUnavailable)
    assert fake.asked("DELETE /containers/c1") == 0


def test_gpus_by_cdi_where_the_engine_lists_them(runtime: DockerRuntime, fake: FakeEngine) -> None:
    bodies: list[dict[str, object]] = []

    def create(handler: Handler) -> None:
        bodies.append(json.loads(handler.body))
        handler.send(201, b'{"Id": "c1"}')

    fake.answers |= {
        "GET /info": reply(
            {
                "DiscoveredDevices": [
                    {"Source": "cdi", "ID": "nvidia.com/gpu=GPU-1"},
                    {"Source": "cdi", "ID": "vendor.com/nic=0"},
                ]
            }
        ),
        "POST /containers/create": create,
    }
    spec = ContainerSpec("x:1", devices=("GPU-1",))
    for _ in range(2):
        runtime.create(Launch("mic-mam", "docker", IDENTITY, spec))
    for body in bodies:
        host = body["HostConfig"]
        assert isinstance(host, dict)
        assert host["DeviceRequests"] == [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1"]}]
    # In the engine's newest version, since the field is newer than ours; and once a minute.
    assert [asked for asked in fake.requests if "info" in asked[1]] == [("1.50", "GET /info")]


def test_an_info_that_is_kept_from_us_leaves_the_older_way(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    bodies: list[bytes] = []

    def create(handler: Handler) -> None:
        bodies.append(handler.body)
        handler.send(201, b'{"Id": "c1"}')

    fake.answers |= {"GET /info": refuse(403, "Forbidden"), "POST /containers/create": create}
    spec = ContainerSpec("x:1", devices=("GPU-1",))
    runtime.create(Launch("mic-mam", "docker", IDENTITY, spec))
    (body,) = bodies
    (request,) = json.loads(body)["HostConfig"]["DeviceRequests"]
    assert (request["Driver"], request["DeviceIDs"]) == ("", ["GPU-1"])


@pytest.mark.parametrize(
    ("asked", "call"),
    [
        ("POST /containers/create", lambda r: r.create(LAUNCH)),
        ("GET /containers/mic-mam/json", lambda r: r.start(LAUNCH)),
        ("GET /containers/c1/json", lambda r: r.inspect(WORKLOAD)),
        ("POST /containers/c1/exec", lambda r: r.run_check(WORKLOAD, ("true",), 1)),
        ("POST /containers/c1/wait", lambda r: r.stop(WORKLOAD, signal="SIGTERM", grace=1)),
        ("GET /info", lambda r: r.version()),
    ],
)
@pytest.mark.parametrize("body", [[], [1], "x", None, 5])
def test_answers_of_another_shape_are_not_an_engines(
    runtime: DockerRuntime,
    fake: FakeEngine,
    asked: str,
    call: Callable[[DockerRuntime], object],
    body: object,
) -> None:
    fake.answers |= {
        "POST /containers/c1/kill": lambda h: h.send(204, b""),
        asked: reply(body),
    }
    error = fails(lambda: call(runtime))
    assert isinstance(error, RuntimeUnavailable | RuntimeRefused)


# --- Stopping ---------------------------------------------------------------------------------


def test_what_survives_kill(runtime: DockerRuntime, fake: FakeEngine) -> None:
    fake.answers |= {
        "POST /containers/c1/kill": lambda h: h.send(204, b""),
        "POST /containers/c1/wait": hang(2),
    }
    began = time.monotonic()
    error = fails(lambda: runtime.stop(WORKLOAD, signal="SIGTERM", grace=0.2))
    assert time.monotonic() - began < 1.5
    assert isinstance(error, StopFailed)
    assert str(error) == ("cannot stop container mic-mam: it is still there 0.3 s after SIGKILL")
    assert "GPU driver" in (error.hint or "")
    assert fake.asked("POST /containers/c1/kill") == 2


def test_an_engine_that_dies_while_we_wait_says_nothing_of_the_container(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {
        "POST /containers/c1/kill": lambda h: h.send(204, b""),
        "POST /containers/c1/wait": half,
    }
    error = fails(lambda: runtime.stop(WORKLOAD, signal="SIGTERM", grace=1))
    assert isinstance(error, RuntimeUnavailable)
    assert fake.asked("POST /containers/c1/kill") == 1


def test_a_removal_under_way_is_waited_for(runtime: DockerRuntime, fake: FakeEngine) -> None:
    def delete(handler: Handler) -> None:
        if fake.asked("DELETE /containers/c1") < 3:
            handler.refuse(409, "removal of container c1 is already in progress")
        else:
            handler.refuse(404, "No such container: c1")

    fake.answers["DELETE /containers/c1"] = delete
    runtime.remove(WORKLOAD)
    assert fake.asked("DELETE /containers/c1") == 3


def test_a_removal_that_does_not_end(runtime: DockerRuntime, fake: FakeEngine) -> None:
    fake.answers["DELETE /containers/c1"] = refuse(409, "removal is already in progress")
    assert str(fails(lambda: runtime.remove(WORKLOAD))) == (
        "cannot remove container mic-mam: removal is already in progress"
    )


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
        assert [one.ref for one in view.strangers] == ["c1", "c2"]
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
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {"GET /containers/json": reply([LISTED]), IMAGE: hang(1.5)}
    view = runtime.observe()
    assert (view.workloads, view.strangers) == ((), ())
    assert (view.error or "").startswith("cannot inspect image sha256:a")
    fake.answers[IMAGE] = reply({"Config": {"Labels": None}})
    assert [one.ref for one in runtime.observe().workloads] == ["c1"]


def test_a_copy_under_the_name_is_neither_started_nor_removed(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {
        "POST /containers/create": hang(1.5),
        "GET /containers/mic-mam/json": reply({**OURS, "Image": "sha256:a"}),
        "POST /containers/c1/start": lambda h: h.send(204, b""),
        "DELETE /containers/c1": lambda h: h.send(204, b""),
        IMAGE: reply(COMMITTED),
    }
    fails(lambda: runtime.create(LAUNCH))
    error = fails(lambda: runtime.start(LAUNCH))
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
