"""The life of a container against a real engine, and what is seen of it."""

from __future__ import annotations

import concurrent.futures
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
)
from mic_supervisor.model import (
    Limits,
    Mount,
    Near,
    Port,
    RunState,
)
from mic_supervisor.runtimes import Runtime
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.integration.docker_world import (
    GPU,
    IGNORES_TERM,
    IMAGE,
    World,
    docker,
    environ_of,
    refused,
    runtime,
)
from tests.support.waiting import until

pytestmark = pytest.mark.engine


# --- A container's life --------------------------------------------------------------------------


def test_fits_the_protocol(world: World) -> None:
    runtime: Runtime = world.runtime
    assert (runtime.name, runtime.creates_ahead) == ("docker", True)


def test_it_runs_on_the_cpus_and_the_memory_next_to_its_gpus_alone(world: World) -> None:
    launch = replace(world.launch(), near=Near((0,), (0,)))
    world.runtime.create(launch)
    world.runtime.start(launch)
    pid = docker("inspect", "-f", "{{.State.Pid}}", world.one().ref)
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Cpus_allowed_list:\t0\n" in status
    assert "Mems_allowed_list:\t0\n" in status


def test_life_from_create_to_remove(world: World) -> None:
    command = ("sh", "-c", "echo up; exec sleep 100000")
    launch = world.launch(command=command, stop_signal="SIGINT", stop_timeout=3.5)
    world.runtime.prepare(launch, pytest.fail)
    world.runtime.create(launch)
    created = world.one()
    assert (created.name, created.state, created.exit_code) == (
        launch.name,
        RunState.CREATED,
        None,
    )
    assert created.identity == launch.identity
    assert created.address is None

    world.runtime.start(launch)
    running = world.one()
    assert (running.ref, running.state) == (created.ref, RunState.RUNNING)
    assert running.pid is None
    assert running.address is not None
    assert running.address.count(".") == 3
    assert abs((running.created_at or 0) - time.time()) < 60
    assert running.image_id == docker("inspect", "-f", "{{.Image}}", running.ref)
    world.runtime.start(launch)  # starting what runs is success

    seen = world.runtime.inspect(running)
    assert seen.pid == int(docker("inspect", "-f", "{{.State.Pid}}", running.ref))
    assert seen.started_at is not None
    assert abs(seen.started_at - time.time()) < 60
    assert (seen.finished_at, seen.exit_code, seen.error) == (None, None, None)

    world.logged(running, "up")  # an init that does not listen yet loses it
    world.runtime.stop(running, signal="SIGTERM", grace=30)
    stopped = world.one()
    assert (stopped.state, stopped.exit_code) == (RunState.EXITED, 143)
    ended = world.runtime.inspect(stopped)
    assert ended.exit_code == 143
    assert ended.finished_at is not None
    assert ended.pid is None

    world.runtime.remove(stopped)
    assert world.ours() == ()
    world.runtime.remove(stopped)
    world.runtime.stop(stopped, signal="SIGTERM", grace=30)
    assert str(refused(lambda: world.runtime.inspect(stopped))) == (
        f"cannot inspect container {launch.name}: it no longer exists"
    )
    assert str(refused(lambda: world.runtime.restart(stopped))) == (
        f"cannot start container {launch.name}: it no longer exists"
    )


