"""Runs the HTTP server in a thread and a loop of its own, so that no client delays the daemon."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from mic_supervisor.config.settings import Address, Settings
from mic_supervisor.http.access import Access, access_of
from mic_supervisor.http.documents import Published
from mic_supervisor.http.views import Views, stall_limit

if TYPE_CHECKING:
    from mic_supervisor.http.connections import Connections

_LOGGER = logging.getLogger("mic")
_TICK = 0.5  # seconds between two looks at what was published, and at who takes too long
_BACKLOG = 128  # connections that one turn of the event loop accepts at most
_FAREWELL = 2.0  # seconds that answers under way get when the server stops


class Publishes(Protocol):
    """The daemon, as far as it is looked at from here."""

    @property
    def published(self) -> Published: ...


def serving(settings: Settings) -> Callable[[Publishes], HttpServer]:
    """What starts the server for a daemon.

    Raises MicError now, before anything runs, where the settings would serve more than is meant.
    """
    access = access_of(settings)

    def serve(daemon: Publishes) -> HttpServer:
        server = HttpServer(
            settings.listen,
            access,
            lambda: daemon.published,
            stall_after=stall_limit(settings.resync),
        )
        server.start()
        return server

    return serve


class HttpServer:
    """Serves until it is stopped. An address that cannot be had is tried again every few seconds.

    Models are kept running whether or not their state can be shown. `request_timeout` is how many
    seconds a client may take for a request and its answer, `retry` how many there are between two
    tries.
    """

    def __init__(
        self,
        listen: Address,
        access: Access,
        latest: Callable[[], Published],
        *,
        stall_after: float,
        request_timeout: float = 10.0,
        retry: float = 5.0,
    ) -> None:
        self._request_timeout = request_timeout
        self._retry = retry
        self._listen = listen
        self._access = access
        self._latest = latest
        self._stall_after = stall_after
        self._over = threading.Event()
        self._tried = threading.Event()  # whether the address was had, or could not be
        self._thread = threading.Thread(target=self._run, name="mic-http", daemon=True)
        self._server: Any = None

    def start(self) -> None:
        """Returns once clients can connect; they are answered as soon as the server is loaded."""
        self._thread.start()
        self._tried.wait(self._retry)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Blocks until the address is free again, a few seconds at most."""
        self._over.set()
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(2 * _FAREWELL)

    def _run(self) -> None:
        logged = False
        while not self._over.is_set():
            try:
                listener = _bind(self._listen)
            except OSError as error:
                self._tried.set()
                if not logged:
                    _LOGGER.error(
                        "cannot serve HTTP on %s: %s; trying again every %g s, "
                        "MIC_LISTEN names another address",
                        self._listen,
                        (error.strerror or str(error)).lower(),
                        self._retry,
                    )
                logged = True
                self._over.wait(self._retry)
                continue
            logged = False
            self._tried.set()
            try:
                asyncio.run(self._serve(listener))
                if not self._over.is_set():
                    _LOGGER.error("the HTTP server ended by itself; it is started anew")
                    self._over.wait(self._retry)
            # Whatever goes wrong in here, a defect of ours or of a library, models keep running.
            # uvicorn even calls sys.exit.
            except (Exception, SystemExit):
                _LOGGER.exception("the HTTP server ended by a defect; it is started anew")
                self._over.wait(self._retry)
            finally:
                listener.close()

    async def _serve(self, listener: socket.socket) -> None:
        # Loaded in this thread, so that the daemon's first look does not wait for it; who connects
        # meanwhile is answered after it.
        import uvicorn

        from mic_supervisor.http import connections
        from mic_supervisor.http.app import asgi

        views = Views(self._latest, stall_after=self._stall_after)
        book = connections.Connections(self._request_timeout)
        server = connections.Server(
            uvicorn.Config(
                asgi(views, self._access),
                http=connections.protocol(book),
                ws="none",
                loop="asyncio",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="error",  # what clients send wrong is no event of this machine
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=int(connections.KEEP_ALIVE),
                timeout_graceful_shutdown=int(_FAREWELL),
                h11_max_incomplete_event_size=connections.MAX_HEADER,
            )
        )
        self._server = server
        if self._over.is_set():
            return
        ticking = asyncio.create_task(self._tick(views, book))
        _LOGGER.info("serving HTTP on http://%s", self._listen)
        try:
            await server.serve(sockets=[listener])
        finally:
            ticking.cancel()

    async def _tick(self, views: Views, book: Connections) -> None:
        """Note every view while it is there, and who takes too long."""
        while True:
            views.current()
            book.sweep()
            if self._over.is_set():
                await asyncio.sleep(_FAREWELL / 2)
                book.drop_all()
            await asyncio.sleep(_TICK)


def _bind(listen: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((listen.host, listen.port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
