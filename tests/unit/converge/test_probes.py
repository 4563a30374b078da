"""What one look asks of a server, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from contextlib import closing

import psutil
import pytest

from mic_supervisor.backends import BackendBase
from mic_supervisor.converge.probes import Checker, Target
from mic_supervisor.converge.tasks import Threads
from mic_supervisor.model import (
    Check,
    EngineCheck,
    ExecCheck,
    Health,
    HttpCall,
    HttpCheck,
    LoadState,
    Placement,
    PlacementState,
    Port,
    Probe,
    ProbeResult,
    Probes,
    Progress,
    TcpCheck,
    WarmUp,
)
from tests.unit.converge.probed import TIMEOUT, Server, free_port, look, probed, readiness, target
from tests.unit.plan.builders import container, on, placement, program

# --- progress and warm_up -----------------------------------------------------------------------

CALL = HttpCall("POST", "/infer", timeout=5.0)
MOVES = Progress("a_total", CALL, within=60.0)
PROGRESS = Probe(progress=MOVES)


def looks(what: Target, *at: float) -> list[Health]:
    """What one look after the other says, at these times, once the requests between are over."""

    async def go() -> list[Health]:
        checker, seen = Checker(Threads(4, "mic-test")), [Health()]
        for now in at:
            seen.append(await checker.probe(what, now, seen[-1]))
            if requests := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(requests)
        checker.forget(what.workload.ref)
        return seen[1:]

    return asyncio.run(go())


def said(result: ProbeResult | None) -> tuple[bool | None, str] | None:
    return None if result is None else (result.ok, result.reason)


def test_no_counter_is_read_before_the_startup_probe_has_passed(server: Server) -> None:
    del server.answers["/health"]
    server.answers["/metrics"] = b"a_total 1\n"
    health = HttpCheck("/health")
    probes = Probes(Probe(health), Probe(health), Probe(health, progress=MOVES))
    model = target(on("m", 0, workload=program(), probes=probes), server.port)
    assert looks(model, 1000.0, 2000.0)[-1].readiness is None
    assert {*server.asked} == {"/health"}


def test_a_counter_counts_beside_the_check_and_for_its_own_probe_alone(server: Server) -> None:
    server.answers |= {"/metrics": b"a_total 1\n", "/infer": 500}
    health = HttpCheck("/health")
    probes = Probes(Probe(health), Probe(health), Probe(health, progress=MOVES))
    model = target(on("m", 0, workload=program(), probes=probes), server.port)
    first, *_, last = looks(model, 1000.0, 1059.0, 1061.0, 1062.0)
    assert said(first.readiness) == (True, "it makes progress")
    assert said(last.liveness) == (True, "GET /health answers 200")
    assert said(last.readiness) == (
        False,
        "a_total has not moved for 60 s, and POST /infer answers 500",
    )
    assert server.asked.count("/infer") == 1
    server.answers["/health"] = 503
    assert said(looks(model, 1000.0)[-1].startup) == (False, "GET /health answers 503")


def test_a_counter_alone_is_not_known_before_it_is_read(server: Server) -> None:
    model = target(on("m", 0, workload=program(), probes=Probes(readiness=PROGRESS)), server.port)
    (only,) = looks(model, 1000.0)
    assert only.readiness is None


def test_nothing_else_is_asked_until_it_is_warm(server: Server) -> None:
    server.answers["/infer"] = 400
    model = target(probed(HttpCheck("/health"), warm_up=WarmUp(CALL, 2)), server.port)
    first, last = looks(model, 1000.0, 1010.0)
    assert said(first.startup) == (True, "GET /health answers 200")
    assert said(first.warm_up) == (False, "warming up: 0 of 2 requests answered")
    assert said(last.warm_up) == (
        False,
        "warming up: 0 of 2 requests answered; POST /infer answers 400",
    )
    assert last.warm_up is not None and last.warm_up.failures == 2
    assert (last.liveness, last.readiness) == (None, None)
    server.answers["/infer"] = {}
    last = looks(model, 1000.0, 1010.0)[-1]
    assert said(last.warm_up) == (True, "it is warm")
    assert said(last.readiness) == (True, "GET /health answers 200")


def test_it_is_warmed_up_once_its_models_are_loaded(server: Server) -> None:
    class Backend(BackendBase):
        state = LoadState.LOADING

        def placement_state(self, item: Placement, *_: object) -> PlacementState:
            return PlacementState(item.model, self.state, digest=item.digest)

    backend = Backend()
    what = probed(HttpCheck("/health"), warm_up=WarmUp(CALL), placements=(placement("a", 0),))
    model = target(what, server.port, backend)
    health = looks(model, 1000.0)[-1]
    assert health.warm_up is None and said(health.liveness) == (True, "GET /health answers 200")
    assert "/infer" not in server.asked
    backend.state = LoadState.LOADED
    assert looks(model, 1000.0)[-1].warm_up is not None


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
