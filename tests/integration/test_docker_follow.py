"""Logs, events and checks against a real engine."""

from __future__ import annotations

import http.client
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from docker import APIClient

from mic_supervisor.errors import RuntimeRefused, RuntimeUnavailable
from mic_supervisor.model import RunState
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.integration.docker_world import (
    IMAGE,
    World,
    docker,
    refused,
)
from tests.integration.engine_proxy import engine_proxy
from tests.support.waiting import until

pytestmark = pytest.mark.engine


def test_logs_of_a_running_and_an_ended_container(world: World) -> None:
    script = r"echo one; echo two >&2; printf '\377\303\251 three\r\n'; printf rest"
    workload = world.up(command=("sh", "-c", script))
    until(lambda: world.one().state is RunState.EXITED, "the end of the script")
    found = list(world.runtime.logs(workload))
    assert sorted(found) == sorted(["one", "two", "\N{REPLACEMENT CHARACTER}é three", "rest"])
    assert len(list(world.runtime.logs(workload, tail=2))) == 2
    assert list(world.runtime.logs(workload, tail=0)) == []
    assert sorted(world.runtime.logs(workload, follow=True)) == sorted(found)


def test_a_followed_log_ends_with_the_container(world: World) -> None:
    script = "echo one; while [ ! -e /go ]; do sleep 0.02; done; echo two"
    workload = world.up(command=("sh", "-c", script))
    log = world.runtime.logs(workload, follow=True)
    assert next(log) == "one"
    assert world.runtime.run_check(workload, ("touch", "/go"), 60) == (0, "")
    assert list(log) == ["two"]


def test_a_log_that_is_not_read_to_its_end_can_be_closed(world: World) -> None:
    workload = world.up(command=("sh", "-c", "echo one; sleep 60"))
    log = world.runtime.logs(workload, follow=True)
    assert next(log) == "one"
    log.close()  # type: ignore[attr-defined]


def test_the_log_of_what_is_gone(world: World) -> None:
    workload = world.up()
    world.runtime.stop(workload, signal="SIGKILL", grace=0)
    world.runtime.remove(workload)
    error = refused(lambda: list(world.runtime.logs(workload)))
    assert isinstance(error, RuntimeRefused)
    assert str(error).startswith(f"cannot read the log of container {workload.name}: “No such")


def test_a_stream_whose_engine_dies_is_an_error(world: World) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mic-") as directory,
        engine_proxy(Path(directory)) as proxy,
    ):
        runtime = DockerRuntime(world.scope, "host1", base_url=proxy.url, docker_config=None)
        workload = world.up(command=("sh", "-c", "echo one; sleep 60"))
        log = runtime.logs(workload, follow=True)
        events = runtime.events(threading.Event())
        assert next(log) == "one"
        assert next(events).startswith("listening")
        proxy.cut()
        for stream in (log, events):
            with pytest.raises(RuntimeUnavailable):
                next(stream)


def test_events_of_ours_only_until_told_to_stop(world: World) -> None:
    stop = threading.Event()
    heard: list[str] = []
    listening = threading.Event()

    def listen() -> None:
        for line in world.runtime.events(stop):
            heard.append(line)
            listening.set()

    thread = threading.Thread(target=listen)
    thread.start()
    assert listening.wait(20)
    docker("run", "--rm", "--label", f"io.mic.scope={world.scope}", IMAGE, "true")
    workload = world.up(command=("sh", "-c", "exit 3"))
    until(lambda: world.one().state is RunState.EXITED, "the end of the container")
    world.runtime.remove(workload)
    until(lambda: len(heard) == 4, "three events")
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert heard[0].startswith("listening to the engine at /")
    assert heard[1:] == [
        f"start {workload.name}",
        f"die {workload.name} (exit code 3)",
        f"destroy {workload.name}",
    ]


def test_a_check_inside_a_container(world: World) -> None:
    workload = world.up()
    both = ("sh", "-c", "echo out; echo err >&2; exit 4")
    code, said = world.runtime.run_check(workload, both, 60)
    assert (code, sorted(said.splitlines())) == (4, ["err", "out"])
    code, said = world.runtime.run_check(workload, ("nosuch",), 60)
    assert code in (126, 127)
    assert "nosuch" in said


@pytest.mark.parametrize(
    "script", ["echo begun; sleep 37", "echo begun; yes", "exec >&- 2>&-; sleep 37"]
)
def test_a_check_that_takes_too_long_is_ended(world: World, script: str) -> None:
    workload = world.up()
    began = time.monotonic()
    code, said = world.runtime.run_check(workload, ("sh", "-c", script), 0.5)
    assert time.monotonic() - began < 20
    assert code == 124
    assert said.startswith("no end within 0.5 s")
    until(
        lambda: f"sh -c {script}" not in docker("top", workload.ref, "-o", "pid,args"),
        "the end of the command",
    )


def test_the_sdk_loses_what_a_command_says_before_it_is_read(
    world: World, engine: APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the head of the answer into a buffer, and goes on below that. Under load that
    happened to 5 of 120 commands. `run_check` reads the answer itself as long as this is so.
    """
    workload = world.up()
    begin = http.client.HTTPResponse.begin

    def read_late(seconds: float) -> None:
        """The head of an answer is read when the word behind it is there, or after so long."""

        def late(response: http.client.HTTPResponse) -> None:
            peer = response.fp.raw._sock  # type: ignore[attr-defined]
            with suppress(AssertionError):  # other answers have no such word
                until(lambda: b"hi" in peer.recv(1 << 16, socket.MSG_PEEK), "it", timeout=seconds)
            begin(response)

        monkeypatch.setattr(http.client.HTTPResponse, "begin", late)

    asked = engine.exec_create(workload.ref, ["echo", "hi"])["Id"]
    read_late(20.0)
    assert engine.exec_start(asked) == b""
    read_late(0.5)
    assert world.runtime.run_check(workload, ("echo", "hi"), 10) == (0, "hi")


def test_a_check_in_a_container_that_does_not_run(world: World) -> None:
    world.runtime.create(world.launch())
    error = refused(lambda: world.runtime.run_check(world.one(), ("true",), 1))
    assert isinstance(error, RuntimeRefused)
    assert "is not running" in str(error)


def test_version(world: World) -> None:
    found = world.runtime.version()
    assert found["version"] == docker("version", "-f", "{{.Server.Version}}")
    assert found["api"] == docker("version", "-f", "{{.Server.APIVersion}}")
    assert "runc" in found["runtimes"]
    assert found["cdi_devices"] == []
