"""Nothing can be changed over HTTP: every other method is told which command does it."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mic_supervisor.http.documents import Problem, Refusal

if TYPE_CHECKING:
    from mic_supervisor.http.access import Access

ALLOWED = ("GET", "HEAD")
UNGUARDED = frozenset({"/healthz"})  # says nothing but whether the loop lives

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

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        path, authorization = scope["path"], Headers(scope=scope).get("authorization")
        document: Problem | Refusal
        if path not in UNGUARDED and not self._access.admits(authorization):
            document = Problem("send the token of MIC_HTTP_TOKEN_FILE as a bearer token")
            status, extra = 401, {"WWW-Authenticate": 'Bearer realm="mic-supervisor"'}
        elif scope["method"] not in ALLOWED:
            document = refusal(path)
            status, extra = 405, {"Allow": ", ".join(ALLOWED)}
        else:
            await self._app(scope, receive, send_with_headers)
            return
        answer = JSONResponse(asdict(document), status, {"Cache-Control": "no-store", **extra})
        await answer(scope, receive, send_with_headers)
