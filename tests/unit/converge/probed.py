"""A server of a test's own, and what one look makes of its answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mic_supervisor.backends import BackendBase
from mic_supervisor.converge.probes import Checker, Target
from mic_supervisor.converge.tasks import Threads
from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.model import (
    Check,
    Health,
    Instance,
    Probe,
    Probes,
)
from tests.unit.plan.builders import on, program, workload

TIMEOUT = 20.0
SILENCE = object()  # the connection is closed without an answer


class Server:
    """Answers GET and POST with `answers`, by path; 404 else. A number is a status."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {"/health": {"who": "me", "all": [{"id": "a"}]}}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                found = outer.answer(self.path)
                if found is SILENCE:
                    return
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

    def answer(self, path: str) -> object:
        return self.answers.get(path)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


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
