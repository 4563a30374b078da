"""One question to a local engine without the SDK, whose import takes longer than a whole plan.

Looks at everything are made this way. What goes wrong is not explained here: the SDK's way asks
again, and knows the words.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from mic_supervisor.runtimes.docker.errors import asked_for

_MOST = 256 << 20  # bytes of an answer


def peek(
    path: str, question: str, timeout: float, *, version: str, oldest: tuple[int, int]
) -> tuple[Any, str]:
    """(the JSON answer to GET `question` from the socket at `path`, the version it was asked in).

    `question` is "/containers/json?all=1". None: there was no answer that can be used. An engine
    that wants to speak another version of its API is asked again in that one, unless it is older
    than `oldest`. Raises TimeoutError after `timeout` seconds: asking again would take as long.
    """
    deadline = time.monotonic() + timeout
    try:
        status, body = _get(path, f"/v{version}{question}", deadline)
        other = asked_for(body.decode("utf-8", "replace")) if status == 400 else None
        if other is not None and tuple(int(part) for part in other.split(".")) >= oldest:
            version = other
            status, body = _get(path, f"/v{version}{question}", deadline)
        return (json.loads(body) if status == 200 else None), version
    except TimeoutError:
        raise
    except (OSError, ValueError):
        return None, version


def accepts(path: str, timeout: float) -> bool:
    """Whether the socket at `path` takes a new connection."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(path)
    except OSError:
        return False
    return True


def _get(path: str, question: str, deadline: float) -> tuple[int, bytes]:
    """(status, body). HTTP/1.0, so that the answer is whole when the connection ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.connect(path)
        connection.sendall(f"GET {question} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
        data = bytearray()
        while True:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            part = connection.recv(1 << 16)
            if not part:
                break
            data += part
            if len(data) > _MOST:
                raise ValueError("the answer does not end")
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    words = first.split(" ")
    if not words[0].startswith("HTTP/1.") or "transfer-encoding" in fields:
        raise ValueError("not an answer to HTTP/1.0")
    if int(fields.get("content-length", len(body))) != len(body):
        raise ValueError("the answer is cut short")
    return int(words[1]), body
