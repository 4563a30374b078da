"""MIC_DOCKER_HOST=none: no engine is asked, containers are blocked, everything else goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from mic_supervisor.config.diagnostics import InvalidConfig
from mic_supervisor.config.settings import load_settings
from mic_supervisor.errors import MicError, PreflightFailed, RuntimeRefused
from mic_supervisor.model import ContainerSpec, Identity, Launch, ObservedWorkload, RunState
from mic_supervisor.runtimes import Runtime
from mic_supervisor.runtimes.docker import HINT, REASON, DockerOff
from tests.support.mic import Mic

IDENTITY = Identity("test", "h", "a-0", "a", "container", ("GPU-0",), {}, None, "")
WORKLOAD = ObservedWorkload("docker", "mic-a", "c0ffee", IDENTITY, RunState.RUNNING)
LAUNCH = Launch("mic-a", "docker", IDENTITY, ContainerSpec("a:1"))


def test_it_is_known_to_run_nothing_which_is_not_an_error() -> None:
    runtime: Runtime = DockerOff()
    view = runtime.observe()
    assert (view.workloads, view.foreign_workloads, view.error) == ((), (), None)
    assert (view.off, view.hint) == (REASON, HINT)


@pytest.mark.parametrize(
    ("call", "error", "what"),
    [
        (lambda it: it.prepare(LAUNCH, print), PreflightFailed, "cannot run mic-a"),
        (lambda it: it.create(LAUNCH), RuntimeRefused, "cannot create mic-a"),
        (lambda it: it.start(LAUNCH), RuntimeRefused, "cannot start mic-a"),
        (lambda it: it.restart(WORKLOAD), RuntimeRefused, "cannot start mic-a"),
        (
            lambda it: it.stop(WORKLOAD, signal="SIGTERM", grace=1.0),
            RuntimeRefused,
            "cannot stop mic-a",
        ),
        (lambda it: it.remove(WORKLOAD), RuntimeRefused, "cannot remove mic-a"),
        (lambda it: it.logs(WORKLOAD), RuntimeRefused, "cannot read the log of mic-a"),
        (
            lambda it: it.run_check(WORKLOAD, ("true",), 1.0),
            RuntimeRefused,
            "cannot run a check in mic-a",
        ),
    ],
)
def test_a_call_is_refused_with_the_reason(
    call: Callable[[DockerOff], Any], error: type[MicError], what: str
) -> None:
    with pytest.raises(error) as caught:
        call(DockerOff())
    assert caught.value.message == f"{what}: {REASON}"
    assert caught.value.hint == HINT


def test_no_event_comes_and_stop_ends_it() -> None:
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    assert list(DockerOff().events(stop)) == []
    assert stop.is_set()


def test_the_setting_says_none_and_nothing_like_it() -> None:
    assert load_settings({"MIC_DOCKER_HOST": "none"}).docker_host == "none"
    with pytest.raises(InvalidConfig) as caught:
        load_settings({"MIC_DOCKER_HOST": "None"})
    assert caught.value.rendered == (
        "environment: error: MIC_DOCKER_HOST: 'None' is no address of an engine: write it as in "
        "unix:///run/docker.sock or tcp://127.0.0.1:2375, or none for a machine that is to be used "
        "without Docker\n"
    )


@pytest.mark.slow
def test_a_container_is_blocked_and_its_neighbour_runs(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.write(
        """
        version: 1
        models:
          box: {backend: container, image: "mic-test/busybox:1"}
          nap: {backend: process, command: [/bin/sleep, "60"]}
        gpus: {0: box, 1: nap}
        """
    )
    assert mic("plan", rc=0).stdout == (
        "+ create   nap-51000001  GPU 1  nothing runs for it yet\n"
        "\n"
        "! blocked  box-51000000 on GPU 0: Docker is switched off (MIC_DOCKER_HOST=none)\n"
        "    hint: set MIC_DOCKER_HOST to an engine's address, or unset it\n"
        "\n"
        "Plan: 1 to create; 1 blocked.\n"
    )
    applied = mic("apply", rc=3).stdout
    assert "blocked    box-51000000  GPU 0  Docker is switched off" in applied
    assert "\nunprobed   nap-51000001  GPU 1" in applied
    mic("down", "--yes", rc=0)


def test_an_engine_that_does_not_answer_is_another_thing(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = f"unix://{mic.home}/no-engine.sock"
    mic.write(
        """
        version: 1
        models: {nap: {backend: process, command: [/bin/sleep, "60"]}}
        gpus: {0: nap}
        """
    )
    assert "! blocked  nap-51000000 on GPU 0: what docker runs is unknown" in mic("plan").stdout
