"""What a real engine refuses, in words, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.errors import (
    PreflightFailed,
    RuntimeRefused,
)
from mic_supervisor.model import (
    Limits,
    Mount,
    Port,
    ProcessSpec,
    RunState,
)
from tests.integration.docker_world import (
    IMAGE,
    World,
    docker,
    refused,
)

pytestmark = pytest.mark.engine


def test_a_missing_program_is_found_before_anything_starts(world: World) -> None:
    launch = world.launch(command=("nosuch", "--flag"))
    error = refused(lambda: world.runtime.create(launch))
    assert isinstance(error, RuntimeRefused)
    assert str(error) == f"cannot create container {launch.name}: the image has no program nosuch"
    assert error.hint == "check the command and the entrypoint"
    assert world.ours() == ()


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"command": ("/opt/serve",)}, "the image has no program /opt/serve"),
        ({"command": ("/bin",)}, "/bin in the image is not an executable file"),
        ({"command": ("/etc/passwd",)}, "/etc/passwd in the image is not an executable file"),
        (
            {"command": ("x",), "entrypoint": ("./here",), "working_dir": "/bin"},
            "the image has no program ./here",
        ),
        ({"command": ("sh",), "env": (("PATH", "/nowhere"),)}, "the image has no program sh"),
    ],
)
def test_programs_that_cannot_run(world: World, fields: dict[str, Any], cause: str) -> None:
    launch = world.launch(**fields)
    error = refused(lambda: world.runtime.create(launch))
    assert str(error) == f"cannot create container {launch.name}: {cause}"
    assert world.ours() == ()


def test_a_program_below_a_mount_is_left_to_the_start(world: World, tmp_path: Path) -> None:
    script = tmp_path / "serve"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    world.up(command=("/opt/serve",), mounts=(Mount(str(tmp_path), "/opt"),))
    assert world.one().state is RunState.RUNNING


def test_a_relative_program_in_the_working_directory(world: World) -> None:
    world.up(command=("./sleep", "60"), working_dir="/bin")
    assert world.one().state is RunState.RUNNING


def test_a_port_held_by_a_container(world: World, free_port: Callable[[], int]) -> None:
    port = free_port()
    world.up("a", ports=(Port("http", port, 80),))
    launch = world.launch("b", ports=(Port("http", port, 80),))
    world.runtime.create(launch)
    error = refused(lambda: world.runtime.start(launch))
    assert isinstance(error, RuntimeRefused)
    assert str(error) == (
        f"cannot start container {launch.name}: "
        f"port {port} on 127.0.0.1 is already taken by a container"
    )
    assert error.hint == f"see which: docker ps --filter publish={port}"
    assert [w.identity.instance for w in world.ours()] == ["a"]


def test_a_port_held_by_a_process(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        launch = world.launch(ports=(Port("http", port, 80),))
        world.runtime.create(launch)
        error = refused(lambda: world.runtime.start(launch))
    assert str(error) == (
        f"cannot start container {launch.name}: port {port} on 127.0.0.1 is already taken"
    )
    assert error.hint == f"see by whom: ss -ltnp 'sport = :{port}'"
    assert world.ours() == ()


def test_an_address_of_another_machine(world: World, free_port: Callable[[], int]) -> None:
    launch = world.launch(ports=(Port("http", free_port(), 80),), listen="192.0.2.7")
    world.runtime.create(launch)
    error = refused(lambda: world.runtime.start(launch))
    assert str(error) == (
        f"cannot start container {launch.name}: 192.0.2.7 is not an address of this machine"
    )
    assert world.ours() == ()


def test_an_unknown_user(world: World) -> None:
    launch = world.launch(user="bob")
    world.runtime.create(launch)
    error = refused(lambda: world.runtime.start(launch))
    assert str(error) == f"cannot start container {launch.name}: the image has no user bob"
    assert world.ours() == ()


def test_a_failed_restart_keeps_the_container(world: World, free_port: Callable[[], int]) -> None:
    port = free_port()
    workload = world.up(ports=(Port("http", port, 80),))
    world.runtime.stop(workload, signal="SIGKILL", grace=0)
    with socket.create_server(("127.0.0.1", port)):
        error = refused(lambda: world.runtime.restart(workload))
        assert f"port {port} on 127.0.0.1 is already taken" in str(error)
        # `start` of what ran before (a rollback) keeps it as well.
        refused(lambda: world.runtime.start(world.launch(ports=(Port("http", port, 80),))))
    assert world.one().ref == workload.ref
    world.runtime.restart(workload)
    assert world.one().state is RunState.RUNNING


def test_a_mount_that_is_not_there(world: World, tmp_path: Path) -> None:
    missing = tmp_path / "gone"
    launch = world.launch(mounts=(Mount(str(missing), "/x"), Mount(str(tmp_path), "/y")))
    error = refused(lambda: world.runtime.prepare(launch, pytest.fail))
    assert isinstance(error, PreflightFailed)
    assert str(error) == f"cannot prepare {launch.name}: the mount source {missing} does not exist"
    assert error.hint == f"create it with: mkdir -p {missing}"
    error = refused(lambda: world.runtime.create(launch))
    assert isinstance(error, RuntimeRefused)
    assert str(error) == (
        f"cannot create container {launch.name}: the mount source {missing} does not exist"
    )
    assert not missing.exists()
    assert world.ours() == ()


def test_a_mount_that_goes_away_between_create_and_start(world: World, tmp_path: Path) -> None:
    source = tmp_path / "models"
    source.mkdir()
    launch = world.launch(mounts=(Mount(str(source), "/x"),))
    world.runtime.create(launch)
    source.rmdir()
    error = refused(lambda: world.runtime.start(launch))
    assert str(source) in str(error)
    assert not source.exists()
    assert world.ours() == ()


def test_an_image_that_is_not_there(world: World) -> None:
    launch = world.launch(image="mic-test/nosuch:1")
    error = refused(lambda: world.runtime.create(launch))
    assert str(error) == (
        f"cannot create container {launch.name}: the image mic-test/nosuch:1 is not on this machine"
    )
    assert world.ours() == ()


@pytest.mark.parametrize(
    ("limits", "cause"),
    [
        (Limits(memory=1 << 20), "Minimum memory limit allowed is 6MB"),
        (Limits(cpus=4096), "Range of CPUs is from 0.01 to"),
    ],
)
def test_limits_that_the_engine_does_not_take(world: World, limits: Limits, cause: str) -> None:
    error = refused(lambda: world.runtime.create(world.launch(limits=limits)))
    assert isinstance(error, RuntimeRefused)
    assert cause in str(error)
    assert world.ours() == ()


def test_a_name_that_a_foreign_container_has(world: World) -> None:
    launch = world.launch()
    # The scope's label, on a container of no supervisor, so that the fixture removes it.
    ref = docker(
        "create", "--name", launch.name, "--label", f"io.mic.scope={world.scope}", IMAGE, "sh"
    )
    error = refused(lambda: world.runtime.create(launch))
    assert str(error) == (
        f"cannot create container {launch.name}: its name is taken by container {ref[:12]}, "
        f"image {IMAGE}: it has no labels of ours"
    )
    error = refused(lambda: world.runtime.start(launch))
    assert str(error) == (
        f"cannot start container {launch.name}: the container of that name is not ours "
        f"({ref[:12]}, image {IMAGE}: it has no labels of ours)"
    )
    assert docker("inspect", "-f", "{{.State.Status}}", ref) == "created"


def test_a_name_that_is_ours_already(world: World) -> None:
    workload = world.up()
    error = refused(lambda: world.runtime.create(world.launch()))
    assert "it runs instance a" in str(error)
    assert world.one() == dataclasses.replace(workload)


def test_starting_what_was_not_created(world: World) -> None:
    launch = world.launch()
    assert str(refused(lambda: world.runtime.start(launch))) == (
        f"cannot start container {launch.name}: it does not exist"
    )


def test_a_process_is_none_of_dockers_business(world: World) -> None:
    launch = dataclasses.replace(world.launch(), spec=ProcessSpec(("sleep", "1")))
    for call in (
        lambda: world.runtime.create(launch),
        lambda: world.runtime.prepare(launch, pytest.fail),
    ):
        assert "Docker runs containers, not processes" in str(refused(call))
