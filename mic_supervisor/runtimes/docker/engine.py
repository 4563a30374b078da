"""The connection to one Docker Engine, by the SDK: shared by all lanes, with errors in words."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from docker import APIClient
from docker.errors import NotFound
from docker.utils import version_lt
from requests import PreparedRequest, Response

from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.runtimes.docker.errors import ERRORS, ODD_ANSWERS, explain, other_version

T = TypeVar("T")

# The version is pinned, so that a coming one changes no answer that we rely on. 1.44 is what Engine
# 25 brought and the oldest that Engine 29 takes. An older one (Debian 12 has 20.10, API 1.41)
# refuses, and is asked for its own from then on.
FIRST_VERSION = "1.44"
OLDEST_VERSION = "1.40"  # Engine 19.03, the first with device requests

# Lanes work at the same time; urllib3 warns of each connection beyond those that it keeps (10).
_CONNECTIONS = 64


def an_object(value: Any) -> dict[str, Any]:
    """A JSON object as it is; ValueError for anything else, which no engine answers."""
    if not isinstance(value, dict):
        raise ValueError("the answer is not a JSON object")
    return value


class Client(APIClient):
    """The SDK's client, which waits for the next word of a stream without end.

    `silence` ends that, after so many seconds.
    """

    silence: float | None = None

    def send(self, request: PreparedRequest, **kwargs: Any) -> Response:
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = (self.timeout, self.silence)
        return super().send(request, **kwargs)


class Engine:
    """Calls one engine; what fails leaves as RuntimeUnavailable or RuntimeRefused.

    `timeout` bounds a plain question, `patience` a call that makes the engine work (create, start,
    remove; a first GPU start without persistence mode takes tens of seconds), both in seconds. One
    client per bound is shared by all threads: a requests session keeps no state of a call.
    """

    def __init__(self, base_url: str | None, *, timeout: float, patience: float) -> None:
        self.base_url = base_url
        self.timeout = timeout
        self.patience = patience
        self._version = FIRST_VERSION
        self._clients: dict[tuple[float, float | None], Client] = {}
        self._lock = threading.Lock()

    @property
    def local(self) -> bool:
        """Whether the engine shares this machine's file system and processes."""
        return self.base_url is None or self.base_url.startswith("unix://")

    @property
    def address(self) -> str:
        """The engine as a person knows it: the socket's path, or the URL."""
        return (self.base_url or "unix:///var/run/docker.sock").removeprefix("unix://")

    def call(
        self,
        what: str,
        ask: Callable[[APIClient], T],
        *,
        patient: bool = False,
        silence: float | None = None,
    ) -> T:
        """The result of `ask(client)`.

        `what` begins the sentence of an error: "cannot list containers". A stream may be without a
        word for `silence` seconds, None is for ever.
        """
        bounds = (self.patience if patient else self.timeout, silence)
        try:
            try:
                return ask(self._client(bounds))
            except ERRORS as error:
                if not other_version(error):
                    raise
            self.close()
            self._version = "auto"
            return ask(self._client(bounds))
        except ERRORS as error:
            raise explain(what, error, self.address) from error

    def container(self, what: str, ref: str) -> dict[str, Any] | None:
        """The engine's description of a container; None: there is none."""
        return self._found(what, lambda api: an_object(api.inspect_container(ref)))

    def image(self, what: str, ref: str) -> dict[str, Any] | None:
        """The engine's description of an image; None: it has none."""
        return self._found(
            what,
            lambda api: an_object(api.inspect_image(ref)),  # type: ignore[no-untyped-call]
        )

    def newest(self, what: str, ask: Callable[[APIClient], dict[str, Any]]) -> dict[str, Any]:
        """An answer in the engine's newest API version, with fields that ours lacks."""
        return self.call(what, lambda _: an_object(ask(self._made("auto", (self.timeout, None)))))

    def close(self) -> None:
        """Drop the clients. The next call makes new ones."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def _found(self, what: str, ask: Callable[[APIClient], T]) -> T | None:
        def found(api: APIClient) -> T | None:
            try:
                return ask(api)
            except NotFound:
                return None

        return self.call(what, found)

    def _client(self, bounds: tuple[float, float | None]) -> Client:
        with self._lock:
            if bounds not in self._clients:
                self._clients[bounds] = self._made(self._version, bounds)
            return self._clients[bounds]

    def _made(self, version: str, bounds: tuple[float, float | None]) -> Client:
        timeout, silence = bounds
        try:
            client = Client(
                base_url=self.base_url,
                version=version,
                # The stub says int; requests takes any number of seconds.
                timeout=timeout,  # type: ignore[arg-type]
                max_pool_size=_CONNECTIONS,
            )
        except ODD_ANSWERS as error:
            # A port that is no number, or a client configuration of another shape, which the SDK
            # reads here without looking.
            raise RuntimeUnavailable(
                f"cannot set up a Docker client for {self.address}: {error}",
                hint="check MIC_DOCKER_HOST, and config.json in $DOCKER_CONFIG or ~/.docker",
            ) from error
        if version_lt(client.api_version, OLDEST_VERSION):
            raise RuntimeUnavailable(
                f"cannot use the Docker Engine at {self.address}: it speaks API "
                f"{client.api_version}, and GPUs can be asked for from {OLDEST_VERSION} on",
                hint="upgrade it to Docker Engine 20.10 or later",
            )
        client.silence = silence
        # An engine that is told to stop takes no new connections, ends its containers, and goes on
        # answering on the old ones meanwhile: what it says there must not be acted upon.
        client.headers["Connection"] = "close"
        # No proxy and no ~/.netrc stands between us and a socket; looking for them is a quarter of
        # a call's time.
        client.trust_env = not self.local
        return client
