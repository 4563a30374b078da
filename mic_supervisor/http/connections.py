"""Bounds what clients can cost: how many connections are open, and how long each may take.

uvicorn refuses whoever comes when there are too many, which lets idle clients lock everyone out.
Here the connection that has waited longest makes room instead, and one that neither asks nor reads
is closed after a while, however slowly it goes on sending.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 256  # well below the 1024 open files that a service has by default
MAX_HEADER = 16 * 1024  # bytes
KEEP_ALIVE = 20.0  # seconds between two requests; Prometheus comes every 15
_TICK = 0.5  # seconds between two looks whether the server is to end


class Server(uvicorn.Server):
    """Wakes less often for nothing: uvicorn's own loop does ten times a second, for the whole life
    of a daemon that is seldom asked.
    """

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # with 0 it also renews the Date of its answers
            await asyncio.sleep(_TICK)


class Connections:
    """The open connections, the one that has waited longest first.

    `request_timeout` is the time in seconds from the first byte of a request until its answer was
    taken.
    """

    def __init__(
        self,
        request_timeout: float,
        limit: int = MAX_CONNECTIONS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._request_timeout = request_timeout
        self._clock = clock
        self._open: dict[Connection, float | None] = {}  # since when it owes something

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection) -> None:
        while len(self._open) >= self._limit:
            self._drop(next(iter(self._open)))
        self._open[connection] = self._clock()

    def closed(self, connection: Connection) -> None:
        self._open.pop(connection, None)

    def request_begins(self, connection: Connection) -> None:
        if connection in self._open and self._open[connection] is None:
            self._open[connection] = self._clock()

    def answered(self, connection: Connection) -> None:
        """To the end of the line: it asks as one should."""
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = self._clock() if connection.unread else None

    def sweep(self) -> None:
        """Drop who took too long. To be called every second or so."""
        latest = self._clock() - self._request_timeout
        for connection, since in [*self._open.items()]:
            if since is None:
                continue
            if connection.idle:
                self._open[connection] = None
            elif since < latest:
                self._drop(connection)

    def drop_all(self) -> None:
        for connection in [*self._open]:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._open.pop(connection, None)
        connection.drop()


class Connection(H11Protocol):
    """One connection that reports to `connections`."""

    connections_book: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answered = False
        self.connections_book.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections_book.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._answered = False
        self.connections_book.request_begins(self)
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._answered = True
        self.connections_book.answered(self)
        super().on_response_complete()

    @property
    def unread(self) -> bool:
        """Whether the client has yet to take some of the last answer."""
        return self.transport.get_write_buffer_size() > 0

    @property
    def idle(self) -> bool:
        """Between two requests, nothing owed by either side."""
        return self._answered and not self.unread

    def drop(self) -> None:
        # Not close(): that waits until the client has read what it does not read.
        self.transport.abort()


def protocol(book: Connections) -> type[Connection]:
    """The protocol class of a server whose connections `book` keeps."""
    members: dict[str, Any] = {"connections_book": book}
    return type("Connection", (Connection,), members)
