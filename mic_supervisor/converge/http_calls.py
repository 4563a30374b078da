"""Bounded HTTP calls to servers on this machine. Nothing else imports httpx.

Connections are not kept: an idle one makes some servers linger when they are told to stop.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from mic_supervisor.text import quoted

if TYPE_CHECKING:
    import httpx

# httpx imports its own command where it can. With rich and pygments that is 3 MB of the daemon's
# memory for nothing. None says that there is no such module, which httpx is prepared for.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]

_LONGEST = 200  # characters of what is said of a call that failed
_MOST = 4 << 20  # bytes of an answer that are read
_HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",  # what a server sends counts against _MOST as it is
    "Connection": "close",
    "User-Agent": "mic-supervisor",
}

# No descriptor, port or memory was left for a connection, or it is not permitted.
_OWN_LACK = frozenset(
    (
        *(errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM),
        *(errno.EACCES, errno.EPERM),
    )
)


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

    `refused` is set where nothing listens on the port, `own` where the call never left this
    program, so that nothing is known of the server.
    """

    def __init__(self, message: str, *, refused: bool = False, own: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        self.own = own


class HttpCalls:
    """Side by side, as many as there are. Nothing is kept open between two of them.

    It is httpx's transport that is asked, without its client: no call is to be sent elsewhere by a
    proxy's address in the environment or a redirect, nor to take one server's cookies to another.
    """

    async def ask(
        self,
        host: str,
        port: int,
        method: str,
        path: str,
        *,
        body: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float,
    ) -> Answer:
        """One answer, whatever its status. Raises NoAnswer, after `timeout` seconds at the latest.

        httpx bounds each read, and a server that drips a byte a second would hold a call for ever:
        so the whole call is bounded here.
        """
        import httpx

        kind = {} if body is None else {"Content-Type": "application/json"}
        content = bytearray()
        try:
            request = httpx.Request(
                method,
                _url(host, port, path),
                headers={**_HEADERS, **kind, **(headers or {})},
                content=body,
            )
            async with asyncio.timeout(timeout):
                response = await self._transport.handle_async_request(request)
                try:
                    async for piece in response.aiter_raw():
                        content += piece
                        if len(content) >= _MOST:
                            break
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise NoAnswer(f"no answer within {timeout:g} s") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise _no_answer(error, port) from error
        return Answer(response.status_code, content[:_MOST].decode("utf-8", "replace"))

    @cached_property
    def _transport(self) -> httpx.AsyncHTTPTransport:
        import httpx

        return httpx.AsyncHTTPTransport(
            verify=False,  # nobody speaks TLS here, and its certificates take 20 ms to load
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )


@lru_cache(maxsize=256)
def _url(host: str, port: int, path: str) -> httpx.URL:
    """Of few, each asked over and over: to make one takes a tenth of a call."""
    import httpx

    return httpx.URL(scheme="http", host=host, port=port, raw_path=path.encode())


def reachable(listen: str) -> str:
    """The address under which this machine reaches who listens on `listen`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)


def lacks(error: OSError) -> bool:
    """Whether a connection failed of this end, so that nothing is known of the other."""
    return error.errno in _OWN_LACK


def _no_answer(error: Exception, port: int) -> NoAnswer:
    cause = _system_error(error)
    if cause is None:
        said = quoted(str(error).rstrip(".") or type(error).__name__, _LONGEST)
        return NoAnswer(f"the connection ended: {said}")
    if isinstance(cause, ConnectionRefusedError):
        return NoAnswer(f"nothing listens on port {port}", refused=True)
    said = os.strerror(cause.errno or 0)
    if lacks(cause):
        return NoAnswer(f"this machine has no connection to give: {said}", own=True)
    return NoAnswer(f"the connection ended: {said}")


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said, at the bottom of what httpx and the libraries below it made of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None
