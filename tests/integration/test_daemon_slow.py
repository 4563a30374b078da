"""What is slow or hangs delays nobody else: the other lanes go on, and the daemon answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.integration.daemon_world import (
    DaemonWorld,
    container,
    daemon_world,
    identity,
    process,
)
from tests.integration.engine_proxy import EngineProxy, engine_proxy
from tests.integration.job_world import server
from tests.mock_nvml import MockGpu, MockNvml, mock_uuid
from tests.support.waiting import until

pytestmark = pytest.mark.engine

SOON = 8.0  # seconds: far below any patience that somebody has with what hangs, on a busy machine
DEAF = '{backend: container, image: "mic-test/busybox:1", stop_timeout: 12s, command: [sh, -c, %s]}'


@pytest.fixture
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProxy]:
    with engine_proxy(tmp_path_factory.mktemp("e")) as made:
        yield made


@pytest.fixture
def world(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    proxy: EngineProxy,
    busybox_image: str,
    server_image: str,
) -> Iterator[DaemonWorld]:
    """A daemon whose engine answers through the proxy; the test looks at the engine directly."""
    with daemon_world(tmp_path_factory.mktemp("slow"), engine) as made:
        made.mic.env["MIC_DOCKER_HOST"] = proxy.url
        made.models = {"p": process(), "c": container()}
        yield made


def answers_at_once(world: DaemonWorld) -> None:
    """In the middle of several: whoever waited for what hangs would take seconds each time."""
    taken = []
    for _ in range(10):
        began = time.perf_counter()
        assert world.mic.ask("status")["result"]["instances"]
        taken.append(time.perf_counter() - began)
    assert sorted(taken)[len(taken) // 2] < 1, taken


def up_soon(world: DaemonWorld, name: str) -> None:
    until(
        lambda: world.phases().get(name) in ("unprobed", "ready"), f"{name} to be up", timeout=SOON
    )


def test_a_probe_that_hangs(world: DaemonWorld) -> None:
    world.write({0: "s", 1: "c"}, s=server("probe: {http: /health, period: 200ms, timeout: 20s}"))
    world.mic.run(http=False)
    hung, other = identity("s", 0), identity("c", 1)
    world.converged(hung, other)
    assert world.engine is not None
    ref = world.marks()[hung][0]
    world.engine.pause(ref)  # it accepts, and never answers
    time.sleep(0.5)
    world.write({0: "s", 1: "c", 2: "p", 3: "c"})
    up_soon(world, identity("p", 2))
    up_soon(world, identity("c", 3))
    answers_at_once(world)
    world.engine.unpause(ref)
    world.converged(hung, other, identity("p", 2), identity("c", 3))


def test_a_container_that_ignores_term(world: DaemonWorld) -> None:
    # `exec` takes the place of the shell under Docker's init, which passes TERM on.
    deaf = DEAF % "\"trap '' TERM; while :; do sleep 0.1; done\""
    world.write({0: "d", 1: "c"}, d=deaf)
    world.mic.run(http=False)
    world.converged(identity("d", 0), identity("c", 1))
    world.write({0: "none", 1: "p", 2: "p"})
    up_soon(world, identity("p", 1))
    up_soon(world, identity("p", 2))
    assert identity("d", 0) in world.marks()
    assert world.phases()[identity("d", 0)] == "stopping"
    answers_at_once(world)
    world.converged(identity("p", 1), identity("p", 2))
    assert identity("d", 0) not in world.marks()


def test_a_start_that_hangs_in_the_engine(world: DaemonWorld, proxy: EngineProxy) -> None:
    world.write({0: "c"})
    world.mic.run(http=False)
    world.converged(identity("c", 0))
    proxy.hold(r"POST /v\S+/start")
    world.write({0: "c", 1: "c"})
    assert proxy.held.wait(30)
    world.write({0: "c", 1: "c", 2: "c", 3: "p"})
    up_soon(world, identity("c", 2))
    up_soon(world, identity("p", 3))
    assert world.phases()[identity("c", 1)] in ("starting", "pending")
    answers_at_once(world)
    proxy.release()
    world.converged(identity("c", 0), identity("c", 1), identity("c", 2), identity("p", 3))


def test_a_list_that_hangs_in_the_engine(world: DaemonWorld, proxy: EngineProxy) -> None:
    """Docker is unknown then. What runs without it runs on, and starts where Docker ran nothing."""
    world.write({0: "c", 1: "p"})
    world.mic.run(http=False)
    world.converged(identity("c", 0), identity("p", 1))
    before = world.marks()
    proxy.hold(r"GET /\S*containers/json")
    world.write({0: "c", 1: "p", 2: "p", 3: "c"})
    assert proxy.held.wait(30)

    def told() -> bool:
        reason = world.rows().get(identity("c", 3), {}).get("reason") or ""
        return "what docker runs is unknown: docker has not answered for" in reason

    until(told, "Docker to be unknown", timeout=SOON)
    up_soon(world, identity("p", 2))
    assert world.phases()[identity("p", 1)] == "unprobed"
    after = world.marks()
    assert {name: after[name] for name in before} == before
    answers_at_once(world)
    proxy.release()
    names = [identity("c", 0), identity("p", 1), identity("p", 2), identity("c", 3)]
    world.converged(*names)
    after = world.marks()
    assert {name: after[name] for name in before} == before


def test_an_nvml_call_that_hangs(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """All GPUs are unknown then: nothing is started or stopped, and everybody is told so."""
    nvml = MockNvml(tmp_path)
    nvml.set(gpus=[MockGpu() for _ in range(4)])
    with daemon_world(tmp_path_factory.mktemp("nvml"), None, nvml=nvml) as world:
        world.write({0: "p", 1: "p"}, p=process())
        world.mic.run(http=False)
        names = [f"p-{mock_uuid(index)[4:12]}" for index in range(3)]
        world.converged(*names[:2])
        before = world.marks()
        nvml.set_rules(hangs=["nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo"])
        world.write({0: "p", 1: "none", 2: "p"})
        until(
            lambda: any("NVML has not answered" in text for text in world.status()["warnings"]),
            "the GPUs to be unknown",
            timeout=60,
        )
        for _ in range(5):
            answers_at_once(world)
            time.sleep(0.2)
        assert world.marks() == before
        assert world.mic("reload", "--wait").rc == 0
        nvml.set_rules()
        world.converged(names[0], names[2])
        assert world.marks()[names[0]] == before[names[0]]
