#!/usr/bin/env python3
"""A small model server: what demos and tests run where a real one would be.

Standard library only, and one file: it is `model-server` in mic-test/server:1 as well.

GET /health, /ready, /v2/health/ready   200 "ok", and 503 "loading" before that
GET /v2/models/MODEL, /v1/models        what servers of these protocols say of a model
GET /metrics                            Prometheus text format 0.0.4
POST /infer?delay=2                     gives back the JSON that it got
GET /env, /args, /pid                   the environment, the arguments, {"pid": …, "children": […]}
PUT /PATH?status=503&delay=2            from now on GET and POST /PATH answer this status and the
                                        request's body, after this many seconds, and count nothing;
                                        DELETE /PATH takes that back
POST /exit?code=3                       ends the server with this code

Each setting is an option or an environment variable: `--ready-delay 2` or READY_DELAY=2.
HOST (127.0.0.1), PORT (8000; 0 takes any that is free), MODEL ("model")
START_DELAY     seconds before the port is bound: connections are refused until then
READY_DELAY     seconds after that in which the model loads
EXIT_AFTER      the server ends so many seconds after its start, with EXIT_CODE (1)
EXIT_UNLESS     a path: as EXIT_AFTER=0, as long as the path does not exist
IGNORE_SIGTERM  1: only KILL ends it
STOP_DELAY      seconds from SIGTERM to the end; requests for /infer are answered in any case
CHILDREN        so many child processes, which ignore SIGTERM and the parent's end
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGEST = 1 << 20  # bytes of a request's body
QUIET = ("/health", "/ready", "/metrics", "/v2/health")  # asked every few seconds
BORN = time.monotonic()


def log(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def setting(name: str, default: str = "") -> str:
    option = f"--{name.lower().replace('_', '-')}"
    if option in sys.argv[1:-1]:
        return sys.argv[sys.argv.index(option) + 1]
    return os.environ.get(name, default)


class Model:
    """The model that is pretended to be served, and what was asked of it."""

    def __init__(self) -> None:
        self.name = setting("MODEL", "model")
        self.ready_at = float("inf")
        self.scripted: dict[str, tuple[int, float, bytes]] = {}
        self.children: list[int] = []
        self.busy = self.requests = 0
        self.seconds = 0.0
        self.lock = threading.Lock()

    @property
    def ready(self) -> bool:
        return time.monotonic() >= self.ready_at

    def metrics(self) -> bytes:
        name = self.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        with self.lock:
            rows = (
                ("ready", "gauge", "Whether the model is loaded.", f"{self.ready:d}"),
                ("requests_total", "counter", "Inference requests answered.", f"{self.requests}"),
                ("request_seconds_total", "counter", "Time for them.", f"{self.seconds:.6f}"),
            )
        return "".join(
            f"# HELP demo_{metric} {text}\n# TYPE demo_{metric} {kind}\n"
            f'demo_{metric}{{model="{name}"}} {value}\n'
            for metric, kind, text, value in rows
        ).encode()


MODEL = Model()


def leave(code: int) -> None:
    while MODEL.busy:
        time.sleep(0.01)
    log(f"exiting with {code}")
    os._exit(code)  # from any thread, and without waiting for the others


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "mic-model-server"

    def answer(self, status: int, body: Any = b"", kind: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if status == 405:
            self.send_header("Allow", "POST")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in MODEL.scripted:
            self.follow_script(path)
        elif path in ("/health", "/ready", "/v2/health/ready"):
            self.answer(200 if MODEL.ready else 503, b"ok" if MODEL.ready else b"loading")
        elif path == "/metrics":
            self.answer(200, MODEL.metrics(), "text/plain; version=0.0.4")
        elif unquote(path) == f"/v2/models/{MODEL.name}":
            self.answer(200, {"name": MODEL.name, "platform": "demo", "ready": MODEL.ready})
        elif path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": MODEL.name, "object": "model"}]})
        elif path == "/env":
            self.answer(200, dict(os.environ))
        elif path == "/args":
            self.answer(200, sys.argv[1:])
        elif path == "/pid":
            self.answer(200, {"pid": os.getpid(), "children": MODEL.children})
        elif path == "/infer":
            self.answer(405, {"error": "use POST"})
        else:
            self.answer(404, {"error": f"there is no {path}"})

    do_HEAD = do_GET

    def follow_script(self, path: str) -> None:
        status, delay, body = MODEL.scripted[path]
        time.sleep(delay)
        self.answer(status, body)

    def do_PUT(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST:
            self.close_connection = True
            if length.isdigit():
                self.answer(413, {"error": f"more than {LARGEST} bytes"})
            else:
                self.answer(411, {"error": "Content-Length is missing"})
            return
        parts, body = urlsplit(self.path), self.rfile.read(int(length))
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        delay = float(query.get("delay", 0))
        if self.command == "PUT":
            MODEL.scripted[parts.path] = int(query.get("status", 200)), delay, body
            self.answer(200)
        elif parts.path in MODEL.scripted:
            self.follow_script(parts.path)
        elif parts.path == "/exit":
            self.answer(200)
            leave(int(query.get("code", 1)))
        elif parts.path != "/infer":
            self.answer(404, {"error": f"there is no {parts.path}"})
        elif not MODEL.ready:
            self.answer(503, {"error": "the model is loading"})
        else:
            self.infer(body, delay)

    do_POST = do_PUT

    def do_DELETE(self) -> None:
        MODEL.scripted.pop(urlsplit(self.path).path, None)
        self.answer(200)

    def infer(self, body: bytes, delay: float) -> None:
        before = time.monotonic()
        with MODEL.lock:
            MODEL.busy += 1
        time.sleep(delay)
        try:
            given = json.loads(body or b"null")
        except ValueError as error:
            self.answer(400, {"error": f"the body is not JSON: {error}"})
        else:
            document = {"model": MODEL.name, "pid": os.getpid(), "input": given}
            latency = time.monotonic() - before
            with MODEL.lock:
                MODEL.requests += 1
                MODEL.seconds += latency
            self.answer(200, {**document, "latency": latency})
        finally:
            with MODEL.lock:
                MODEL.busy -= 1

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ARG002
        if not getattr(self, "path", "").startswith(QUIET):
            log(f"{self.command or '?'} {getattr(self, 'path', '?')} {args[1]}")


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def on_sigterm(*_: object) -> None:
    if setting("IGNORE_SIGTERM") == "1":
        log("ignoring SIGTERM")
        return
    log("SIGTERM")
    threading.Timer(float(setting("STOP_DELAY", "0")), leave, [0]).start()


def main() -> None:
    # PID 1 of a container has no default action for a signal, so there must be a handler.
    signal.signal(signal.SIGTERM, on_sigterm)
    signal.signal(signal.SIGINT, on_sigterm)
    host, port = setting("HOST", "127.0.0.1"), int(setting("PORT", "8000"))
    exit_code, exit_after = int(setting("EXIT_CODE", "1")), setting("EXIT_AFTER")
    log(f"starting, PID {os.getpid()}")
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    for _ in range(int(setting("CHILDREN", "0"))):
        MODEL.children.append(subprocess.Popen([sys.executable, "-c", code]).pid)
    if (needed := setting("EXIT_UNLESS")) and not Path(needed).exists():
        leave(exit_code)
    if exit_after:
        threading.Timer(float(exit_after), leave, [exit_code]).start()
    time.sleep(float(setting("START_DELAY", "0")))
    if ":" in host:
        Server.address_family = socket.AF_INET6
    try:
        server = Server((host, port), Handler)
    except OSError as error:
        sys.exit(f"cannot listen on {host}:{port}: {error.strerror}")
    MODEL.ready_at = time.monotonic() + float(setting("READY_DELAY", "0"))
    log(f"listening on {server.server_address[1]} after {time.monotonic() - BORN:.1f} s")
    server.serve_forever()


if __name__ == "__main__":
    main()
