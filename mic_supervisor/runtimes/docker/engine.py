"""The connection to one Docker Engine, by the SDK: shared by all lanes, with errors in words."""

from __future__ import annotations

import errno
import http.client
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import requests
import urllib3
import yaml
from docker import APIClient
from docker.errors import (
    APIError,
    DockerException,
    InvalidConfigFile,
    NotFound,
    StreamParseError,
    create_api_error_from_http_exception,
)
from docker.transport import UnixHTTPAdapter
from docker.utils import version_lt
from requests import PreparedRequest, Response

from mic_supervisor.errors import MicError, RuntimeRefused, RuntimeUnavailable
from mic_supervisor.text import one_line, quoted

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
    """The SDK's client, which waits for the next word of a stream without end, and takes a refusal
    of events for an event.

    `silence` ends the first, after so many seconds.
    """

    silence: float | None = None

    def send(self, request: PreparedRequest, **kwargs: Any) -> Response:
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = (self.timeout, self.silence)
        answer = super().send(request, **kwargs)
        if kwargs.get("stream"):
            try:
                answer.raise_for_status()
            except requests.HTTPError as error:
                create_api_error_from_http_exception(error)
        return answer


class _OnePool(UnixHTTPAdapter):
    """The SDK's has a pool for each URL, and closes the one that was used longest ago although
    another lane may be using it.
    """

    def get_connection(self, _url: Any, proxies: Any = None) -> Any:
        return super().get_connection("http+docker://localhost", proxies)


class Engine:
    """Calls one engine; what fails leaves as RuntimeUnavailable or RuntimeRefused.

    `timeout` bounds a plain question, `work_timeout` a call that makes the engine work (create,
    start, remove; a first GPU start without persistence mode takes tens of seconds), both in
    seconds. One client per bound is shared by all threads: a requests session keeps no state of a
    call.
    """

    def __init__(self, base_url: str | None, *, timeout: float, work_timeout: float) -> None:
        self.base_url = base_url
        self.timeout = timeout
        self.work_timeout = work_timeout
        # "Podman 4.3.1" where that answered last: it takes requests for GPUs and ignores them.
        self.podman: str | None = None
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
        bounds = (self.work_timeout if patient else self.timeout, silence)
        try:
            try:
                return ask(self._client(bounds))
            except ERRORS as error:
                if not other_version(error):
                    raise
            self._forget_version()
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

    def network(self, what: str, name: str) -> dict[str, Any] | None:
        """The engine's description of a network; None: it has none."""
        return self._found(
            what,
            lambda api: an_object(api.inspect_network(name)),
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

    def _forget_version(self) -> None:
        """Make new clients, which ask the engine for its own version.

        The old ones are not closed: other lanes are in the middle of a call with them. They keep no
        connection.
        """
        with self._lock:
            self._version, self._clients = "auto", {}

    def _note_podman(self, answer: Response, **_: object) -> None:
        """Podman names itself in the head of every answer. Asked for its version it runs programs,
        which takes seconds on a busy machine.
        """
        version = answer.headers.get("Libpod-API-Version")
        self.podman = None if version is None else f"Podman {one_line(version, 40)}"

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
                f"{client.api_version}, and GPUs need API {OLDEST_VERSION} or later",
                hint="upgrade it to Docker Engine 20.10 or later",
            )
        if self.local:
            only = _OnePool(f"http+unix://{self.address}", max_pool_size=_CONNECTIONS)
            client.mount("http+docker://", only)
        client.silence = silence
        client.hooks["response"].append(self._note_podman)
        # An engine that is told to stop takes no new connections, ends its containers, and goes on
        # answering on the old ones meanwhile: what it says there must not be acted upon.
        client.headers["Connection"] = "close"
        # No proxy and no ~/.netrc stands between us and a socket; looking for them is a quarter of
        # a call's time.
        client.trust_env = not self.local
        return client


# --- what is said of a call that failed ---------------------------------------------------------


