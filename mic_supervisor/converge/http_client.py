"""One bounded HTTP request to a server on this machine.

Not a client library's job: those bound each read, and a server that drips a byte a second would
hold a probe for ever. The standard library's connection is closed by a timer instead. Connections
are not kept, because an idle one makes some servers linger when they are told to stop.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from dataclasses import dataclass
from typing import Any

_MOST = 4 << 20  # bytes of an answer that are read


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 400

    def json(self) -> Any:
        """Raises ValueError."""
        return json.loads(self.body)


class NoAnswer(Exception):
    """There was no HTTP answer; the message says what there was instead.

    `refused` is set where nothing listens on the port.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def request(
    host: str, port: int, method: str, path: str, *, body: str | None = None, timeout: float
) -> Answer:
    """Ask, and give up after `timeout` seconds whatever the server does. Raises NoAnswer."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        if connection.sock is not None:
            try:
                connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it ended by itself in this very moment

    timer = threading.Timer(timeout, expire)
    timer.daemon = True
    timer.start()
    headers = {"Connection": "close", "Accept": "*/*"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, path, body=body and body.encode(), headers=headers)
        response = connection.getresponse()
        content = response.read(_MOST)
    except ConnectionRefusedError as error:
        raise NoAnswer(f"nothing listens on port {port}", refused=True) from error
    except (OSError, http.client.HTTPException) as error:
        if expired.is_set() or isinstance(error, TimeoutError):
            raise NoAnswer(f"no answer within {timeout:g} s") from error
        raise NoAnswer(f"the connection ended: {_words(error)}") from error
    finally:
        timer.cancel()
        connection.close()
    if expired.is_set():
        raise NoAnswer(f"no answer within {timeout:g} s")
    return Answer(response.status, content.decode("utf-8", "replace"))


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
