"""What clients can cost: connections, header bytes, time. All on loopback, all bounded."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from statistics import median

import pytest

from mic_supervisor.http.connections import MAX_CONNECTIONS, MAX_HEADER
from tests.support.slow_clients import answers, connect, crowd, dripping, scrape, serve
from tests.support.waiting import http, until

CLIENTS = 1000
TIMEOUT = 2.0  # seconds that the impatient server gives a client; the other one gives 10


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
    server = serve(number, request_timeout=TIMEOUT)
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


def test_metrics_are_answered_beside_1000_slow_clients(port: int) -> None:
    """How quickly is told by `make bench`."""
    with crowd(port, CLIENTS) as clients, dripping(clients):
        times = [scrape(port) for _ in range(20)]
    assert median(times) < 2, times  # whoever waited for one of them would take 10 s


def test_who_waits_longest_makes_room_and_the_newest_is_served(port: int) -> None:
    with crowd(port, MAX_CONNECTIONS + 50) as clients:
        assert scrape(port) < 5
        until(lambda: all(map(is_closed, clients[:50])), "room for the newest")
        # Whoever sends nothing for 10 s is dropped as well: all are looked at at once.
        closed = [is_closed(client) for client in clients]
    assert sum(closed) >= 50
    assert all(closed[:50])
    assert not any(closed[-50:])


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
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
            assert time.monotonic() - began < TIMEOUT + 6
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
        until(lambda: reset(blocked), "the end of who does not read", timeout=TIMEOUT + 4)
    assert scrape(impatient) < 5


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
        assert time.monotonic() - began < 9  # it gives a client 10 s
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
