#!/usr/bin/env python3
"""A small HTTP model server for tests, with the awkwardness of real ones on demand.

Standard library only; it is `model-server` in mic-test/server:1 and runs on the host as well.

GET /health, /ready     200 "ok", unless told otherwise
GET /env, /args, /pid   JSON: the environment, the arguments, {"pid": …, "children": […]}
GET /v1/models          the list of a completion server, with $MODEL in it
PUT /PATH?status=503&delay=2   from now on GET /PATH answers this status after this many seconds,
                        with the request's body as its own
DELETE /PATH            takes that back
POST /exit?code=3       ends the server with this code

Environment: HOST (127.0.0.1), PORT (8000; `--port N` wins), MODEL ("model"),
START_DELAY  seconds before the port is bound: connections are refused until then
READY_DELAY  seconds after that in which /health and /ready answer 503
EXIT_AFTER   ends by itself so many seconds after its start, with EXIT_CODE (1): 0 is a crash loop
EXIT_UNLESS  a path: as EXIT_AFTER=0, as long as the path does not exist
IGNORE_SIGTERM=1  only KILL ends it
STOP_DELAY   seconds from SIGTERM to the end
CHILDREN     so many child processes, which ignore SIGTERM and the parent's end
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

BORN = time.monotonic()


def log(text: str) -> None:
    print(text, flush=True)


def leave(code: int) -> None:
    log(f"exiting with {code}")
    os._exit(code)  # from any thread, and without waiting for the others


def seconds(name: str) -> float:
    return float(os.environ.get(name, "0"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: ClassVar[dict[str, tuple[int, float, bytes]]] = {}
    ready_at: ClassVar[float] = 0.0
    children: ClassVar[list[int]] = []

    def _answer(self, status: int, body: bytes | Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _request(self) -> tuple[str, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        return parts.path, query, self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def do_GET(self) -> None:
        path, _, _ = self._request()
        if path in self.told:
            status, delay, body = self.told[path]
            time.sleep(delay)
            self._answer(status, body)
        elif path in ("/health", "/ready"):
            up = time.monotonic() >= self.ready_at
            self._answer(200 if up else 503, b"ok" if up else b"not yet")
        elif path == "/env":
            self._answer(200, dict(os.environ))
        elif path == "/args":
            self._answer(200, sys.argv[1:])
        elif path == "/pid":
            self._answer(200, {"pid": os.getpid(), "children": self.children})
        elif path == "/v1/models":
            model = {"id": os.environ.get("MODEL", "model"), "object": "model"}
            self._answer(200, {"object": "list", "data": [model]})
        else:
            self._answer(404, {"error": f"no {path} here"})

    def do_PUT(self) -> None:
        path, query, body = self._request()
        self.told[path] = int(query.get("status", 200)), float(query.get("delay", 0)), body
        self._answer(200, b"")

    def do_DELETE(self) -> None:
        path, _, _ = self._request()
        self.told.pop(path, None)
        self._answer(200, b"")

    def do_POST(self) -> None:
        path, query, _ = self._request()
        if path != "/exit":
            self._answer(404, {"error": f"no {path} here"})
            return
        self._answer(200, b"")
        leave(int(query.get("code", 1)))

    def log_message(self, format: str, *args: Any) -> None:
        log(f"{self.command} {self.path} {args[1]}")


def spawn_children(count: int) -> list[int]:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    return [subprocess.Popen([sys.executable, "-c", code]).pid for _ in range(count)]


def on_sigterm(*_: object) -> None:
    if os.environ.get("IGNORE_SIGTERM") == "1":
        log("ignoring SIGTERM")
        return
    log("SIGTERM")
    threading.Timer(seconds("STOP_DELAY"), leave, [0]).start()


def main() -> None:
    # PID 1 of a container has no default action for a signal, so there must be a handler.
    signal.signal(signal.SIGTERM, on_sigterm)
    signal.signal(signal.SIGINT, on_sigterm)
    argv = sys.argv[1:]
    port = int(argv[argv.index("--port") + 1] if "--port" in argv else os.environ.get("PORT", 8000))
    exit_code = int(os.environ.get("EXIT_CODE", "1"))
    log(f"starting, PID {os.getpid()}")
    Handler.children = spawn_children(int(os.environ.get("CHILDREN", "0")))
    needed = os.environ.get("EXIT_UNLESS")
    if needed and not Path(needed).exists():
        leave(exit_code)
    if "EXIT_AFTER" in os.environ:
        threading.Timer(seconds("EXIT_AFTER"), leave, [exit_code]).start()
    time.sleep(seconds("START_DELAY"))
    server = ThreadingHTTPServer((os.environ.get("HOST", "127.0.0.1"), port), Handler)
    server.daemon_threads = True
    Handler.ready_at = time.monotonic() + seconds("READY_DELAY")
    log(f"listening on {port} after {time.monotonic() - BORN:.1f} s")
    server.serve_forever()


if __name__ == "__main__":
    main()
