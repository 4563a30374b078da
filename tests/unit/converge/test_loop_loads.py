"""Models inside servers, loaded by the loop on runtimes in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.backends import BackendBase
from mic_supervisor.converge import apply
from mic_supervisor.converge.events import Order
from mic_supervisor.converge.outcome import Snapshots
from mic_supervisor.converge.session import Session
from mic_supervisor.converge.snapshot import ConfigState, Reloaded
from mic_supervisor.errors import MicError
from mic_supervisor.model import HttpCall, LoadState, Placement, PlacementState
from mic_supervisor.plan.assess import Selection
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
        self.refuses: set[str] = set()  # to load
        self.keeps: set[str] = set()  # although it is told to unload
        self.gate = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        verb, model = head.split()[1].split("/")[1:3]
        if verb == "unload":
            self.asked.append(f"unload {model}")
            self.loaded -= {model} - self.keeps
        if verb == "load" and model in self.refuses:
            writer.write(b"HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        if verb == "load":
            self.asked.append(model)
            if model in self.hangs:
                await self.gate.wait()
            self.loaded.add(model)
        status = 200 if model in self.loaded or verb == "unload" else 404
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
    places = tuple(
        replace(b.placement(name, 0), unload=HttpCall("POST", f"/unload/{name}")) for name in models
    )
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


# --- what a person asks for one of the models ---------------------------------------------------


def orders(rig: Rig) -> Session:
    """The daemon's session on the rig."""
    snapshots = Snapshots(rig.converger, time.monotonic)
    rig.converger.observers.append(snapshots.on_snapshot)
    state = ConfigState("gpus.yaml", "", 1, None, True, None, None)

    async def reload(confirm: bool, written: str, order: Order) -> Reloaded:
        return Reloaded(changed=False, generation=1)

    return Session(
        scope="test",
        path=Path("gpus.yaml"),
        converger=rig.converger,
        events=rig.events,
        snapshots=snapshots,
        config=lambda: state,
        history=tuple,
        reload=reload,
    )


async def ask(session: Session, method: str, name: str) -> Any:
    return await session.methods()[method]({"name": name}, lambda _event: None)


SERVER = "s-aaaaaaaa"


def test_a_model_is_restarted_in_its_server_and_the_others_are_left_alone() -> None:
    async def body() -> None:
        backend = Loader()
        async with loading(backend, "one", "two") as rig:
            await rig.until(lambda: rig.phase(SERVER) == "ready")
            del backend.asked[:]
            answer = await ask(orders(rig), "restart", "one")
            assert backend.asked == ["unload one", "one"]
            assert answer["begun"] == [SERVER]
            (row,) = answer["instances"]
            assert [(one["model"], one["phase"]) for one in row["models"]] == [
                ("one", "ready"),
                ("two", "ready"),
            ]
            assert rig.engine.calls.count(f"restart {SERVER}") == 0
            assert rig.converger.context.forced == frozenset()

    run(body)


@pytest.mark.parametrize("name", ["one", SERVER, "s"])
def test_what_failed_to_load_is_tried_again_by_the_name_of_the_model_and_of_the_server(
    name: str,
) -> None:
    async def body() -> None:
        backend = Loader()
        backend.refuses = {"one"}
        async with loading(backend, "one", "two") as rig:
            await rig.until(lambda: rig.phase(SERVER) == "degraded")
            backend.refuses.clear()
            session = orders(rig)
            answer = await ask(session, "retry", name)
            assert answer["failed_before"] == [f"{SERVER}/one"]
            assert rig.phase(SERVER) == "ready"
            again = await ask(session, "retry", name)
            assert (again["failed_before"], again["begun"]) == ([], [])
            assert backend.asked.count("two") == 1

    run(body)


def test_a_model_whose_server_is_down_is_refused_with_the_servers_name() -> None:
    async def body() -> None:
        async with loading(Loader(), "one") as rig:
            await rig.until(lambda: rig.phase(SERVER) == "ready")
            rig.engine.refuses[f"restart {SERVER}"] = MicError("cannot start it: no room")
            rig.engine.ends(rig.engine.name_of(SERVER), 1)
            await rig.until(lambda: rig.phase(SERVER) == "backoff")
            with pytest.raises(MicError) as refused:
                await ask(orders(rig), "restart", "one")
            assert refused.value.message == (
                "cannot restart one: its server, s-aaaaaaaa, is not up: backoff: cannot start it: "
                "no room"
            )
            assert refused.value.hint == "mic-supervisor retry s-aaaaaaaa"
            with pytest.raises(MicError) as unknown:
                await ask(orders(rig), "restart", "three")
            assert unknown.value.hint == "there is s-aaaaaaaa, one"

    run(body)


def test_a_paused_model_is_not_restarted() -> None:
    async def body() -> None:
        async with loading(Loader(), "one") as rig:
            await rig.until(lambda: rig.phase(SERVER) == "ready")
            rig.converger.pause(Selection(models=frozenset({"one"})), None)
            with pytest.raises(MicError, match="cannot restart one: one is paused since"):
                await ask(orders(rig), "restart", "one")

    run(body)


def test_an_unload_is_done_when_the_server_has_it_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(apply, "_VERIFY_TIMEOUT", 0.3)

    async def body() -> None:
        backend = Loader()
        async with loading(backend, "one") as rig:
            await rig.until(lambda: rig.phase(SERVER) == "ready")
            backend.keeps = {"one"}
            await ask(orders(rig), "restart", "one")
            assert rig.tells("failed", SERVER) == [
                "cannot unload one: the server still has it 0.3 s later"
            ]

    run(body)
