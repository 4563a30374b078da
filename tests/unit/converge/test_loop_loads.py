"""Models inside servers, loaded by the loop on runtimes in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from mic_supervisor.backends import BackendBase
from mic_supervisor.model import (
    LoadState,
    Placement,
    PlacementState,
)
from tests.unit.converge.rig import (
    File,
    Rig,
    converging,
    on,
    run,
)
from tests.unit.plan import builders as b


class Loader(BackendBase):
    """Its server answers a load at once, or never; what it says of a model is what was loaded."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.loaded: set[str] = set()
        self.hangs: set[str] = set()
        self.gate = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        verb, model = head.split()[1].split("/")[1:3]
        if verb == "load":
            self.asked.append(model)
            if model in self.hangs:
                await self.gate.wait()
            self.loaded.add(model)
        status = 200 if model in self.loaded else 404
        writer.write(f"HTTP/1.1 {status} \r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()

    def placement_state(self, item: Placement, status: int | None, body: str) -> PlacementState:
        if status == 200:
            return PlacementState(item.model, LoadState.LOADED, digest=item.digest)
        return PlacementState(item.model, LoadState.ABSENT)


@asynccontextmanager
async def loading(backend: Loader, *models: str) -> AsyncIterator[Rig]:
    """A converger with one server, which these models are to be loaded into."""
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0)
    port = int(server.sockets[0].getsockname()[1])
    places = tuple(b.placement(name, 0) for name in models)
    spec = b.container(ports=(replace(b.HTTP, host=port),))
    file = File(on("s", 0, workload=spec, placements=places, shared=True))
    file.backend = lambda name: backend  # type: ignore[method-assign]
    try:
        async with converging(file) as rig:
            yield rig
    finally:
        backend.gate.set()
        server.close()


def test_a_load_that_hangs_holds_up_no_other_and_is_not_asked_for_twice() -> None:
    async def body() -> None:
        backend = Loader()
        backend.hangs = {"slow"}
        async with loading(backend, "slow", "quick", "other") as rig:
            await rig.until(lambda: {"quick", "other"} <= backend.loaded)
            looks = rig.engine.looks
            await rig.until(lambda: rig.engine.looks > looks + 3)
            assert backend.asked.count("slow") == 1
            assert "slow" not in backend.loaded
            backend.gate.set()
            await rig.until(lambda: rig.phase("s-aaaaaaaa") == "ready")
            assert sorted(backend.asked) == ["other", "quick", "slow"]

    run(body)


def test_closing_waits_for_no_load_that_hangs() -> None:
    async def body() -> None:
        backend = Loader()
        backend.hangs = {"slow"}
        async with loading(backend, "slow") as rig:
            await rig.until(lambda: backend.asked)
            began = time.monotonic()
            await rig.converger.close(timeout=0.2)
            assert time.monotonic() - began < 3.0
            assert rig.tells("failed", "s-aaaaaaaa") == []

    run(body)
