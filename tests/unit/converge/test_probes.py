"""What one look asks of a server, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from mic_supervisor.backends import Ask, BackendBase
from mic_supervisor.converge.listening import is_own
from mic_supervisor.converge.prober import Prober
from mic_supervisor.converge.probes import Checker, Target
from mic_supervisor.converge.tasks import Threads
from mic_supervisor.demo import server as demo_server
from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.host import processes
from mic_supervisor.model import (
    Check,
    EngineCheck,
    ExecCheck,
    Health,
    HttpCall,
    HttpCheck,
    Instance,
    Listener,
    LoadState,
    Placement,
    PlacementState,
    Port,
    Probe,
    Probes,
    TcpCheck,
)
from tests.support.waiting import until
from tests.unit.plan.builders import container, on, placement, program, workload

TIMEOUT = 20.0


class Server:
    """Answers GET and POST with `answers`, by path; 404 else."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {"/health": {"who": "me", "all": [{"id": "a"}]}}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                found = outer.answers.get(self.path)
                status = 404 if found is None else 200
                self.send_response(found if isinstance(found, int) else status)
                self.end_headers()
                self.wfile.write(found if isinstance(found, bytes) else json.dumps(found).encode())

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                return None

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self.http.server_address[1])
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def probed(check: Check, **values: Any) -> Instance:
    return on("m", 0, workload=program(), probes=Probes(*[Probe(check)] * 3), **values)


def target(
    instance: Instance, port: int, backend: Any = None, execute: Any = None, **values: Any
) -> Target:
    runs = workload(instance, ports={"http": port}, **values)
    return Target(instance, runs, backend or BackendBase(), execute or _no_command)


def _no_command(*_: object) -> tuple[int, str]:
    raise RuntimeRefused("the engine is gone")


def look(what: Target) -> Health:
    return asyncio.run(Checker(Threads(4, "mic-test")).probe(what, 1000.0))


def readiness(what: Target) -> tuple[bool | None, str]:
    """What a look says first: of the startup probe where that does not pass."""
    health = look(what)
    result = health.readiness or health.startup
    assert result is not None
    return result.ok, result.reason


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# --- each kind of check -------------------------------------------------------------------------


def test_a_check_that_probes_have_in_common_is_made_once_in_a_look(server: Server) -> None:
    health = look(target(probed(HttpCheck("/health")), server.port))
    assert server.asked == ["/health"]
    for result in (health.startup, health.liveness, health.readiness):
        assert result is not None
        assert (result.ok, result.reason) == (True, "GET /health answers 200")


def test_checks_that_differ_are_all_made(server: Server) -> None:
    server.answers["/ready"] = {}
    other = Probes(
        Probe(HttpCheck("/health")),
        Probe(HttpCheck("/health"), timeout=7.0),
        Probe(HttpCheck("/ready")),
    )
    look(target(on("m", 0, workload=program(), probes=other), server.port))
    assert server.asked == ["/health", "/health", "/ready"]


@pytest.mark.parametrize(
    ("check", "ok", "reason"),
    [
        (HttpCheck("/nope"), False, "GET /nope answers 404"),
        (HttpCheck("/health", expect=(("who", "me"),)), True, "GET /health answers 200"),
        (
            HttpCheck("/health", expect=(("who", "you"),)),
            False,
            "port PORT is answered by ME, which is not ours: who is “me”, not 'you'",
        ),
        (HttpCheck("/health", listed=(("all[].id", "a"),)), True, "GET /health answers 200"),
        (
            HttpCheck("/health", listed=(("all[].id", "b"),)),
            False,
            "port PORT is answered by ME, which is not ours: all[].id has “a” and lacks b",
        ),
        (
            HttpCheck("/health", listed=(("who", "b"),)),
            False,
            "port PORT is answered by ME, which is not ours: who lacks b",
        ),
        (
            HttpCheck("/text", expect=(("who", "me"),)),
            False,
            "port PORT is answered by ME, which is not ours: GET /text answers no JSON",
        ),
        (HttpCheck("/401"), True, "GET /401 answers 401"),
        (HttpCheck("/403"), True, "GET /403 answers 403"),
        (HttpCheck("/500"), False, "GET /500 answers 500"),
        (
            HttpCheck("/401", expect=(("who", "me"),)),
            False,
            "port PORT is answered by ME, which is not ours: GET /401 answers 401",
        ),
        (HttpCheck("/health", port="metrics"), None, "its port 'metrics' is not recorded"),
        (TcpCheck(), True, "port PORT accepts connections"),
        (TcpCheck(port="grpc"), None, "its port 'grpc' is not recorded"),
        (EngineCheck(), None, "the image declares no health check"),
        (ExecCheck(("look",)), None, "the engine is gone"),
    ],
)
def test_says_what_a_check_found(
    server: Server, check: Check, ok: bool | None, reason: str
) -> None:
    server.answers |= {"/text": b"hello", "/401": 401, "/403": 403, "/500": 500}
    name = psutil.Process().name()
    reason = reason.replace("ME", f"{name} (PID {os.getpid()})")
    expected = (ok, reason.replace("PORT", str(server.port)))
    assert readiness(target(probed(check), server.port)) == expected


