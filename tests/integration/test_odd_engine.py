"""An engine that gives odd answers, under a daemon that goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import docker
import pytest

from tests.integration.daemon_world import (
    DaemonWorld,
    container,
    daemon_world,
    identity,
    lines,
    process,
)
from tests.integration.engine_proxy import EngineProxy
from tests.support.waiting import until

pytestmark = pytest.mark.engine

C0, P2 = identity("c", 0), identity("p", 2)
LIST = "GET .*/containers/json"


def head(status: int, body: bytes) -> bytes:
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


@pytest.fixture
def world(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    busybox_image: str,
    proxy: EngineProxy,
) -> Iterator[DaemonWorld]:
    """A container on GPU 0, a process on GPU 2, and a daemon that looks every second."""
    with daemon_world(tmp_path_factory.mktemp("odd"), engine) as made:
        made.mic.env |= {"MIC_DOCKER_HOST": proxy.url, "MIC_RESYNC": "1s"}
        made.models = {"c": container("stop_timeout: 2s"), "p": process()}
        made.write({0: "c", 1: "none", 2: "p"})
        made.mic.run(http=False)
        made.converged(C0, P2)
        yield made


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(head(403, b'{"message": "Forbidden"}'), id="403"),
        pytest.param(head(500, b'{"message": "panic"}'), id="500"),
        pytest.param(b"HTTP/1.1 2", id="cut status line"),
        pytest.param(head(200, b"[" * 100_000), id="nested"),
        pytest.param(head(200, b"[null]"), id="no container"),
        pytest.param(head(200, b'[{"Id": ' + b"9" * 5000 + b"}]"), id="5,000 digits"),
        pytest.param(head(200, b'[{"Id": "a", "Labels": ["io.mic.scope"]}]'), id="other types"),
    ],
)
def test_a_list_that_cannot_be_read_freezes_containers_and_no_process(
    world: DaemonWorld, proxy: EngineProxy, raw: bytes
) -> None:
    before = world.marks()
    proxy.answer(LIST, raw)
    until(lambda: world.status()["unreadable"], "the list to be unreadable")
    os.kill(before[P2][2], signal.SIGKILL)
    until(lambda: world.marks().get(P2, before[P2]) != before[P2], "the process to be back")
    assert world.marks()[C0] == before[C0]
    assert world.phases()[P2] in ("unprobed", "starting", "pending")
    proxy.honest()
    world.converged(C0, P2)
    assert world.marks()[C0] == before[C0]
    assert not lines(world.mic.daemons[-1], "the loop is not alive")


def test_a_process_stays_down_where_a_container_may_have_its_gpu(
    world: DaemonWorld, proxy: EngineProxy
) -> None:
    before = world.marks()
    proxy.answer(LIST, head(500, b"{}"))
    until(lambda: world.status()["unreadable"], "the list to be unreadable")
    world.write({0: "p", 1: "none", 2: "p"})
    world.accepted(2)
    until(lambda: world.phases().get(identity("p", 0)) == "blocked", "the new one to be blocked")
    assert world.marks() == before


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(head(403, b'{"message": "Forbidden"}'), id="403"),
        pytest.param(head(500, b'{"message": "panic"}'), id="500"),
        pytest.param(head(200, b"Bad Gateway\n"), id="odd line"),
        pytest.param(head(200, b"[" * 100_000 + b"\n"), id="nested"),
        pytest.param(b"HTTP/1.1 2", id="cut status line"),
    ],
)
def test_events_that_cannot_be_followed_are_said_and_followed_again(
    world: DaemonWorld, proxy: EngineProxy, raw: bytes
) -> None:
    def said() -> list[str]:
        found: list[str] = world.status()["warnings"]
        return [text for text in found if text.startswith("cannot follow the engine's events: ")]

    proxy.answer("GET .*/events", raw)
    proxy.cut()
    proxy.up()
    until(said, "it to be said")
    until(lambda: not world.status()["unreadable"], "the list to be read")
    # The next look sees what no event says.
    before = world.marks()
    os.kill(before[C0][2], signal.SIGKILL)
    until(lambda: world.marks().get(C0, before[C0]) != before[C0], "it to be back")
    assert said()
    proxy.honest()
    until(lambda: not said(), "events to be followed again")
    assert len(lines(world.mic.daemons[-1], "WARNING.*cannot follow the engine")) <= 2


@pytest.mark.parametrize("state", [b'"created"', b'"exited" ', b'"dead"   '])
def test_what_the_engine_takes_for_inactive_while_it_runs_gets_no_second_one(
    world: DaemonWorld, proxy: EngineProxy, engine: docker.APIClient, state: bytes
) -> None:
    before = world.marks()
    pid = before[C0][2]
    # The list has it as "State", and an inspection as "Status".
    proxy.translate("GET .*/containers/.*json", b':"running"', b":" + state)
    reason = f", and PID {pid} in it runs"
    until(lambda: (world.rows()[C0]["reason"] or "").endswith(reason), "the doubt to be said")
    assert world.phases()[C0] == "degraded"
    # Neither a change of the file nor a word moves it.
    world.write({0: "c", 1: "none", 2: "p"}, c=container("env: {STEP: '2'}"))
    world.accepted(2)
    world.mic("retry", C0, timeout=30)
    assert world.marks() == before
    proxy.honest()
    world.converged(C0, P2)
    assert world.marks()[C0] != before[C0]  # which follows the file now
