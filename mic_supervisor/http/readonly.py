"""Nothing can be changed over HTTP: every other method is told which command does it."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mic_supervisor.http.documents import Problem, Refusal

if TYPE_CHECKING:
    from mic_supervisor.http.access import Access

ALLOWED = ("GET", "HEAD")
UNGUARDED = frozenset({"/healthz"})  # says nothing but whether the loop lives

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What the former service did over HTTP, and the command that does it now.
COMMANDS = (
    (re.compile(r"/api/v1/models/start/?"), "mic-supervisor start MODEL --gpu N"),
    (re.compile(r"/api/v1/models/stop/?"), "mic-supervisor stop MODEL --gpu N"),
    (re.compile(r"/api/v1/processes/(?P<pid>[0-9]{1,10})/?"), "mic-supervisor kill {pid}"),
    (re.compile(r"/api/v1/processes(/.*)?"), "mic-supervisor kill PID"),
)
OTHERWISE = "mic-supervisor apply"

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def command_for(path: str) -> str | None:
    """The command line that does what a request to this path once did, None where none did."""
    for pattern, command in COMMANDS:
        match = pattern.fullmatch(path)
        if match is not None:
            return command.format(**match.groupdict())
    return None


def refusal(path: str) -> Refusal:
    command = command_for(path)
    if command is None:
        return Refusal(
            f"this interface only reads: edit gpus.yaml and run `{OTHERWISE}`", OTHERWISE
        )
    return Refusal(f"this interface only reads: run `{command}`", command)


class ReadOnly:
    """Answers what is not allowed before it reaches the application; reads no body for it."""

    def __init__(self, app: App, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        path = scope["path"]
        if path not in UNGUARDED and not self._access.admits(_authorization(scope)):
            document = Problem("send the token of MIC_HTTP_TOKEN_FILE as a bearer token")
            extra = (b"www-authenticate", b'Bearer realm="mic-supervisor"')
            await _answer(send_with_headers, 401, document, extra)
        elif scope["method"] not in ALLOWED:
            extra = (b"allow", ", ".join(ALLOWED).encode())
            await _answer(send_with_headers, 405, refusal(path), extra)
        else:
            await self._app(scope, receive, send_with_headers)


def _authorization(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            return str(value.decode("latin-1"))
    return None


async def _answer(
    send: Send, status: int, document: Problem | Refusal, *extra: tuple[bytes, bytes]
) -> None:
    body = json.dumps(asdict(document), ensure_ascii=False).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