@contextmanager
def runs_itself(instance: Instance, **environ: str) -> Iterator[Target]:
    """An instance whose process is a server of its own, which answers for the model "me"."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, demo_server.__file__],
        env={"PORT": str(port), "MODEL": "me", **environ},
        stdout=subprocess.DEVNULL,
    )
    try:
        there = target(instance, port, pid=process.pid)
        until(lambda: "nothing listens" not in readiness(there)[1], "the server")
        yield there
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("check", "ok", "reason"),
    [
        (HttpCheck("/v1/models", listed=(("data[].id", "me"),)), True, "answers 200"),
        # A name of its own, as by a setting that stands in a file, an image, or the environment.
        (HttpCheck("/v1/models", listed=(("data[].id", "you"),)), True, "answers 200"),
        (HttpCheck("/v1/models", expect=(("object", "you"),)), True, "answers 200"),
        # That is no answer of the kind that was asked for.
        (HttpCheck("/v1/models", listed=(("models[].id", "you"),)), False, "models[].id lacks you"),
        (HttpCheck("/metrics", expect=(("a", "b"),)), False, "GET /metrics answers no JSON"),
    ],
)
def test_what_only_ours_listens_on_is_ours_by_whatever_name(
    check: HttpCheck, ok: bool, reason: str
) -> None:
    with runs_itself(probed(check)) as there:
        assert readiness(there) == (ok, f"GET /v1/models {reason}" if ok else reason)


def test_a_port_that_somebody_shares_with_ours_is_not_ours_alone() -> None:
    check = HttpCheck("/v1/models", listed=(("data[].id", "you"),))
    with runs_itself(probed(check)) as there:
        port = there.workload.identity.ports["http"]
        with socket.create_server(("127.0.0.2", port)):  # another address is no matter
            assert readiness(there)[0] is True
        sockets = [Listener(port, at, addresses=HERE) for at in (there.workload.pid, os.getpid())]
        assert is_own(there.workload, there.instance.workload, port) == (True, "")
        assert own_of(there, sockets) == (False, f"? (PID {os.getpid()})")
        assert own_of(there, [*sockets[:1], Listener(port, None, addresses=HERE)]) == (None, "")


HERE = frozenset({"127.0.0.1"})


def own_of(there: Target, sockets: list[Listener]) -> tuple[bool | None, str]:
    """As `is_own`, of a machine where these sockets listen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "listening_processes", lambda: sockets)
        port = there.workload.identity.ports["http"]
        return is_own(there.workload, there.instance.workload, port)


def test_says_where_it_listens_once_it_is_late() -> None:
    check = Probe(HttpCheck("/"), failures=2)
    item = on("m", 0, workload=program(), probes=Probes(check, check, check))
    port = free_port()
    with runs_itself(probed(HttpCheck("/health"))) as serving:
        there = target(item, port, pid=serving.workload.pid)
        first = asyncio.run(Checker(Threads(4, "mic-test")).probe(there, 1000.0))
        said = f"GET /: nothing listens on port {port}"
        assert first.startup is not None
        assert first.startup.reason == said
        late = asyncio.run(Checker(Threads(4, "mic-test")).probe(there, 2000.0, first)).startup
        assert late is not None
        assert late.reason == (
            f"{said}; it listens on port {serving.workload.identity.ports['http']}: let it listen "
            "on ${port}, or write the port that it serves on as `port`"
        )


def test_says_where_nobody_listens() -> None:
    port = free_port()
    assert readiness(target(probed(TcpCheck()), port)) == (
        False,
        f"port {port}: Connection refused",
    )
    said = f"GET /: nothing listens on port {port}"
    assert readiness(target(probed(HttpCheck("/")), port)) == (False, said)


def test_a_port_that_lets_nobody_in_fails_in_time() -> None:
    check = Probe(TcpCheck(), timeout=0.3)
    item = on("m", 0, workload=program(), probes=Probes(check, check, check))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = int(full.getsockname()[1])
        with closing(socket.create_connection(("127.0.0.1", port))):
            began = time.monotonic()
            found = readiness(target(item, port))
            assert time.monotonic() - began < TIMEOUT
    assert found == (False, f"port {port} does not answer within 0.3 s")


def test_a_container_on_a_bridge_is_dialled_where_it_is_itself(server: Server) -> None:
    spec = container(ports=(Port("http", container=server.port),))
    check = Probe(TcpCheck())
    item = on("m", 0, workload=spec, probes=Probes(check, check, check))
    # The published port would answer for a dead listener: here it is one that nobody has.
    there = target(item, free_port(), address="127.0.0.1")
    assert readiness(there) == (True, f"port {server.port} accepts connections")
    nowhere = target(item, server.port, address=None)
    assert readiness(nowhere) == (None, "the container has no address on its bridge")


@pytest.mark.parametrize("check", [HttpCheck("/health"), TcpCheck()])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.EACCES])
def test_what_this_end_lacks_says_nothing_of_the_server(
    monkeypatch: pytest.MonkeyPatch, server: Server, check: Check, number: int
) -> None:
    async def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    async def go() -> Health:
        monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", refuse)
        checker = Checker(Threads(4, "mic-test"))
        return await checker.probe(target(probed(check), server.port), 1000.0)

    result = asyncio.run(go()).startup
    assert result is not None
    assert (result.ok, result.failures) == (None, 0)
    assert os.strerror(number) in result.reason


# --- models inside a server ---------------------------------------------------------------------


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