# Everything that a call through the SDK raises when the other side fails. KeyError, TypeError and
# the like are among them because the SDK takes the shape of an answer for granted, so that a
# foreign program behind the address breaks it in those ways. RecursionError is JSON that is nested
# without end.
ODD_ANSWERS: tuple[type[Exception], ...] = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)
ERRORS: tuple[type[Exception], ...] = (
    DockerException,
    StreamParseError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    EOFError,
    struct.error,
    *ODD_ANSWERS,
)

START_HINT = (
    "start it with: systemctl start docker (MIC_DOCKER_HOST names another socket or address)"
)
ADDRESS_HINT = "check MIC_DOCKER_HOST"
NO_ENGINE = "what answers at {address} is not a Docker Engine"
LOG_HINT = "see what it says: systemctl status docker; journalctl -u docker"

_LONGEST = 8000  # characters of a message that are looked at
_REFUSALS = Path(__file__).with_name("refusals.yaml")

_BROKEN: tuple[type[Exception], ...] = (
    ConnectionResetError,
    BrokenPipeError,
    EOFError,
    http.client.IncompleteRead,
    requests.exceptions.ChunkedEncodingError,
)

# When there was no answer, or none that an engine gives: kinds of errors, or their numbers, one of
# which is among all that the error was made from. The first match counts.
_NO_ANSWER: tuple[tuple[tuple[type[Exception] | int, ...], str, str], ...] = (
    (
        (FileNotFoundError, NotADirectoryError),
        "there is no Docker socket at {address}",
        START_HINT,
    ),
    (
        (PermissionError,),
        "access to {address} is denied",
        "run as root, or add the user to the group docker: usermod -aG docker USER",
    ),
    ((ConnectionRefusedError,), "no Docker Engine listens at {address}", START_HINT),
    (
        (socket.gaierror, urllib3.exceptions.NameResolutionError),
        "the host name in {address} cannot be resolved",
        ADDRESS_HINT,
    ),
    (
        _BROKEN,
        "the engine at {address} hung up in the middle of the call",
        LOG_HINT,
    ),
    (
        (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError),
        "the engine at {address} does not answer in time",
        LOG_HINT,
    ),
    (
        (InvalidConfigFile,),
        "the Docker client configuration cannot be read ({said})",
        "repair or remove config.json in $DOCKER_CONFIG or ~/.docker",
    ),
    (
        (requests.exceptions.JSONDecodeError, http.client.BadStatusLine),
        NO_ENGINE,
        ADDRESS_HINT,
    ),
    (
        (errno.EMFILE, errno.ENFILE),
        "too many files are open",
        "raise LimitNOFILE of mic.service",
    ),
    ((errno.EHOSTUNREACH, errno.ENETUNREACH), "there is no route to {address}", ADDRESS_HINT),
    (
        (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema),
        "{address} is not an address of an engine",
        ADDRESS_HINT,
    ),
    (
        (requests.ConnectionError, urllib3.exceptions.ProtocolError, http.client.HTTPException),
        "the connection to {address} fails ({said})",
        LOG_HINT,
    ),
    ((Exception,), "the engine at {address} cannot be used ({said})", ADDRESS_HINT),
)

