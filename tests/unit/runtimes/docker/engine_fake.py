"""An HTTP server on a unix socket in place of an engine, for faults that a real one does not make.

Tests put answers per "METHOD /path" (without the version); what has no answer is 404 with the
engine's wording. Requests are recorded with their version.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.errors import MicError
from mic_supervisor.model import ContainerSpec, Identity, Launch, ObservedWorkload, RunState
from mic_supervisor.runtimes.docker.create import labels

IDENTITY = Identity("default", "h", "mam", "MAM", "container", ("GPU-1",), {}, {}, "abc")
LAUNCH = Launch("mic-mam", "docker", IDENTITY, ContainerSpec("x:1", command=("/serve",)))
WORKLOAD = ObservedWorkload("docker", "mic-mam", "c1", IDENTITY, RunState.RUNNING)

OURS = {
    "Id": "c1",
    "Path": "/serve",
    "Config": {"Labels": labels(IDENTITY), "Image": "x:1"},
    "State": {"Status": "created", "StartedAt": "0001-01-01T00:00:00Z"},
}
"""WORKLOAD as the engine describes it, before its first start."""

Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        path, _, self.query = self.path.partition("?")
        match = re.match(r"/v(\d+\.\d+)(/.*)", path)
        version, bare = (match[1], match[2]) if match else ("", path)
        fake = self.server.fake
        fake.requests.append((version, f"{self.command} {bare}"))
        if version and fake.speaks is not None and version != fake.speaks:
            self.refuse(400, fake.refusal.format(version=version, speaks=fake.speaks))
            return
        answer = fake.answers.get(f"{self.command} {bare}")
        if answer is None:
            self.refuse(404, f"No such container: {bare.split('/')[2] if '/' in bare[1:] else ''}")
        else:
            answer(self)

    def end_headers(self) -> None:
        if self.close_connection:  # as an engine says, and else it is used again
            self.send_header("Connection", "close")
        super().end_headers()

    do_GET = do_POST = do_DELETE = do_HEAD = _any

    def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str) -> None:
        self.send(status, json.dumps({"message": message}).encode())

    def begin(self) -> None:
        """The head of a chunked answer; `chunk` goes on."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        return


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64  # calls that come at once; an engine has 4,096
    fake: FakeEngine

    def get_request(self) -> Any:
        request, _ = super().get_request()
        self.fake.connections.append(request)
        return request, ("fake", 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client that hung up is part of the plan


class FakeEngine:
    """`speaks` is the only API version it takes (None: any); `refusal` its words for another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"unix://{path}"
        self.speaks: str | None = None
        self.refusal = (
            "client version {version} is too new. Maximum supported API version is {speaks}"
        )
        self.requests: list[tuple[str, str]] = []
        self.answers: dict[str, Answer] = {
            "GET /containers/json": reply([]),
            "GET /_ping": lambda handler: handler.send(200, b"OK"),
            "GET /version": lambda handler: reply({"ApiVersion": self.speaks or "1.50"})(handler),
        }
        self.connections: list[socket.socket] = []
        self._server = _Server(str(path), Handler)
        self._server.fake = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def asked(self, what: str) -> int:
        return sum(asked == what for _, asked in self.requests)

    def close(self) -> None:
        """Ends like a process: connections that are kept alive fall, too."""
        self._server.shutdown()
        self._server.socket.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def reply(value: Any, status: int = 200) -> Answer:
    return lambda handler: handler.send(status, json.dumps(value).encode())


def refuse(status: int, message: str) -> Answer:
    return lambda handler: handler.refuse(status, message)


def hang(seconds: float = 5.0) -> Answer:
    return lambda handler: time.sleep(seconds)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def half(handler: Handler) -> None:
    """Dies in the middle of an answer."""
    handler.begin()
    handler.chunk(b'[{"Id":')
    handler.close_connection = True


def fails(call: Callable[[], object]) -> MicError:
    with pytest.raises(MicError) as caught:
        call()
    return caught.value
