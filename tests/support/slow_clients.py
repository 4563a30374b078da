"""An HTTP server that shows a good machine, and many clients that hold its connections."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from mic_supervisor.config.settings import Address
from mic_supervisor.http.access import Access
from mic_supervisor.http.server import HttpServer
from tests.support.waiting import http
from tests.unit.http import views_of


def serve(number: int, **values: float) -> HttpServer:
    """The server for a port, not yet started."""
    shown = views_of.good()
    return HttpServer(
        Address("127.0.0.1", number), Access(), lambda: shown, stall_after=3600.0, **values
    )


def answers(number: int) -> bool:
    return http(f"http://127.0.0.1:{number}/healthz").status == 200


def connect(port: int, first: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=5)
    client.sendall(first)
    return client


@contextlib.contextmanager
def crowd(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Clients that hold a connection: a third idle, a third in a header, a third not reading."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 500:
        pytest.skip(f"cannot run: this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 500), hard))
    starts = (b"", b"GET /metrics HTTP/1.1\r\nHost: a\r\nX-Slow: ", b"GET /metrics HTTP/1.1\r\n")
    clients: list[socket.socket] = []
    try:
        for number in range(count):
            clients.append(connect(port, starts[number % 3]))
        yield clients
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def dripping(clients: list[socket.socket]) -> Iterator[None]:
    """One more byte of its header from every client, again and again."""
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.2):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def scrape(port: int) -> float:
    """Seconds that one answer from /metrics takes, on a connection of its own."""
    began = time.perf_counter()
    answer = http(f"http://127.0.0.1:{port}/metrics")
    took = time.perf_counter() - began
    assert answer.status == 200, answer
    assert "mic_gpu_info" in answer.text
    return took
