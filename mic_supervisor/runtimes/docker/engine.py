"""The connection to one Docker Engine: made on first use, shared by all lanes, errors in words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.runtimes.docker.errors import engine_errors, explain, other_version

if TYPE_CHECKING:
    from docker import APIClient
    from requests import Response

T = TypeVar("T")

# The version is pinned, because asking costs a round trip on every start of the command line (1 ms
# for /_ping, 8 ms for the SDK's "auto", which asks for /version). 1.44 is what Engine 25 brought
# and the oldest that Engine 29 takes, so every current engine accepts it at once. An older one
# (Debian 12 has 20.10, API 1.41) refuses and names its own in the same breath; that one is used
# from then on.
FIRST_VERSION = "1.44"
OLDEST_VERSION = (1, 40)  # Engine 19.03, the first with device requests

# Lanes work at the same time; more connections than urllib3 keeps by default (10) would be thrown
# away after each call, with a warning each time.
_CONNECTIONS = 64


def an_object(value: Any) -> dict[str, Any]:
    """A JSON object as it is; ValueError for anything else, which no engine answers."""
    if not isinstance(value, dict):
        raise ValueError("the answer is not a JSON object")
    return value


class Engine:
    """Calls one engine; what fails leaves as RuntimeUnavailable or RuntimeRefused.

    `timeout` bounds a plain question, `patience` a call that makes the engine work (create, start,
    remove; a first GPU start without persistence mode takes tens of seconds), both in seconds. One
    client per bound is shared by all threads: a requests session keeps no state of a call, and the
    connection pool below it is locked.
    """

    def __init__(self, base_url: str | None, *, timeout: float, patience: float) -> None:
        self.base_url = base_url
        self.timeout = timeout
        self.patience = patience
        self._version = FIRST_VERSION
        self._clients: dict[bool, APIClient] = {}
        self._lock = threading.Lock()

    @property
    def local(self) -> bool:
        """Whether the engine shares this machine's file system and processes."""
        return self.base_url is None or self.base_url.startswith(("unix://", "http+unix://", "/"))

    @property
    def address(self) -> str:
        """The engine as a person knows it: the socket's path, or the URL."""
        if not self.local:
            return str(self.base_url)
        path = (self.base_url or "").split("://", 1)[-1].lstrip("/")
        return f"/{path}" if path else "/var/run/docker.sock"

    def call(self, what: str, ask: Callable[[APIClient], T], *, patient: bool = False) -> T:
        """The result of `ask(client)`.

        `what` begins the sentence of an error: "cannot list containers".
        """
        try:
            client = self._client(patient)
            try:
                return ask(client)
            except engine_errors() as error:
                self._speak(client.api_version, error)
            return ask(self._client(patient))
        except engine_errors() as error:
            raise explain(what, error, self.address) from error

    def peek(self, what: str, question: str) -> Any:
        """The JSON answer to a GET, over a new connection and without the SDK.

        An engine that is told to stop takes no new connections, ends its containers, and goes on
        answering on the old ones meanwhile: what it says there must not be acted upon.
        None: ask in the usual way, which also knows how to explain a failure.
        """
        if not self.local:
            return None
        from mic_supervisor.runtimes.docker.peek import accepts, peek

        try:
            answer, self._version = peek(
                self.address,
                question,
                self.timeout,
                version=self._version,
                oldest=OLDEST_VERSION,
            )
            if answer is None and not accepts(self.address, self.timeout):
                self.close()
            return answer
        except TimeoutError as error:
            raise explain(what, error, self.address) from error

    def open(
        self,
        what: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str | bytes] | None = None,
        body: Any = None,
        silence: float | None,
    ) -> Response:
        """An answer that is still being written; the caller reads and closes it.

        `silence` is how many seconds may pass without a byte. The SDK's own streams have no such
        bound, and end quietly when the engine dies.
        """

        def ask(client: APIClient) -> Response:
            return self._checked(
                client.request(
                    method,
                    f"{client.base_url}/v{client.api_version}{path}",
                    params=dict(params or {}),
                    headers=dict(headers or {}),
                    json=body,
                    stream=True,
                    timeout=(self.timeout, silence),
                )
            )

        return self.call(what, ask)

    def reading(self, what: str, items: Iterator[T]) -> Iterator[T]:
        """The items of an answer that is read as it comes, with the errors of `call`."""
        try:
            yield from items
        except engine_errors() as error:
            raise explain(what, error, self.address) from error

    def newest(self, what: str, path: str) -> dict[str, Any]:
        """The JSON object of a GET in the engine's newest API version, with fields ours lacks."""

        def ask(client: APIClient) -> dict[str, Any]:
            answer = self._checked(client.get(f"{client.base_url}{path}", timeout=self.timeout))
            return an_object(answer.json())

        return self.call(what, ask)

    def close(self) -> None:
        """Drop the pooled connections. The next call opens new ones."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    @staticmethod
    def _checked(response: Response) -> Response:
        import requests
        from docker.errors import create_api_error_from_http_exception

        try:
            response.raise_for_status()
        except requests.HTTPError as error:
            try:
                create_api_error_from_http_exception(error)
            finally:
                response.close()
        return response

    def _client(self, patient: bool) -> APIClient:
        with self._lock:
            client = self._clients.get(patient)
            if client is None:
                from docker import APIClient

                try:
                    client = APIClient(
                        base_url=self.base_url,
                        version=self._version,
                        # The stub says int; requests takes any number of seconds.
                        timeout=self.patience if patient else self.timeout,  # type: ignore[arg-type]
                        max_pool_size=_CONNECTIONS,
                    )
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    # A port that is no number, or a client configuration of another shape, which
                    # the SDK reads here without looking.
                    raise RuntimeUnavailable(
                        f"cannot set up a Docker client for {self.address}: {error}",
                        hint="check MIC_DOCKER_HOST, and config.json in $DOCKER_CONFIG or "
                        "~/.docker",
                    ) from error
                # No proxy and no ~/.netrc stands between us and a socket; looking for them is a
                # quarter of a call's time.
                client.trust_env = not self.local
                self._clients[patient] = client
            return client

    def _speak(self, refused: str, error: Exception) -> None:
        """Change to the API version that the engine asks for; any other error is raised again."""
        version = other_version(error)
        if version is None or version == refused:
            raise error
        if tuple(int(part) for part in version.split(".")) < OLDEST_VERSION:
            raise RuntimeUnavailable(
                f"cannot use the Docker Engine at {self.address}: it speaks API {version}, and "
                f"GPUs can be asked for from {'.'.join(map(str, OLDEST_VERSION))} on",
                hint="upgrade it to Docker Engine 20.10 or later",
            ) from error
        with self._lock:
            if self._version == refused:
                self._version = version
                self._clients = {}
