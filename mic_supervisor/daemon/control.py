"""The daemon's ear: one request a connection over a unix socket, answered line by line.

A request is one JSON document on a line, `{"version": 1, "method": …, "params": {…}}`. The answer
is any number of lines `{"event": {…}}` and then one `{"result": …}` or `{"error": {…}}`.
"""

from __future__ import annotations

import asyncio
import grp
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mic_supervisor.converge.events import Event
from mic_supervisor.errors import ConfigError, MicError

VERSION = 1
_LONGEST_REQUEST = 1 << 16  # bytes
_REQUEST_TIMEOUT = 10.0  # seconds for a client to say what it wants

Tell = Callable[[Event], None]
Method = Callable[[Mapping[str, Any], Tell], Awaitable[Any]]


class ControlServer:
    """Serves `methods` by name. A client that goes away cancels its own waiting only."""

    def __init__(self, path: Path, methods: Mapping[str, Method]) -> None:
        self._path = path
        self._methods = methods
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bind the socket, 0660 and of the group mic where there is one.

        What a killed predecessor left is taken over: the scope's lock says that nobody listens.
        """
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(self._path))
            self._path.chmod(0o660)
            self._give_to_group()
        except OSError as error:
            raise MicError(
                f"cannot listen on {self._path}: {error.strerror or error}",
                hint="point MIC_SOCKET to a path that can be bound",
            ) from error
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=_LONGEST_REQUEST
        )

    async def close(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in [*self._clients]:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def _give_to_group(self) -> None:
        try:
            group = grp.getgrnam("mic").gr_gid
        except KeyError:
            return  # without the group the socket is the owner's alone
        if os.geteuid() == 0:
            os.chown(self._path, -1, group)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # a server's callback runs in a task
        self._clients.add(task)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, TimeoutError, asyncio.LimitOverrunError, ValueError):
            pass  # the client is gone or makes no sense; there is nobody to tell
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await asyncio.wait_for(reader.readline(), _REQUEST_TIMEOUT)
        request = json.loads(line)
        if not isinstance(request, dict) or request.get("version") != VERSION:
            _send(writer, error={"message": f"this daemon speaks version {VERSION}", "hint": None})
            return
        method = self._methods.get(str(request.get("method")))
        if method is None:
            _send(writer, error={"message": f"no method {request.get('method')!r}", "hint": None})
            return
        work = asyncio.ensure_future(
            method(request.get("params") or {}, lambda event: _send(writer, event=asdict(event)))
        )
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return
            _send(writer, result=work.result())
        except ConfigError as error:
            _send(writer, error=_document(error) | {"rendered": error.rendered})
        except MicError as error:
            _send(writer, error=_document(error))
        finally:
            work.cancel()
            gone.cancel()
        await writer.drain()


def _document(error: MicError) -> dict[str, Any]:
    return {"message": error.message, "hint": error.hint}


def _send(writer: asyncio.StreamWriter, **document: Any) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
