"""A unix socket in front of the engine's, which a test can cut, or hold at a certain call."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_REQUEST = re.compile(rb"(GET|HEAD|POST|PUT|DELETE) (\S+) HTTP/1\.[01]\r\n")

Moment = Literal["before", "after"]


class EngineProxy:
    """Passes everything on, until it is told otherwise.

    `hold(pattern)` stops the first call whose "METHOD path" the pattern finds: "before" it reaches
    the engine, or "after" the engine did it and before the answer comes back. `held` is set then.
    `cut()` is an engine that dies: open connections break, new ones find no socket.
    `answer(pattern, raw)` gives these bytes to such calls, and hangs up; the engine sees none of
    them. `translate(pattern, old, new)` replaces words of the engine's answers to them; both have
    the same length. `delay` are the seconds that every call takes longer.
    """

    def __init__(self, path: Path, engine: str) -> None:
        self.path = path
        self.delay = 0.0
        self.held = threading.Event()
        self._engine = engine
        self._pattern: tuple[re.Pattern[str], Moment] | None = None
        self._answers: tuple[re.Pattern[str], bytes] | None = None
        self._words: tuple[re.Pattern[str], bytes, bytes] | None = None
        self._let_go = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.up()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def up(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            self.path.unlink()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            sockets = [*self._open]
        for item in sockets:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
        self._let_go.set()

    def hold(self, pattern: str, moment: Moment = "before") -> None:
        self.held.clear()
        self._let_go.clear()
        self._pattern = re.compile(pattern), moment

    def release(self) -> None:
        """What was held goes on."""
        self._pattern = None
        self._let_go.set()

    def answer(self, pattern: str, raw: bytes) -> None:
        self._answers = re.compile(pattern), raw

    def translate(self, pattern: str, old: bytes, new: bytes) -> None:
        assert len(old) == len(new)
        self._words = re.compile(pattern), old, new

    def honest(self) -> None:
        """Whatever is asked from now on has the engine's own answer."""
        self._answers = self._words = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._engine)
            with self._lock:
                self._open |= {client, server}
            answer_late = threading.Event()
            words: list[tuple[bytes, bytes]] = []
            for source, target, inward in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pass_on,
                    args=(source, target, inward, answer_late, words),
                    daemon=True,
                ).start()

    def _pass_on(
        self,
        source: socket.socket,
        target: socket.socket,
        inward: bool,
        answer_late: threading.Event,
        words: list[tuple[bytes, bytes]],
    ) -> None:
        whole = b""
        try:
            while data := source.recv(1 << 16):
                if inward:
                    if (raw := self._own_answer(data, words)) is not None:
                        source.sendall(raw)
                        return
                    time.sleep(self.delay)
                    self._look(data, answer_late)
                elif answer_late.is_set():
                    self.held.set()
                    self._let_go.wait(60)
                    answer_late.clear()
                if words and not inward:
                    whole += data  # a word may be cut
                else:
                    target.sendall(data)
            for old, new in words:
                target.sendall(whole.replace(old, new))
        except OSError:
            pass
        finally:
            for item in (source, target):
                with contextlib.suppress(OSError):
                    item.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._open -= {source, target}

    def _own_answer(self, data: bytes, words: list[tuple[bytes, bytes]]) -> bytes | None:
        if (found := _REQUEST.match(data)) is None:
            return None
        call = f"{found[1].decode()} {found[2].decode()}"
        if self._words is not None and self._words[0].search(call):
            words.append(self._words[1:])
        answers = self._answers
        return answers[1] if answers is not None and answers[0].search(call) else None

    def _look(self, data: bytes, answer_late: threading.Event) -> None:
        """A request begins with a packet of its own: nobody sends one before the last answer."""
        found, wanted = _REQUEST.match(data), self._pattern
        if found is None or wanted is None:
            return
        pattern, moment = wanted
        if not pattern.search(f"{found[1].decode()} {found[2].decode()}"):
            return
        self._pattern = None
        if moment == "after":
            answer_late.set()
            return
        self.held.set()
        self._let_go.wait(60)


def engine_socket() -> str | None:
    """The path of the engine's socket; None where it is reached another way."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    return host.removeprefix("unix://") if host.startswith("unix://") else None


@contextlib.contextmanager
def engine_proxy(directory: Path) -> Iterator[EngineProxy]:
    target = engine_socket()
    assert target is not None, "the engine is not reached through a unix socket"
    proxy = EngineProxy(directory / "d.sock", target)
    try:
        yield proxy
    finally:
        proxy.cut()
