"""A model server that serves nobody's model: what demos and tests run where a real one would be.

`python -m mic_supervisor.demo.server --port N --model NAME --start-delay S` answers
GET /health (503 until the delay has passed, as a server that loads its model does),
GET /v2/models/NAME, GET /metrics, and POST /infer, which gives back the JSON that it got. SIGTERM
lets requests that are under way finish. The standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import socketserver
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

_LARGEST = 1 << 20  # bytes of a request's body
_IDLE = 5.0  # seconds that a connection may say nothing


class Model:
    """What the server knows about the model that it pretends to serve."""

    def __init__(self, name: str, start_delay: float) -> None:
        self.name = name
        self._started = time.monotonic()
        self._start_delay = start_delay
        self._lock = threading.Lock()
        self._requests = 0
        self._seconds = 0.0

    @property
    def ready(self) -> bool:
        return time.monotonic() - self._started >= self._start_delay

    def infer(self, given: Any) -> dict[str, Any]:
        """The answer to one request; `latency` is in seconds."""
        before = time.monotonic()
        answer = {"model": self.name, "pid": os.getpid(), "input": given}
        latency = time.monotonic() - before
        with self._lock:
            self._requests += 1
            self._seconds += latency
        return {**answer, "latency": latency}

    def metrics(self) -> str:
        """Prometheus text format 0.0.4."""
        name = self.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        label = f'{{model="{name}"}}'
        with self._lock:
            requests, seconds = self._requests, self._seconds
        return (
            "# HELP demo_ready Whether the model is loaded.\n"
            "# TYPE demo_ready gauge\n"
            f"demo_ready{label} {int(self.ready)}\n"
            "# HELP demo_requests_total Inference requests answered.\n"
            "# TYPE demo_requests_total counter\n"
            f"demo_requests_total{label} {requests}\n"
            "# HELP demo_request_seconds_total Time spent on them.\n"
            "# TYPE demo_request_seconds_total counter\n"
            f"demo_request_seconds_total{label} {seconds:.6f}\n"
        )


class Handler(BaseHTTPRequestHandler):
    """One connection, with keep-alive."""

    protocol_version = "HTTP/1.1"
    server_version = "mic-demo"
    timeout = _IDLE
    server: Server

    def do_GET(self) -> None:
        model = self.server.model
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._send(HTTPStatus.OK, model.metrics(), "text/plain; version=0.0.4")
        elif path in ("/health", "/v2/health/ready"):
            state = {"status": "ok" if model.ready else "loading", "model": model.name}
            self._answer(HTTPStatus.OK if model.ready else HTTPStatus.SERVICE_UNAVAILABLE, state)
        elif unquote(path) == f"/v2/models/{model.name}":
            self._answer(
                HTTPStatus.OK, {"name": model.name, "platform": "demo", "ready": model.ready}
            )
        elif path == "/infer":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "use POST", allow="POST")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {path}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
            return
        if int(length) > _LARGEST:
            self.close_connection = True
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {_LARGEST} bytes")
            return
        body = self.rfile.read(int(length))
        path = self.path.partition("?")[0]
        if path != "/infer":
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {path}")
        elif not self.server.model.ready:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the model is loading")
        else:
            try:
                given = json.loads(body or b"null")
            except ValueError as error:
                self._refuse(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}")
                return
            self._answer(HTTPStatus.OK, self.server.model.infer(given))

    def _refuse(self, status: HTTPStatus, reason: str, *, allow: str | None = None) -> None:
        self._answer(status, {"error": reason}, allow=allow)

    def _answer(
        self, status: HTTPStatus, document: dict[str, Any], *, allow: str | None = None
    ) -> None:
        self._send(status, json.dumps(document) + "\n", "application/json", allow)

    def _send(self, status: HTTPStatus, text: str, kind: str, allow: str | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if allow:
            self.send_header("Allow", allow)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        # Probes come every few seconds; what a person looks for in a log is the rest.
        if not getattr(self, "path", "").startswith(("/health", "/metrics", "/v2/health")):
            sys.stdout.write(f"{self.address_string()} {format % args}\n")
            sys.stdout.flush()


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread per connection. Closing it waits for the requests that are under way."""

    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], model: Model) -> None:
        self.model = model
        self._open: set[socket.socket] = set()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        # A connection that idles reads its end now; one that is answering still can.
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RD)
        super().server_close()


def serve(host: str, port: int, model: Model) -> None:
    """Until SIGTERM or SIGINT. Raises OSError when the port cannot be had."""
    with Server((host, port), model) as server:

        def end(number: int, frame: object) -> None:  # noqa: ARG001
            # `shutdown` waits for the loop that this handler interrupts.
            threading.Thread(target=server.shutdown).start()

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        sys.stdout.write(f"{model.name}: listening on {host}:{server.server_address[1]}\n")
        sys.stdout.flush()
        server.serve_forever(poll_interval=0.1)
    sys.stdout.write(f"{model.name}: ended\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo-server", description="A small model server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0 takes any that is free")
    parser.add_argument("--model", required=True)
    parser.add_argument("--start-delay", type=float, default=0.0, metavar="SECONDS")
    given = parser.parse_args(arguments)
    try:
        serve(given.host, given.port, Model(given.model, given.start_delay))
    except OSError as error:
        sys.stderr.write(f"cannot listen on {given.host}:{given.port}: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