_CONTAINERD = r"containerd\.sock.*(?:connection refused|no such file)"
_WRAPPINGS = (
    r"^(driver failed programming external connectivity on endpoint \S+ \(\w+\)"
    r"|failed to set up container networking|failed to create (?:shim )?task(?: for container)?"
    r"|OCI runtime \w+ failed|runc \w+ failed|exec failed|unable to start container process"
    r"|error during container init): "
)
_VERSION = r"client version \S+ is too (?:new\. Maximum|old\. Minimum) supported API version"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all it was made from; requests and urllib3 keep causes in `args` as well."""
    seen: set[int] = set()
    queue: list[object] = [error]
    while queue:
        item = queue.pop(0)
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        queue += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]


def is_read_timeout(error: BaseException | None) -> bool:
    """Whether the engine took the call and was silent for longer than we waited."""
    kinds = (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError)
    return isinstance(error, TimeoutError) or any(isinstance(item, kinds) for item in chain(error))


def refused(error: BaseException | None) -> tuple[int | None, str]:
    """(HTTP status, the engine's own message) of an answer; (None, "") for all other errors."""
    answer = next((item for item in chain(error) if isinstance(item, APIError)), None)
    if answer is None:
        return None, ""
    return answer.status_code, str(answer.explanation or "")[:_LONGEST]


def other_version(error: BaseException) -> bool:
    """Whether the engine refuses because it speaks another version of the API."""
    status, message = refused(error)
    return status == 400 and re.search(_VERSION, message) is not None


def tidy(message: str) -> str:
    """The engine's message without the layers that passed it on, in quotes."""
    text, found = (message.strip().splitlines() or [""])[0].strip(), 1
    while found:
        text, found = re.subn(_WRAPPINGS, "", text)
    text = text.removesuffix(": unknown").rstrip(".")
    return quoted(text) if text else "the engine gives no reason"


@cache
def _table(by: str) -> tuple[tuple[re.Pattern[str], str, str], ...]:
    with _REFUSALS.open(encoding="utf-8") as file:
        rows = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))[by]
    return tuple(
        (re.compile(pattern, re.IGNORECASE), row["cause"], row["hint"])
        for row in rows
        for pattern in ([row["says"]] if isinstance(row["says"], str) else row["says"])
    )


def refusal(message: str, *, registry: str | None = None) -> tuple[str, str | None]:
    """A refusal of the engine as (cause, hint); of a pull, where there is a `registry`."""
    message = message[:_LONGEST]
    for pattern, cause, hint in _table("engine" if registry is None else "registry"):
        if match := pattern.search(message):
            words = match.groupdict()
            said = words.get("said")
            words |= {"registry": registry, "said": quoted(said) if said else tidy(message)}
            return cause.format(**words), hint.format(**words)
    return tidy(message), None


def explain(what: str, error: Exception, address: str) -> MicError:
    """One MicError for any error of a call; `what` begins the sentence ("cannot list containers").

    `address` is how a person knows the engine: a socket's path, or a URL.
    """
    if isinstance(error, MicError):
        return error
    status, message = refused(error)
    if status is None:
        cause, hint = _unreachable(error, address)
    elif other_version(error):
        cause, hint = tidy(message), "use a Docker Engine of 20.10 or later"
    elif re.search(_CONTAINERD, message):
        cause = "the engine cannot reach containerd"
        hint = "see what it says: systemctl status containerd; journalctl -u containerd"
    elif status in (502, 503, 504):
        cause, hint = f"the engine at {address} is not ready ({tidy(message)})", LOG_HINT
    elif status in (401, 403):
        return RuntimeRefused(
            f"{what}: {address} does not allow the call ({tidy(message)})",
            hint="an authorisation plugin or socket proxy is in the way: allow containers, "
            "images, exec and events there",
        )
    else:
        cause, way_out = refusal(message)
        return RuntimeRefused(f"{what}: {cause}", hint=way_out)
    return RuntimeUnavailable(f"{what}: {cause}", hint=hint)


def _unreachable(error: Exception, address: str) -> tuple[str, str]:
    """The cause and the way out when there was no answer, or none that an engine gives."""
    if isinstance(error, ODD_ANSWERS) and not isinstance(
        error, (DockerException, requests.RequestException)
    ):
        return NO_ENGINE.format(address=address), ADDRESS_HINT
    items = tuple(chain(error))
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return next(
        (cause.format(address=address, said=quoted(said)), hint)
        for kinds, cause, hint in _NO_ANSWER
        if any(_is(item, kind) for item in items for kind in kinds)
    )


def _is(item: BaseException, kind: type[Exception] | int) -> bool:
    if isinstance(kind, int):
        return getattr(item, "errno", None) == kind
    return isinstance(item, kind)
