"""The small model server, over real HTTP."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mic_supervisor.demo import world
from tests.support import waiting
from tests.support.waiting import until

PROGRAM = (sys.executable, str(Path(world.__file__).with_name("server.py")))


class DemoServer:
    def __init__(self, port: int, model: str, *arguments: str) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [*PROGRAM, "--port", str(port), "--model", model, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.first_lines = [self.process.stdout.readline() for _ in range(2)]

    def get(self, path: str, method: str = "GET", body: object = None) -> waiting.Answer:
        return waiting.http(self.url + path, method, body)

    def end(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        rest, _ = self.process.communicate(timeout=10)
        return "".join(self.first_lines) + rest


@pytest.fixture
def serve(free_port: Callable[[], int]) -> Iterator[Callable[..., DemoServer]]:
    started: list[DemoServer] = []

    def start(model: str = "MAM", *arguments: str) -> DemoServer:
        started.append(DemoServer(free_port(), model, *arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_it_serves_one_model(serve: Callable[..., DemoServer]) -> None:
    server = serve("换脸 1")
    assert server.first_lines[0] == f"starting, PID {server.process.pid}\n"
    assert re.fullmatch(rf"listening on {server.port} after \d\.\d s\n", server.first_lines[1])
    assert server.get("/health") == (200, "ok")
    assert server.get("/v2/models/%E6%8D%A2%E8%84%B8%201").json() == {
        "name": "换脸 1",
        "platform": "demo",
        "ready": True,
    }
    answer = server.get("/infer", "POST", {"prompt": "ü"}).json()
    assert 0 <= answer.pop("latency") < 1
    assert answer == {"model": "换脸 1", "pid": server.process.pid, "input": {"prompt": "ü"}}


def test_it_is_not_healthy_until_its_model_is_loaded(serve: Callable[..., DemoServer]) -> None:
    server = serve("MAM", "--ready-delay", "0.6")
    assert server.get("/health") == (503, "loading")
    assert server.get("/infer", "POST", {}).status == 503
    assert 'demo_ready{model="MAM"} 0\n' in server.get("/metrics").text
    until(lambda: server.get("/health").status == 200, "the model")
    assert 'demo_ready{model="MAM"} 1\n' in server.get("/metrics").text


def test_its_metrics_count(serve: Callable[..., DemoServer]) -> None:
    server = serve('a"b')
    for _ in range(3):
        server.get("/infer", "POST", {})
    lines = server.get("/metrics").text.splitlines()
    assert 'demo_requests_total{model="a\\"b"} 3' in lines


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "error"),
    [
        ("/", "GET", None, 404, "there is no /"),
        ("/v2/models/other", "GET", None, 404, "there is no /v2/models/other"),
        ("/infer", "GET", None, 405, "use POST"),
        ("/health", "POST", {}, 404, "there is no /health"),
        ("/infer", "POST", "{", 400, "the body is not JSON: "),
        pytest.param("/infer", "POST", "1" * (2 << 20), 413, "more than 1048576 bytes", id="big"),
    ],
)
def test_what_it_does_not_do_is_an_error(
    serve: Callable[..., DemoServer],
    path: str,
    method: str,
    body: object,
    status: int,
    error: str,
) -> None:
    server = serve()
    if status == 413:  # answered before the body was read
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        client.putrequest(method, path)
        client.putheader("Content-Length", str(len(str(body))))
        client.endheaders()
        answer = client.getresponse()
        assert (answer.status, json.loads(answer.read())) == (status, {"error": error})
        client.close()
        return
    given = server.get(path, method, body)
    assert given.status == status
    assert given.json()["error"].startswith(error)


def test_nonsense_does_not_harm_it(serve: Callable[..., DemoServer]) -> None:
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        client.recv(4096)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /infer HTTP/1.1\r\n\r\n")
        assert b" 411 " in client.recv(4096)
    assert server.get("/health").status == 200
    assert "Traceback" not in server.end()


def test_sigterm_ends_it_well(serve: Callable[..., DemoServer]) -> None:
    server = serve()
    idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    idle.request("GET", "/health")
    idle.getresponse().read()  # kept open, as a scraper does
    before = time.monotonic()
    said = server.end()
    assert time.monotonic() - before < 2.0
    assert server.process.returncode == 0
    assert said.endswith("SIGTERM\nexiting with 0\n")
    idle.close()


def test_sigterm_lets_a_request_that_is_under_way_finish(serve: Callable[..., DemoServer]) -> None:
    server = serve()
    statuses: list[int] = []
    ask = threading.Thread(
        target=lambda: statuses.append(server.get("/infer?delay=0.5", "POST", {}).status)
    )
    threads = Path(f"/proc/{server.process.pid}/task")
    idle = len([*threads.iterdir()])
    ask.start()
    until(lambda: len([*threads.iterdir()]) > idle, "the request to be there")
    time.sleep(0.1)
    server.end()
    ask.join()
    assert statuses == [200]


def test_many_ask_at_once(serve: Callable[..., DemoServer]) -> None:
    server = serve()
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(server.get("/infer", "POST", {}).status))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 20
    assert 'demo_requests_total{model="MAM"} 20' in server.get("/metrics").text


def test_a_port_that_is_taken_is_said(serve: Callable[..., DemoServer]) -> None:
    server = serve()
    done = subprocess.run(
        [*PROGRAM, "--model", "X", "--port", str(server.port)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert done.stderr == f"cannot listen on 127.0.0.1:{server.port}: Address already in use\n"


def test_it_starts_light(serve: Callable[..., DemoServer]) -> None:
    def cpu() -> float:
        server = serve()
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100  # the clock ticks of proc(5)

    assert min(cpu() for _ in range(3)) <= 0.15
