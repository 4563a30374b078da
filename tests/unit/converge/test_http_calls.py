"""One bounded call to a server that behaves as real ones do, and worse."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from mic_supervisor.converge.http_calls import Answer, HttpCalls, NoAnswer

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Talk = Callable[[socket.socket], object]


class Server:
    """Reads the head of a request, answers with `talk` and closes."""

    def __init__(self, talk: Talk, host: str = "127.0.0.1") -> None:
        self.heads: list[str] = []
        self.kept: list[socket.socket] = []
        self._talk = talk
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                threading.Thread(
                    target=self._answer, args=self.listener.accept()[:1], daemon=True
                ).start()

    def _answer(self, peer: socket.socket) -> None:
        with peer, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += peer.recv(4096)
            self.heads.append(head.decode())
            self._talk(peer)


@contextmanager
def serving(talk: bytes | Talk, host: str = "127.0.0.1") -> Iterator[Server]:
    server = Server((lambda peer: peer.sendall(talk)) if isinstance(talk, bytes) else talk, host)
    with closing(server.listener):
        yield server


def ask(
    port: int,
    *,
    host: str = "127.0.0.1",
    method: str = "GET",
    path: str = "/health",
    body: str | None = None,
    timeout: float = 5.0,
) -> Answer:
    return asyncio.run(HttpCalls().ask(host, port, method, path, body=body, timeout=timeout))


def failure(port: int, *, timeout: float = 5.0) -> NoAnswer:
    with pytest.raises(NoAnswer) as raised:
        ask(port, timeout=timeout)
    return raised.value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def drip(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        peer.sendall(b".")
        time.sleep(0.05)


# --- what is sent and what comes back -----------------------------------------------------------


def test_sends_as_it_is_told_and_keeps_no_connection() -> None:
    with serving(OK) as server:
        answer = ask(server.port, method="POST", path="/v2/a%20b/load?x=%2F", body='{"a": "ü"}')
    assert (answer, answer.ok) == (Answer(200, "ok"), True)
    first, *others = server.heads[0].split("\r\n")
    sent = dict(line.lower().split(": ") for line in others if ": " in line)
    assert first == "POST /v2/a%20b/load?x=%2F HTTP/1.1"
    assert sent["content-type"] == "application/json"
    assert sent["content-length"] == "11"
    assert (sent["connection"], sent["accept-encoding"]) == ("close", "identity")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_closes_its_end_even_where_the_server_would_keep_it(host: str) -> None:
    over = threading.Event()

    def talk(peer: socket.socket) -> None:
        peer.sendall(OK.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n"))
        if peer.recv(1) == b"":
            over.set()

    async def go() -> None:
        with serving(talk, host) as server:
            calls = HttpCalls()  # which stays, as the daemon's does
            await calls.ask(host, server.port, "GET", "/", timeout=5.0)
            assert await asyncio.to_thread(over.wait, 5.0)

    asyncio.run(go())


def test_knows_nothing_of_proxies_redirects_and_cookies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    moved = b"HTTP/1.1 302 Found\r\nLocation: /\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"

    async def go(port: int) -> list[Answer]:
        calls = HttpCalls()
        return [await calls.ask("127.0.0.1", port, "GET", "/", timeout=5.0) for _ in range(2)]

    with serving(moved) as server:
        answers = asyncio.run(go(server.port))
    assert [(one.status, one.ok) for one in answers] == [(302, True)] * 2
    assert len(server.heads) == 2
    assert not any("cookie" in head.lower() for head in server.heads)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", Answer(200, "until the end")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Answer(204, "")),
        (b"HTTP/1.1 503\r\nContent-Length: 4\r\n\r\nbusy", Answer(503, "busy")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, Answer(200, "ok")),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            Answer(200, "ok"),
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff!", Answer(200, "\ufffd!")),
    ],
)
def test_takes_every_form_of_an_answer(said: bytes, expected: Answer) -> None:
    with serving(said) as server:
        assert ask(server.port) == expected


def test_reads_no_more_of_an_answer_than_it_must() -> None:
    def endless(peer: socket.socket) -> None:
        peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            peer.sendall(b"." * 65536)

    with serving(endless) as server:
        assert len(ask(server.port, timeout=30.0).body) == 4 << 20


# --- no answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "talk",
    [
        lambda _peer: time.sleep(3),
        drip,
        lambda peer: (peer.sendall(b"HTTP/1.1 200 OK\r\nX: "), drip(peer)),
    ],
    ids=["silence", "a body that drips", "a head that drips"],
)
def test_gives_up_in_time_whatever_the_server_does(talk: Talk) -> None:
    with serving(talk) as server:
        began = time.monotonic()
        error = failure(server.port, timeout=0.4)
        assert 0.4 <= time.monotonic() - began < 2.5
    assert (str(error), error.refused, error.own) == ("no answer within 0.4 s", False, False)


def test_gives_up_in_time_on_a_port_that_lets_nobody_in() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = int(full.getsockname()[1])
        with closing(socket.create_connection(("127.0.0.1", port))):
            assert str(failure(port, timeout=0.4)) == "no answer within 0.4 s"


def test_says_where_nobody_listens() -> None:
    port = free_port()
    error = failure(port)
    assert (str(error), error.refused, error.own) == (
        f"nothing listens on port {port}",
        True,
        False,
    )


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        (lambda _: None, "“Server disconnected without sending a response"),
        (b"220 mail.example.com ESMTP\r\n\r\n", "“illegal status line"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", "“peer closed connection"),
        (lambda peer: peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4)),
         "Connection reset by peer"),
    ],
    ids=["nothing", "another protocol", "a part", "a reset"],
)  # fmt: skip
def test_says_how_a_connection_ended(talk: bytes | Talk, said: str) -> None:
    with serving(talk) as server:
        error = failure(server.port)
    assert str(error).startswith(f"the connection ended: {said}")
    assert not str(error).endswith(".")
    assert (error.refused, error.own) == (False, False)


def test_a_path_that_no_server_could_have_is_no_defect() -> None:
    with serving(OK) as server, pytest.raises(NoAnswer, match="the connection ended: "):
        ask(server.port, path="/a\nb")


# --- what this end lacks ------------------------------------------------------------------------


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lack_of_descriptors_says_nothing_of_the_server() -> None:
    async def go(port: int) -> NoAnswer:
        calls = HttpCalls()
        await calls.ask("127.0.0.1", port, "GET", "/", timeout=5.0)
        with no_descriptors(), pytest.raises(NoAnswer) as raised:
            await calls.ask("127.0.0.1", port, "GET", "/", timeout=5.0)
        await calls.ask("127.0.0.1", port, "GET", "/", timeout=5.0)
        return raised.value

    with serving(OK) as server:
        error = asyncio.run(go(server.port))
    assert str(error) == "this machine has no connection to give: Too many open files"
    assert (error.refused, error.own) == (False, True)


@pytest.mark.parametrize(
    ("number", "own"),
    [
        (errno.EADDRNOTAVAIL, True),
        (errno.ENOBUFS, True),
        (errno.EACCES, True),
        (errno.EPERM, True),
        (errno.EHOSTUNREACH, False),
        (errno.ENETUNREACH, False),
    ],
)
def test_tells_its_own_lack_from_the_servers(
    monkeypatch: pytest.MonkeyPatch, number: int, own: bool
) -> None:
    async def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    async def go() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", refuse)
        with pytest.raises(NoAnswer) as raised:
            await HttpCalls().ask("127.0.0.1", 1, "GET", "/", timeout=5.0)
        assert (raised.value.own, raised.value.refused) == (own, False)
        assert str(raised.value).endswith(os.strerror(number))

    asyncio.run(go())


# --- side by side -------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_that_hangs_holds_up_no_other_and_leaves_no_descriptor() -> None:
    def descriptors() -> int:
        return len([*Path("/proc/self/fd").iterdir()])

    async def go(port: int, hanging: int) -> None:
        calls = HttpCalls()

        async def one(to: int, timeout: float = 30.0) -> Answer:
            return await calls.ask("127.0.0.1", to, "GET", "/", timeout=timeout)

        await one(port)
        before = descriptors()
        hang = [asyncio.create_task(one(hanging)) for _ in range(20)]
        answers = await asyncio.gather(*(one(port) for _ in range(20)))
        assert all(answer.ok for answer in answers)
        assert not any(task.done() for task in hang)
        for task in hang:
            task.cancel()
        late = (one(hanging, timeout=0.2) for _ in range(20))
        ended = await asyncio.gather(*hang, *late, return_exceptions=True)
        assert [type(end) for end in ended] == [asyncio.CancelledError] * 20 + [NoAnswer] * 20
        async with asyncio.timeout(30):  # the server's ends are its threads' to close
            while descriptors() > before:
                await asyncio.sleep(0.01)

    with serving(OK) as server, socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        asyncio.run(go(server.port, silent.getsockname()[1]))
