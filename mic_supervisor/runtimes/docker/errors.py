"""What the engine, the SDK and the socket say when they fail, in sentences with a way out."""

from __future__ import annotations

import errno
import functools
import re
from collections.abc import Iterator

from mic_supervisor.errors import MicError, RuntimeRefused, RuntimeUnavailable

START_HINT = (
    "start it with: systemctl start docker (MIC_DOCKER_HOST names another socket or address)"
)
LOOK_HINT = "see what it says: systemctl status docker; journalctl -u docker"

# What an engine says when it refuses, as patterns over its message, the first match counts.
# Wording seen on Engine 20.10 and read in moby for later ones. Groups fill in the sentence and
# the hint.
_REFUSALS: tuple[tuple[str, str, str | None], ...] = (
    (
        r'exec: "docker-init"',
        "the engine has no docker-init, which every container of ours starts with",
        "install the program docker-init next to dockerd (on Debian: apt install tini docker.io)",
    ),
    (
        r'could not select device driver "cdi"',
        "the engine has CDI switched off",
        'put {{"features": {{"cdi": true}}}} into /etc/docker/daemon.json and restart docker',
    ),
    (
        r"could not select device driver",
        "the engine cannot hand out GPUs, it has no NVIDIA Container Toolkit",
        "install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker "
        "&& systemctl restart docker",
    ),
    (
        r"unresolvable CDI devices? (?P<device>.*)",
        "the engine's CDI specification has no device {device}",
        "write it anew: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml",
    ),
    (
        r"nvidia-container-cli: .*?(?P<device>GPU-[0-9a-f-]+): unknown device",
        "the NVIDIA driver has no GPU {device}",
        "compare with: nvidia-smi -L",
    ),
    (
        r"nvidia-container-cli: (?P<said>[^\n]*?)(: unknown)?$",
        "the NVIDIA Container Toolkit says: {said}",
        "check the driver with: nvidia-smi",
    ),
    (
        r"Bind for (?P<host>\S+):(?P<port>\d+) failed: port is already allocated",
        "port {port} on {host} is already taken by a container",
        "see which: docker ps --filter publish={port}",
    ),
    (
        r"listen \w+ (?P<host>\S+):(?P<port>\d+): bind: address already in use",
        "port {port} on {host} is already taken",
        "see by whom: ss -ltnp 'sport = :{port}'",
    ),
    (
        r"failed to bind host port (?:for )?(?P<host>\S+?):(?P<port>\d+)\b.*address already in use",
        "port {port} on {host} is already taken",
        "see by whom: ss -ltnp 'sport = :{port}'",
    ),
    (
        r"(?P<host>\S+):\d+: bind: cannot assign requested address",
        "{host} is not an address of this machine",
        "set listen to 127.0.0.1, to 0.0.0.0, or to an address that `ip address` lists",
    ),
    (
        r'exec: "(?P<program>[^"]+)": (?:executable file not found|stat .*no such file)',
        "the image has no program {program}",
        "check the command and the entrypoint",
    ),
    (
        r'exec: "(?P<program>[^"]+)": permission denied',
        "{program} in the image is not an executable file",
        "check the command and the entrypoint",
    ),
    (
        r"exec format error",
        "the image's program is for another kind of machine",
        "use an image that is built for this machine's architecture",
    ),
    (
        r"bind source path does not exist: (?P<path>.+)",
        "the mount source {path} does not exist",
        "create it: mkdir -p {path}",
    ),
    (
        r"unable to find (?P<kind>user|group) (?P<name>[^:]+)",
        "the image has no {kind} {name}",
        "use a number, or a name that the image's /etc/passwd and /etc/group know",
    ),
    (
        r"error setting rlimit",
        "the engine may not raise a limit that high",
        "lower limits.nofile or limits.memlock, or raise dockerd's own (LimitNOFILE, LimitMEMLOCK)",
    ),
    (
        r"No such image: (?P<image>\S+)",
        "the image {image} is not on this machine",
        "pull it with: docker pull {image}",
    ),
    (
        r"no space left on device",
        "the engine's disk is full",
        "see what takes it: docker system df; free some with: docker image prune",
    ),
    (
        r"cannot allocate memory",
        "the machine has no memory left",
        "see what takes it: free -h; docker stats --no-stream",
    ),
)

# Texts, not compiled: a command that goes well needs none of them.
_CONTAINERD = r"containerd\.sock.*(?:connection refused|no such file)"
_WRAPPINGS = (
    r"^driver failed programming external connectivity on endpoint \S+ \(\w+\): ",
    r"^failed to set up container networking: ",
    r"^failed to create (?:shim )?task(?: for container)?: ",
    r"^OCI runtime \w+ failed: ",
    r"^runc \w+ failed: ",
    r"^exec failed: ",
    r"^unable to start container process: ",
    r"^error during container init: ",
)
_VERSION = (
    r"client version \S+ is too (?:new\. Maximum|old\. Minimum) supported API version is "
    r"(?P<version>\d+\.\d+)"
)


@functools.cache
def engine_errors() -> tuple[type[Exception], ...]:
    """Everything that a call through the SDK raises when the other side fails.

    KeyError, TypeError and the like are among them because the SDK takes the shape of an answer for
    granted, so that a stranger behind the address breaks it in those ways.
    """
    import http.client
    import struct

    import requests
    import urllib3
    from docker.errors import DockerException, StreamParseError

    return (
        DockerException,
        StreamParseError,
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        http.client.HTTPException,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        struct.error,
    )


def chain(error: BaseException) -> Iterator[BaseException]:
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