def test_what_the_engine_was_asked_for(
    world: World, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port, other = free_port(), free_port()
    (tmp_path / "models").mkdir()
    world.up(
        command=("while :; do sleep 1; done",),
        entrypoint=("/bin/sh", "-c"),
        env=(("GREETING", "hällo wörld"),),
        mounts=(Mount(str(tmp_path / "models"), "/models", read_only=True),),
        ports=(Port("http", port, 8000), Port("metrics", other, 8000)),
        shm_size=64 << 20,
        user="65534",
        working_dir="/models",
        limits=Limits(memory=128 << 20, cpus=0.5, nofile=1234, memlock=1 << 20),
        stop_signal="SIGINT",
        stop_timeout=2.5,
    )
    (found,) = json.loads(docker("inspect", world.one().ref))
    host = found["HostConfig"]
    assert host["Init"] is True
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["LogConfig"] == {
        "Type": "json-file",
        "Config": {"max-size": "50m", "max-file": "3"},
    }
    assert host["PortBindings"] == {
        "8000/tcp": [
            {"HostIp": "127.0.0.1", "HostPort": str(port)},
            {"HostIp": "127.0.0.1", "HostPort": str(other)},
        ]
    }
    assert (host["ShmSize"], host["Memory"], host["NanoCpus"]) == (64 << 20, 128 << 20, 5 * 10**8)
    assert {(u["Name"], u["Soft"], u["Hard"]) for u in host["Ulimits"]} == {
        ("nofile", 1234, 1234),
        ("memlock", 1 << 20, 1 << 20),
    }
    (mount,) = found["Mounts"]
    assert (mount["Type"], mount["Destination"], mount["RW"]) == ("bind", "/models", False)
    config = found["Config"]
    assert (config["User"], config["WorkingDir"]) == ("65534", "/models")
    assert (config["StopSignal"], config["StopTimeout"]) == ("SIGINT", 3)
    assert config["Tty"] is False
    pid = found["State"]["Pid"]  # of runc, at first
    until(lambda: "GREETING=hällo wörld" in environ_of(pid), "the program")
    env = environ_of(pid)
    assert "NVIDIA_VISIBLE_DEVICES=void" in env


def test_gpus_are_asked_for_by_uuid(device_requests: None, world: World) -> None:
    workload = world.up(devices=(GPU, "GPU-2"))
    (found,) = json.loads(docker("inspect", workload.ref))
    (request,) = found["HostConfig"]["DeviceRequests"]
    assert request["DeviceIDs"] == [GPU, "GPU-2"]
    assert request["Capabilities"] == [["gpu", "compute", "utility"]]
    pid, wanted = found["State"]["Pid"], f"NVIDIA_VISIBLE_DEVICES={GPU},GPU-2"
    until(lambda: wanted in environ_of(pid), "the program")
    env = environ_of(pid)
    assert "NVIDIA_VISIBLE_DEVICES=void" not in env


def test_host_network(world: World) -> None:
    workload = world.up(network="host", ports=(Port("http", 20999),))
    (found,) = json.loads(docker("inspect", workload.ref))
    assert found["HostConfig"]["NetworkMode"] == "host"
    assert not found["HostConfig"]["PortBindings"]
    assert workload.address is None


def test_a_published_port_is_served(world: World, free_port: Callable[[], int]) -> None:
    port = free_port()
    world.up(
        command=("sh", "-c", "mkdir /www; echo hi > /www/x; httpd -f -p 80 -h /www"),
        ports=(Port("http", port, 80),),
    )

    def answers() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as conn:
                conn.sendall(b"GET /x HTTP/1.0\r\n\r\n")
                return conn.makefile("rb").read().endswith(b"hi\n")
        except OSError:
            return False

    until(answers, "an answer of httpd")


def test_restart_keeps_the_container(world: World) -> None:
    workload = world.up(command=("sh", "-c", "echo again; sleep 100000"))
    world.logged(workload, "again")
    world.runtime.stop(workload, signal="SIGKILL", grace=0)
    assert world.one().exit_code == 137
    world.runtime.restart(world.one())
    again = world.one()
    assert (again.ref, again.state) == (workload.ref, RunState.RUNNING)
    until(lambda: list(world.runtime.logs(again)) == ["again", "again"], "the second run's line")
    world.runtime.restart(again)  # it runs: success


def test_restart_of_a_paused_container_wakes_it(world: World) -> None:
    workload = world.up()
    docker("pause", workload.ref)
    assert world.one().state is RunState.PAUSED
    world.runtime.restart(world.one())
    assert world.one().state is RunState.RUNNING


def test_eight_lanes_at_once(world: World) -> None:
    names = [f"i{n}" for n in range(8)]
    command = ("sh", "-c", "echo up; exec sleep 60")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ups = list(pool.map(lambda name: world.launch(name, command=command), names))
        list(pool.map(world.runtime.create, ups))
        list(pool.map(world.runtime.start, ups))
        workloads = world.ours()
        # A container that the engine calls running has an init that may not yet listen to signals,
        # and the kernel keeps from a first process those that it does not listen to.
        list(pool.map(lambda w: world.logged(w, "up"), workloads))
        assert [w.identity.instance for w in workloads] == names
        assert {w.state for w in workloads} == {RunState.RUNNING}
        list(pool.map(lambda w: world.runtime.stop(w, signal="SIGTERM", grace=30), workloads))
        assert {w.exit_code for w in world.ours()} == {143}
        list(pool.map(world.runtime.remove, workloads))
    assert world.ours() == ()


# --- Stopping ------------------------------------------------------------------------------------


def test_term_ignored_ends_in_kill_after_the_grace(world: World) -> None:
    workload = world.up(command=IGNORES_TERM)
    world.logged(workload, "up")
    began = time.monotonic()
    world.runtime.stop(workload, signal="SIGTERM", grace=0.6)
    assert 0.6 <= time.monotonic() - began < 20
    assert (world.one().state, world.one().exit_code) == (RunState.EXITED, 137)


def test_no_grace_kills_at_once(world: World) -> None:
    workload = world.up(command=IGNORES_TERM)
    world.logged(workload, "up")
    began = time.monotonic()
    world.runtime.stop(workload, signal="SIGTERM", grace=0)
    assert time.monotonic() - began < 20
    assert world.one().exit_code == 137


def test_the_given_signal_is_sent_whatever_the_container_was_created_with(world: World) -> None:
    workload = world.up(
        command=("sh", "-c", "trap 'exit 7' INT; echo up; while :; do sleep 0.05; done"),
        stop_signal="SIGUSR2",
    )
    world.logged(workload, "up")
    world.runtime.stop(workload, signal="SIGINT", grace=30)
    assert world.one().exit_code == 7


def test_a_paused_container_gets_its_grace(world: World) -> None:
    workload = world.up(
        command=("sh", "-c", "trap 'exit 7' INT; echo up; while :; do sleep 0.05; done"),
    )
    world.logged(workload, "up")
    docker("pause", workload.ref)
    world.runtime.stop(world.one(), signal="SIGINT", grace=30)
    assert world.one().exit_code == 7


def test_a_container_paused_behind_our_back_is_stopped_too(world: World) -> None:
    workload = world.up(command=IGNORES_TERM)
    world.logged(workload, "up")
    docker("pause", workload.ref)
    world.runtime.stop(workload, signal="SIGTERM", grace=0.3)
    assert world.one().state is RunState.EXITED


def test_stopping_what_never_ran(world: World) -> None:
    world.runtime.create(world.launch())
    world.runtime.stop(world.one(), signal="SIGTERM", grace=30)
    assert world.one().state is RunState.CREATED


def test_an_unknown_signal(world: World) -> None:
    workload = world.up()
    error = refused(lambda: world.runtime.stop(workload, signal="SIGFOO", grace=1))
    assert isinstance(error, RuntimeRefused)
    assert str(error) == f"cannot stop container {workload.name}: “Invalid signal: SIGFOO”"


def test_a_running_container_is_not_removed(world: World) -> None:
    workload = world.up()
    error = refused(lambda: world.runtime.remove(workload))
    assert (str(error), error.hint) == (
        f"cannot remove container {workload.name}: it still runs",
        "stop it first",
    )
    assert world.one().state is RunState.RUNNING


def test_remove_takes_anonymous_volumes_along(world: World) -> None:
    workload = world.up()
    # `docker run -v /data` is how an image's VOLUME shows.
    other = docker(
        "create",
        "-v",
        "/data",
        *(f"--label=io.mic.{k}={v}" for k, v in (("scope", world.scope), ("host", "host1"))),
        "--label=io.mic.managed-by=mic-supervisor",
        IMAGE,
    )
    volume = docker("inspect", "-f", "{{(index .Mounts 0).Name}}", other)
    world.runtime.remove(next(w for w in world.ours() if w.ref == other))
    assert volume not in docker("volume", "ls", "-q").split()
    assert world.one().ref == workload.ref


# --- Observing -----------------------------------------------------------------------------------


def test_others_are_foreign_with_a_reason(world: World, free_port: Callable[[], int]) -> None:
    port = free_port()
    scope = f"io.mic.scope={world.scope}"
    ours = ("--label", "io.mic.managed-by=mic-supervisor", "--label", scope)
    cases = {
        "none": ("--label", scope),
        "machine": (*ours, "--label", "io.mic.host=other"),
        "swarm": (*ours, "--label", "io.mic.host=host1", "--label", "com.docker.swarm.node.id=x"),
    }
    for word, labels in cases.items():
        docker(
            "run",
            "-d",
            "--init",
            "--name",
            f"{world.scope}-{word}",
            *labels,
            IMAGE,
            "sleep",
            "100000",
        )
    published = f"127.0.0.1:{port}:80"
    docker(
        "run", "-d", "--init", "--name", f"{world.scope}-port", "--label", scope, "-p", published,
        IMAGE, "sleep", "100000",
    )  # fmt: skip
    other = runtime(f"{world.scope}-x")
    world.up()
    view = world.runtime.observe()
    assert [w.identity.instance for w in view.workloads] == ["a"]
    found = {s.name.removeprefix(f"{world.scope}-"): s for s in view.foreign_workloads}
    assert found["none"].reason == "it has no labels of ours"
    assert found["machine"].reason == "it was made by the supervisor of another machine"
    assert found["swarm"].reason == "it belongs to a Docker Swarm service"
    assert (found["port"].ports, found["port"].running) == ((port,), True)
    (seen,) = [s for s in other.observe().foreign_workloads if s.name == world.one().name]
    assert seen.reason == f"it belongs to scope {world.scope}"


def test_labels_that_cannot_be_read(world: World) -> None:
    for word, broken in (("bad", "{"), ("list", "[1]"), ("missing", None)):
        labels = {
            "io.mic.managed-by": "mic-supervisor",
            "io.mic.scope": world.scope,
            "io.mic.host": "host1",
            "io.mic.schema": "one",
        }
        if broken is not None:
            labels |= {"io.mic.spec": broken, "io.mic.ports": broken, "io.mic.instance": word}
        pairs = [f"--label={key}={value}" for key, value in labels.items()]
        docker("create", "--name", f"{world.scope}-{word}", *pairs, IMAGE, "true")
    bad, listed, missing = world.ours()
    for workload in (bad, listed, missing):
        assert workload.identity.spec is None
        assert workload.identity.ports == {}
        assert workload.identity.schema == 0
    assert bad.identity.instance == "bad"
    assert missing.identity.instance == f"{world.scope}-missing"


def test_engine_health(world: World) -> None:
    labels = [
        f"--label=io.mic.{k}={v}"
        for k, v in (("managed-by", "mic-supervisor"), ("scope", world.scope), ("host", "host1"))
    ]
    command = ("--health-interval=100ms", "--health-retries=1", "--health-cmd")
    for word, check in (("ill", "false"), ("well", "true")):
        docker("run", "-d", "--init", "--name", f"{world.scope}-{word}", *labels, *command, check,
               IMAGE, "sleep", "100000")  # fmt: skip
    until(
        lambda: [w.engine_health for w in world.ours()] == ["unhealthy", "healthy"], "both verdicts"
    )
    assert [world.runtime.inspect(w).engine_health for w in world.ours()] == [
        "unhealthy",
        "healthy",
    ]


def test_a_container_killed_for_its_memory_says_so(world: World) -> None:
    workload = world.up(
        command=("sh", "-c", "sleep 0.2; tail /dev/zero"), limits=Limits(memory=8 << 20)
    )
    until(lambda: world.one().state is RunState.EXITED, "the kill for memory")
    for seen in (world.one(), world.runtime.inspect(workload)):
        assert seen.error == "it used more memory than its limit and was killed"
        assert seen.exit_code == 137


# --- An engine that is not there -----------------------------------------------------------------


def test_no_engine_is_unknown_and_not_empty(tmp_path: Path) -> None:
    gone = tmp_path / "docker.sock"
    runtime = DockerRuntime("s", "h", base_url=f"unix://{gone}", docker_config=None)
    view = runtime.observe()
    assert view.workloads == ()
    assert view.error == f"cannot list containers: there is no Docker socket at {gone}"
    assert (view.hint or "").startswith("start it with: systemctl start docker")
    with pytest.raises(RuntimeUnavailable):
        runtime.version()
    with pytest.raises(RuntimeUnavailable):
        next(runtime.events(threading.Event()))
