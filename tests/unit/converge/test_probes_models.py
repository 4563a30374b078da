"""Models inside a server, and backends and commands that block or fail."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable

import pytest

from mic_supervisor.backends import Ask, BackendBase
from mic_supervisor.converge.prober import Prober
from mic_supervisor.converge.probes import Checker
from mic_supervisor.converge.tasks import Threads
from mic_supervisor.model import (
    EngineCheck,
    ExecCheck,
    HttpCall,
    HttpCheck,
    Instance,
    LoadState,
    Placement,
    PlacementState,
)
from tests.unit.converge.probed import TIMEOUT, Server, free_port, look, probed, target
from tests.unit.plan.builders import placement


class Shelf(BackendBase):
    """Its server says what it has at /list, and of each at /config/NAME."""

    name = "shelf"

    def placement_state(self, item: Placement, status: int | None, body: str) -> PlacementState:
        state = {200: LoadState.LOADED, None: LoadState.UNKNOWN}.get(status, LoadState.ABSENT)
        return PlacementState(item.model, state, reason=threading.current_thread().name)

    def surplus(self, instance: Instance, ask: Ask) -> tuple[Placement, ...]:
        assert instance.inventory is not None
        status, body = ask(instance.inventory)
        names = json.loads(body) if status == 200 else []
        return tuple(placement(n, 0) for n in names if ask(HttpCall("GET", f"/config/{n}"))[0])


LIST = HttpCall("POST", "/list", timeout=2.0)


def test_asks_for_each_model_and_for_what_is_too_many(server: Server) -> None:
    server.answers |= {"/config/a": {}, "/list": ["x"], "/config/x": {}}
    places = (placement("a", 0), placement("b", 0))
    item = probed(HttpCheck("/health"), placements=places, inventory=LIST)
    health = look(target(item, server.port, Shelf()))
    states = [(one.model, one.state, one.reason) for one in health.placements]
    # A backend may be a stranger's, and block: it does so in a thread.
    assert states == [
        ("a", LoadState.LOADED, "mic-test"),
        ("b", LoadState.ABSENT, "mic-test"),
    ]
    assert [one.model for one in health.surplus] == ["x"]
    assert server.asked == ["/health", "/config/a", "/config/b", "/list", "/config/x"]


def test_models_of_a_server_that_is_gone_are_unknown() -> None:
    item = probed(EngineCheck(), placements=(placement("a", 0),), inventory=LIST)
    there = target(item, free_port(), Shelf(), engine_health="healthy")
    health = look(there)
    assert [one.state for one in health.placements] == [LoadState.UNKNOWN]
    assert health.surplus == ()


@pytest.mark.parametrize("hangs", ["a command", "a backend"])
def test_what_blocks_holds_up_nobody_else(server: Server, hangs: str) -> None:
    gate = threading.Event()

    class Stuck(Shelf):
        def placement_state(self, item: Placement, status: int | None, body: str) -> PlacementState:
            gate.wait(TIMEOUT)
            return super().placement_state(item, status, body)

    def command(*_: object) -> tuple[int, str]:
        gate.wait(TIMEOUT)
        return 0, ""

    stuck = {
        "a command": target(probed(ExecCheck(("x",))), server.port, execute=command),
        "a backend": target(
            probed(HttpCheck("/health"), placements=(placement("a", 0),)),
            server.port,
            Stuck(),
        ),
    }[hangs]
    well = target(probed(HttpCheck("/health")), server.port)

    async def go() -> None:
        prober = Prober(Checker(Threads(4, "mic-test")), lambda: None, time.monotonic)
        prober.watch({"stuck": stuck, "well": well})
        await _until(lambda: "well" in prober.health)
        assert "stuck" not in prober.health
        gate.set()
        await _until(lambda: "stuck" in prober.health)
        await prober.close()

    asyncio.run(go())


def test_a_defect_of_a_backend_is_unknown_and_probing_goes_on(server: Server) -> None:
    class Broken(Shelf):
        def placement_state(self, item: Placement, status: int | None, body: str) -> PlacementState:
            raise ZeroDivisionError("a defect")

    item = probed(HttpCheck("/health"), placements=(placement("a", 0),))

    async def go() -> None:
        prober = Prober(Checker(Threads(4, "mic-test")), lambda: None, time.monotonic)
        (health,) = (await prober.ask_once({"a": target(item, server.port, Broken())})).values()
        for result in (health.startup, health.liveness, health.readiness):
            assert result is not None
            assert (result.ok, result.reason) == (
                None,
                "the probe failed: “ZeroDivisionError: a defect”",
            )

    asyncio.run(go())


def test_forgetting_a_workload_ends_the_call_that_is_under_way() -> None:
    """A server that is told to stop waits for who is still connected."""

    async def go() -> None:
        prober = Prober(Checker(Threads(4, "mic-test")), lambda: None, time.monotonic)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            silent.setblocking(False)
            port = int(silent.getsockname()[1])
            prober.watch({"a": target(probed(HttpCheck("/health")), port)})
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(TIMEOUT):
                peer, _ = await loop.sock_accept(silent)
                with peer:
                    assert await loop.sock_recv(peer, 4096) != b""
                    prober.forget("a")
                    assert await loop.sock_recv(peer, 4096) == b""

    asyncio.run(go())


async def _until(enough: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not enough():
            await asyncio.sleep(0.01)
