"""The daemon's ear: one request a connection over a unix socket, answered line by line.

A request is one JSON document on a line, `{"version": 1, "scope": …, "method": …, "params": {…}}`.
The answer is any number of lines `{"event": {…}}` and then one `{"result": …}` or `{"error": {…}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mic_supervisor import codec
from mic_supervisor.converge.session import QUESTIONS, Method
from mic_supervisor.converge.tasks import end
from mic_supervisor.daemon.client import VERSION, Client
from mic_supervisor.daemon.log import LOGGER
from mic_supervisor.errors import ConfigError, MicError, Unserviceable
from mic_supervisor.host import who_asks

_LONGEST_REQUEST = 1 << 16  # bytes
_REQUEST_TIMEOUT = 10.0  # seconds for a client to say what it wants
_POLL = 2.0  # seconds between two looks at whether the socket is still there
_MOST_CLIENTS = 128  # that are served at a time; each takes a descriptor
_MOST_UNREAD = 1 << 22  # bytes that are kept for a client that does not read

_IN_THE_LOG = "the daemon's log has more: journalctl -u mic"
_SAME_VERSION = "use the command of the version that the daemon is of, or restart the daemon"


class ControlServer:
    """Serves what `methods` gives, by name, to clients that mean `scope`.

    It is called with who orders something, and None for a question. A client that goes away cancels
    its own waiting only.
    """

    def __init__(
        self, path: Path, methods: Callable[[str | None], Mapping[str, Method]], scope: str
    ) -> None:
        self._path = path
        self._methods = methods
        self._scope = scope
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._inode = 0

    async def start(self) -> None:
        """Bind the socket, 0660 and of the group mic where there is one.

        What a killed predecessor left is taken over. Raises MicError, also where another daemon
        listens: it is of another scope, since this one's lock is had.
        """
        if (other := Client.connect(self._path, self._scope)) is not None:
            other.close()
            raise MicError(
                f"cannot listen on {self._path}: another daemon listens there",
                hint="point MIC_SOCKET of one of the two to another path",
            )
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

        self._inode = self._path.stat().st_ino

    async def keep_listening(self) -> None:
        """Ends when nobody can reach the socket any more. Called again, it binds it anew."""
        if self._server is None:
            await self.start()
        try:
            while self._server is not None and self._server.is_serving() and self._is_ours():
                await asyncio.sleep(_POLL)
            raise MicError(f"nobody can reach the daemon at {self._path}: the socket is gone")
        finally:
            if self._server is not None:
                self._server.close()
            self._server = None

    def _is_ours(self) -> bool:
        with contextlib.suppress(OSError):
            return self._path.stat().st_ino == self._inode
        return False

    async def close(self) -> None:
        """Let go who is still served. One that stays is named in the log and left."""
        if self._server is not None:
            self._server.close()
        await end(self._clients)
        if self._is_ours():
            self._path.unlink(missing_ok=True)

    def _give_to_group(self) -> None:
        try:
            group = grp.getgrnam("mic").gr_gid
        except KeyError:
            return  # without the group the socket is the owner's alone
        if os.geteuid() == 0:
            # Confined as in mic.service it may not; the unit itself then does it.
            with contextlib.suppress(PermissionError):
                os.chown(self._path, -1, group)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # a server's callback runs in a task
        task.set_name("the answer to a command")
        self._clients.add(task)
        try:
            if len(self._clients) > _MOST_CLIENTS:
                _send(writer, error=_document(MicError("cannot answer: too many ask at once")))
                return
            await self._answer(reader, writer)
        except (ConnectionError, TimeoutError):
            pass  # the client is gone, or says nothing; there is nobody to tell
        except asyncio.CancelledError:
            pass  # by `close` alone; asyncio writes a traceback for a client that was cancelled
        finally:
            self._clients.discard(task)
            writer.close()

    def _request(self, line: bytes) -> tuple[str, Mapping[str, Any]]:
        """(method, params), without what is null, which is as if it was not there. Raises MicError
        where it is none, or is for another daemon.
        """
        try:
            request = codec.parse(line)
        except codec.BadDocument:
            raise MicError("cannot answer: the request is no line of JSON") from None
        if not isinstance(request, dict):
            raise MicError("cannot answer: the request is no JSON object")
        version, params = request.get("version"), request.get("params", {})
        if version != VERSION or isinstance(version, bool):
            raise MicError(
                f"cannot answer: this daemon speaks version {VERSION}, the request is of "
                f"{version!r}",
                hint=_SAME_VERSION,
            )
        scope = request.get("scope", self._scope)  # a command of an earlier version does not say
        if scope != self._scope:
            raise Unserviceable(
                f"cannot answer: this is the daemon of scope {self._scope}, not of {scope}",
                hint=f"unset MIC_SOCKET, or point it to where the daemon of {scope} listens",
            )
        if not isinstance(params, dict):
            raise MicError("cannot answer: params is no JSON object")
        given = {name: value for name, value in params.items() if value is not None}
        return str(request.get("method")), given

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                line = await reader.readline()
            if not line:
                return
            name, params = self._request(line)
            by = None if name in QUESTIONS else await asyncio.to_thread(_peer, writer)
            method = self._methods(by).get(name)
            if method is None:
                raise MicError(f"cannot answer: there is no method {name!r}", hint=_SAME_VERSION)
        except ValueError:  # more than _LONGEST_REQUEST without a line's end
            _send(writer, error=_document(MicError("cannot answer: the request is too long")))
            return
        except MicError as error:
            _send(writer, error=_document(error))
            return
        work = asyncio.ensure_future(
            method(params, lambda event: _send(writer, event=codec.encode(event)))
        )
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return
            _send(writer, result=work.result())
        except MicError as error:
            _send(writer, error=_document(error))
        # A defect in one answer is told to who asked, and in the log, and costs the daemon nothing.
        except Exception as error:  # noqa: BLE001 - see above
            LOGGER.exception("cannot answer %s", name)
            failure = MicError(f"cannot answer: {type(error).__name__}: {error}", hint=_IN_THE_LOG)
            _send(writer, error=_document(failure))
        finally:
            work.cancel()
            gone.cancel()
        await writer.drain()


def _peer(writer: asyncio.StreamWriter) -> str:
    """Who connected, as the kernel knows it. What a client says of itself counts for nothing."""
    found = writer.get_extra_info("socket")
    given = found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", given)
    return who_asks(uid, pid)


def _document(error: MicError) -> dict[str, Any]:
    rendered = {"rendered": error.outline} if isinstance(error, ConfigError) else {}
    final = {"final": True} if isinstance(error, Unserviceable) else {}
    return {"message": error.message, "hint": error.hint, **rendered, **final}


def _send(writer: asyncio.StreamWriter, **document: Any) -> None:
    if writer.is_closing():
        return
    if writer.transport.get_write_buffer_size() > _MOST_UNREAD:
        writer.transport.abort()
        return
    # Half a surrogate, from a terminal of another encoding, becomes its escape in JSON.
    line = json.dumps(document, ensure_ascii=False).encode(errors="backslashreplace")
    writer.write(line + b"\n")
