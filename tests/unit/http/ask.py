"""Asks an ASGI application one thing, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from mic_supervisor.http.access import Access
from mic_supervisor.http.app import asgi
from mic_supervisor.http.documents import Published
from mic_supervisor.http.views import Views
from tests.unit.http import views_of


class Told(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """The application over one view, or over several that were published in turn."""

    def __init__(
        self, *shown: Published, access: Access | None = None, views: Views | None = None
    ) -> None:
        self.views = views or views_of.views(*shown)
        self.app = asgi(self.views, access or Access())

    def __call__(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
    ) -> Told:
        return asyncio.run(self._ask(path, method, headers or {}))

    async def _ask(self, path: str, method: str, headers: Mapping[str, str]) -> Told:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 6004),
        }
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("no body is read")

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start = sent[0]
        found = {name.decode(): value.decode() for name, value in start["headers"]}
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return Told(start["status"], found, body)
