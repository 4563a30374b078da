"""Creating, starting and ending containers, through the real SDK, on an engine that misbehaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from mic_supervisor.errors import RuntimeRefused, RuntimeUnavailable, StopFailed, WorkloadGone
from mic_supervisor.model import ContainerSpec, Launch
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
    refuse,
    reply,
)

# --- Creating and starting --------------------------------------------------------------------


def test_a_create_that_is_not_answered_leaves_nothing(
    impatient: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {
        "POST /containers/create": hang(1.5),
        "GET /containers/mic-mam/json": reply(OURS),
        "DELETE /containers/c1": lambda h: h.send(204, b""),
    }
    error = fails(lambda: impatient.create(LAUNCH))
    assert isinstance(error, RuntimeUnavailable)
    assert str(error).endswith("does not answer in time")
    assert fake.asked("DELETE /containers/c1") == 1


def test_a_foreign_container_of_the_same_name_is_never_removed(
    impatient: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers |= {
        "POST /containers/create": hang(1.5),
        "GET /containers/mic-mam/json": reply({**OURS, "Config": {"Labels": {}}}),
        "DELETE /containers/c1": lambda h: h.send(204, b""),
    }
    fails(lambda: impatient.create(LAUNCH))
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
    impatient: DockerRuntime, fake: FakeEngine
) -> None:
    conflicts(fake, *[None] * 100)
    assert str(fails(lambda: impatient.create(LAUNCH))) == (
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
        "cannot start container mic-mam: “no such thing”; and cannot remove container mic-mam: "
        "“device or resource busy”"
    )


def test_a_start_that_is_not_answered_is_unknown_and_removes_nothing(
    impatient: DockerRuntime, fake: FakeEngine
) -> None:
    starts(fake, hang(1.5))
    assert isinstance(fails(lambda: impatient.start(LAUNCH)), RuntimeUnavailable)
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


def test_what_survives_kill(impatient: DockerRuntime, fake: FakeEngine) -> None:
    fake.answers |= {
        "POST /containers/c1/kill": lambda h: h.send(204, b""),
        "POST /containers/c1/wait": hang(2),  # and then hangs up, which is another error
    }
    error = fails(lambda: impatient.stop(WORKLOAD, signal="SIGTERM", grace=0.2))
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


def test_a_removal_that_does_not_end(impatient: DockerRuntime, fake: FakeEngine) -> None:
    fake.answers["DELETE /containers/c1"] = refuse(409, "removal is already in progress")
    assert str(fails(lambda: impatient.remove(WORKLOAD))) == (
        "cannot remove container mic-mam: “removal is already in progress”"
    )
