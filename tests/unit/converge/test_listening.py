"""Whose a port is, and where a process listens instead."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mic_supervisor.converge.listening import is_own
from mic_supervisor.converge.probes import Checker, Target
from mic_supervisor.converge.tasks import Threads
from mic_supervisor.demo import server as demo_server
from mic_supervisor.host import processes
from mic_supervisor.model import (
    HttpCheck,
    Instance,
    Listener,
    Probe,
    Probes,
)
from tests.support.waiting import until
from tests.unit.converge.probed import free_port, probed, readiness, target
from tests.unit.plan.builders import on, program


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
