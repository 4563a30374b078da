"""What clients can cost: connections, header bytes, time. All on loopback, all bounded."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median

import pytest

from mic_supervisor.config.settings import Address
from mic_supervisor.http.access import Access
from mic_supervisor.http.connections import MAX_CONNECTIONS, MAX_HEADER
from mic_supervisor.http.server import HttpServer
from tests.support.waiting import http, until
from tests.unit.http import views_of

CLIENTS = 1000
PATIENCE = 2.0  # seconds that the impatient server gives a client; the other one gives 10


def serve(number: int, **values: float) -> HttpServer:
    """A server that shows the good machine, not yet started."""
    shown = views_of.good()
    return HttpServer(
        Address("127.0.0.1", number), Access(), lambda: shown, stall_after=3600.0, **values
    )


def answers(number: int) -> bool:
    return http(f"http://127.0.0.1:{number}/healthz").status == 200


@pytest.fixture
def port(free_port: Callable[[], int]) -> Iterator[int]:
    number = free_port()
    server = serve(number)
    server.start()
    until(lambda: answers(number), "the server")
    yield number
    server.stop()


@pytest.fixture
def impatient(free_port: Callable[[], int]) -> Iterator[int]:
    number = free_port()
    server = serve(number, patience=PATIENCE)
    server.start()
    until(lambda: answers(number), "the server")
    yield number
    server.stop()


def test_it_can_be_reached_once_it_was_started(free_port: Callable[[], int]) -> None:
    """systemd is told that the daemon is ready after that: nobody's first request is refused."""
    number = free_port()
    server = serve(number)
    server.start()
    try:
        assert answers(number)
    finally:
        server.stop()


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


def scrape(port: int) -> float:
    """Seconds that one answer from /metrics takes, on a connection of its own."""
    began = time.perf_counter()
    answer = http(f"http://127.0.0.1:{port}/metrics")
    took = time.perf_counter() - began
    assert answer.status == 200, answer
    assert "mic_gpu_info" in answer.text
    return took


def test_metrics_answer_within_50_ms_beside_1000_slow_clients(port: int) -> None:
    over = threading.Event()
    with crowd(port, CLIENTS) as clients:
        dripping = threading.Thread(target=drip, args=(clients, over))
        dripping.start()
        try:
            times = [scrape(port) for _ in range(20)]
        finally:
            over.set()
            dripping.join()
    assert median(times) < 0.05, times


def drip(clients: list[socket.socket], over: threading.Event) -> None:
    """One more byte of its header from every client, again and again."""
    while not over.wait(0.2):
        for client in clients:
            with contextlib.suppress(OSError):
                client.send(b"x")


def test_who_waits_longest_makes_room_and_the_newest_is_served(port: int) -> None:
    with crowd(port, MAX_CONNECTIONS + 50) as clients:
        assert scrape(port) < 1
        closed = [is_closed(client) for client in clients]
    assert sum(closed) >= 50
    assert all(closed[:50])
    assert not any(closed[-50:])


def is_closed(client: socket.socket) -> bool:
    client.settimeout(0.02)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_header_that_never_ends_is_cut_off(port: int) -> None:
    with connect(port, b"GET / HTTP/1.1\r\nHost: a\r\nX: ") as client:
        with contextlib.suppress(OSError):
            for _ in range(2 * MAX_HEADER // 1024):
                client.sendall(b"x" * 1024)
                time.sleep(0.001)
        client.settimeout(5)
        try:
            answer = client.recv(4096)
        except ConnectionResetError:
            return
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /metrics HTTP/1.1\r\nHost: a\r\nX-Slow: ", id="half a header"),
        pytest.param(
            b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n", id="half a body"
        ),
    ],
)
def test_who_goes_on_sending_slowly_is_dropped_all_the_same(impatient: int, first: bytes) -> None:
    with connect(impatient, first) as client:
        began = time.monotonic()
        while not is_closed_after(client, 0.5):
            if first:
                with contextlib.suppress(OSError):
                    client.send(b"x")
            assert time.monotonic() - began < PATIENCE + 3
    assert time.monotonic() - began > 1


def is_closed_after(client: socket.socket, seconds: float) -> bool:
    client.settimeout(seconds)
    try:
        return client.recv(65536) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_who_does_not_read_the_answer_is_dropped(impatient: int) -> None:
    """Pipelined requests whose answers fill every buffer between here and there."""
    request = b"GET / HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\n\r\n"
    blocked = connect_unread(impatient, request)
    with blocked:
        until(lambda: reset(blocked), "the end of who does not read", timeout=PATIENCE + 4)
    assert scrape(impatient) < 1


def connect_unread(port: int, request: bytes) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.settimeout(0.2)
    with contextlib.suppress(OSError):
        for _ in range(3000):
            client.sendall(request)
    return client


def reset(client: socket.socket) -> bool:
    """Whether the other end has let go, found out without reading."""
    try:
        client.send(b"G")
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def test_stopping_takes_no_longer_for_clients_that_hang(free_port: Callable[[], int]) -> None:
    number = free_port()
    server = serve(number)
    server.start()
    until(lambda: answers(number), "the server")
    with crowd(number, 20):
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 4
    assert http(f"http://127.0.0.1:{number}/healthz").status == 0


def test_an_address_that_is_taken_is_had_when_it_is_free(free_port: Callable[[], int]) -> None:
    number = free_port()
    server = serve(number, retry=0.2)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended, lingers
        other.bind(("127.0.0.1", number))
        other.listen()
        server.start()
        time.sleep(0.5)
    try:
        until(lambda: answers(number), "the server")
    finally:
        server.stop()