def is_read_timeout(error: BaseException) -> bool:
    """Whether the engine took the call and was silent for longer than we waited."""
    import requests
    import urllib3

    kinds = (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError)
    return any(isinstance(item, kinds) for item in chain(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an answer of the engine, None for all other errors."""
    from docker.errors import APIError

    return error.status_code if isinstance(error, APIError) else None


def said(error: BaseException | None) -> str:
    """The engine's own message, "" when there is none."""
    return str(getattr(error, "explanation", None) or "")


def other_version(error: BaseException) -> str | None:
    """The API version that the engine would rather speak, from its refusal of ours."""
    return asked_for(said(error)) if status_of(error) == 400 else None


def asked_for(message: str) -> str | None:
    """The API version that a refusal of another one names."""
    match = re.search(_VERSION, message)
    return match["version"] if match else None


def tidy(message: str) -> str:
    """The engine's message without the layers that passed it on."""
    lines = message.strip().splitlines()
    text = lines[0].strip() if lines else ""
    before = None
    while before != text:
        before = text
        for wrapping in _WRAPPINGS:
            text = re.sub(wrapping, "", text)
    return text.removesuffix(": unknown").rstrip(".") or "the engine gives no reason"


def refusal(message: str) -> tuple[str, str | None]:
    """A refusal of the engine as (cause, hint)."""
    for pattern, cause, hint in _REFUSALS:
        if match := re.search(pattern, message, re.IGNORECASE):
            words = match.groupdict()
            return cause.format(**words), hint and hint.format(**words)
    return tidy(message), None


def explain(what: str, error: Exception, address: str) -> MicError:
    """One MicError for any error of a call; `what` begins the sentence ("cannot list containers").

    `address` is how a person knows the engine: a socket's path, or a URL.
    """
    if isinstance(error, MicError):
        return error
    status = status_of(error)
    if status is None:
        cause, hint = _unreachable(error, address)
        return RuntimeUnavailable(f"{what}: {cause}", hint=hint)
    message = said(error)
    if other_version(error) is not None:
        return RuntimeUnavailable(
            f"{what}: {tidy(message)}", hint="use a Docker Engine of 20.10 or later"
        )
    if re.search(_CONTAINERD, message):
        return RuntimeUnavailable(
            f"{what}: the engine cannot reach containerd",
            hint="see what it says: systemctl status containerd; journalctl -u containerd",
        )
    if status in (502, 503, 504):
        return RuntimeUnavailable(
            f"{what}: the engine at {address} is not ready ({tidy(message)})", hint=LOOK_HINT
        )
    if status in (401, 403):
        return RuntimeRefused(
            f"{what}: {address} does not allow the call ({tidy(message)})",
            hint="an authorisation plugin or socket proxy is in the way: allow containers, "
            "images, exec and events there",
        )
    cause, hint = refusal(message)
    return RuntimeRefused(f"{what}: {cause}", hint=hint)


def _unreachable(error: Exception, address: str) -> tuple[str, str | None]:
    """The cause and the way out when there was no answer, or none that an engine gives."""
    import http.client
    import socket

    import requests
    import urllib3
    from docker.errors import DockerException, InvalidConfigFile

    items = tuple(chain(error))

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(item, kinds) for item in items)

    numbers = {item.errno for item in items if isinstance(item, OSError)}
    if has(FileNotFoundError, NotADirectoryError):
        return f"there is no Docker socket at {address}", START_HINT
    if has(PermissionError):
        return (
            f"access to {address} is denied",
            "run as root, or add the user to the group docker: usermod -aG docker USER",
        )
    if has(ConnectionRefusedError):
        return f"no Docker Engine listens at {address}", START_HINT
    if has(socket.gaierror, urllib3.exceptions.NameResolutionError):
        return f"the host name in {address} cannot be resolved", "check MIC_DOCKER_HOST"
    if has(ConnectionResetError, BrokenPipeError, http.client.IncompleteRead) or has(
        http.client.RemoteDisconnected, requests.exceptions.ChunkedEncodingError, EOFError
    ):
        return f"the engine at {address} hung up in the middle of the call", LOOK_HINT
    if has(TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError):
        return f"the engine at {address} does not answer in time", LOOK_HINT
    if has(requests.exceptions.SSLError, urllib3.exceptions.SSLError):
        return f"the TLS connection to {address} fails ({_first(error)})", "check MIC_DOCKER_HOST"
    if has(InvalidConfigFile):
        return (
            f"the Docker client configuration cannot be read ({_first(error)})",
            "mend or remove config.json in $DOCKER_CONFIG or ~/.docker",
        )
    if has(requests.exceptions.JSONDecodeError, http.client.BadStatusLine) or (
        isinstance(error, (ValueError, LookupError, TypeError, AttributeError))
        and not isinstance(error, (DockerException, requests.RequestException))
    ):
        return f"what answers at {address} is not a Docker Engine", "check MIC_DOCKER_HOST"
    if errno.EMFILE in numbers or errno.ENFILE in numbers:
        return "too many files are open", "raise LimitNOFILE of mic.service"
    if numbers & {errno.EHOSTUNREACH, errno.ENETUNREACH}:
        return f"there is no route to {address}", "check MIC_DOCKER_HOST"
    if has(requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
        return f"{address} is not an address of an engine", "check MIC_DOCKER_HOST"
    if has(requests.ConnectionError, urllib3.exceptions.ProtocolError, http.client.HTTPException):
        return f"the connection to {address} fails ({_first(error)})", LOOK_HINT
    return f"the engine at {address} cannot be used ({_first(error)})", "check MIC_DOCKER_HOST"


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
