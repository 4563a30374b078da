"""Images: one pull per image for all lanes, with progress, and failures in words."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docker import APIClient

from mic_supervisor.errors import MicError, PreflightFailed, RuntimeRefused, RuntimeUnavailable
from mic_supervisor.runtimes import Progress
from mic_supervisor.runtimes.docker.auth import credentials
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.errors import (
    DISK_FULL,
    Table,
    in_words,
    is_read_timeout,
    refused,
    tidy,
)

_LOGIN = "log in with: docker login {registry} (MIC_DOCKER_CONFIG names the configuration to use)"

# Over what the registry or the engine says.
_FAILURES: Table = (
    DISK_FULL,
    (
        r"toomanyrequests|too many requests|rate limit",
        "{registry} limits how often this machine may pull",
        "wait, or " + _LOGIN,
    ),
    (
        r"no matching manifest",
        "the image has no variant for this kind of machine",
        "use an image that is built for this machine's architecture",
    ),
    (
        r"manifest unknown|name unknown|manifest for .* not found|failed to resolve reference.*"
        r"not found",
        "{registry} has no such image or tag",
        "check the image's name and tag in gpus.yaml",
    ),
    (
        r"pull access denied|unauthori[sz]ed|authentication required|no basic auth|denied|"
        r"\b40[13]\b",
        "{registry} gives no access to it, or has no such image",
        "check its name; if it is private, " + _LOGIN,
    ),
    (
        r"x509|certificate",
        "the certificate of {registry} is not trusted",
        "put its CA into /etc/docker/certs.d/{registry}/ca.crt",
    ),
    (
        r"server gave HTTP response to HTTPS client",
        "{registry} speaks plain HTTP, which the engine does not take",
        'add it to "insecure-registries" in /etc/docker/daemon.json',
    ),
    (
        r"dial tcp|no such host|i/o timeout|connection (?:refused|reset)|TLS handshake timeout|"
        r"Client\.Timeout|request canceled|network is unreachable|server misbehaving|"
        r"unexpected EOF|: EOF|\b50[0-4]\b",
        "{registry} cannot be reached ({said})",
        "check the network and the engine's proxy; without a registry: docker load -i FILE",
    ),
    (
        r"invalid reference format|invalid repository name",
        "that is not the name of an image",
        "write it as REGISTRY/NAME:TAG, in lower case",
    ),
    (
        r"not found",
        "{registry} has no such image or tag",
        "check the image's name and tag in gpus.yaml",
    ),
)


@dataclass
class _Pull:
    """One pull under way. `line` is the last progress, `error` its failure, once `done`."""

    done: threading.Event = field(default_factory=threading.Event)
    line: str = ""
    error: MicError | None = None


class Puller:
    """Pulls images through one engine.

    `config` is where registry credentials are, see auth.credentials. A pull fails after
    `silence` seconds without a word: the engine reports each layer several times a second, while it
    unpacks as well.
    """

    def __init__(self, engine: Engine, config: Path | None, *, silence: float = 600.0) -> None:
        self._silence = silence
        self._engine = engine
        self._config = config
        self._lock = threading.Lock()
        self._pulls: dict[str, _Pull] = {}

    def ensure(self, image: str, progress: Progress) -> None:
        """Pull the image unless the engine has it. PreflightFailed, RuntimeUnavailable.

        A caller who comes while the image is being pulled waits, sees the same progress, and gets
        the same outcome.
        """
        if self._present(image):
            return
        with self._lock:
            pull = self._pulls.get(image)
            mine = pull is None
            if pull is None:
                pull = self._pulls[image] = _Pull()
        if not mine:
            self._wait(pull, progress)
            return
        try:
            # Between the first look and the lock, another lane may have ended its pull.
            if not self._present(image):
                self._pull(image, pull, progress)
        except MicError as error:
            pull.error = error
            raise
        except BaseException:
            # Ctrl-C, or a progress that fails: those who wait must not take it for success.
            pull.error = PreflightFailed(f"cannot pull {image}: the pull was interrupted")
            raise
        finally:
            with self._lock:
                del self._pulls[image]
            pull.done.set()

    @staticmethod
    def _wait(pull: _Pull, progress: Progress) -> None:
        shown = ""
        while not pull.done.wait(0.2):
            if pull.line != shown:
                shown = pull.line
                progress(shown)
        if pull.error is not None:
            raise type(pull.error)(pull.error.message, hint=pull.error.hint)

    def _present(self, image: str) -> bool:
        try:
            return self._engine.image(f"cannot look for the image {image}", image) is not None
        except RuntimeRefused as error:
            if refused(error)[0] == 400:  # not the name of an image, which the pull says better
                return False
            raise

    def _pull(self, image: str, pull: _Pull, progress: Progress) -> None:
        what = f"cannot pull {image}"
        if re.fullmatch(r"(sha256:)?[0-9a-f]{64}", image):
            raise PreflightFailed(
                f"{what}: it is the id of an image that is not on this machine",
                hint="name the image as REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:…",
            )

        def show(line: str) -> None:
            pull.line = line
            progress(line)

        def ask(api: APIClient) -> None:
            layers = _Layers(image)
            for item in api.pull(image, stream=True, decode=True, auth_config=auth):
                if "error" in item:
                    raise failure(image, str(item["error"]))
                if line := layers.line(item):
                    show(line)

        show(f"pulling {image}")
        # With none of ours, the SDK would look for some, and wait for a helper without end.
        auth = credentials(self._config, registry_of(image))
        try:
            self._engine.call(what, ask, silence=self._silence)
        except RuntimeRefused as error:
            raise failure(image, refused(error)[1] or error.message) from error
        except RuntimeUnavailable as error:
            if not is_read_timeout(error):
                raise
            raise PreflightFailed(
                f"{what}: nothing came for {self._silence:g} s",
                hint="check the network and the engine's proxy, and see: journalctl -u docker",
            ) from error
        show(f"pulled {image}")


class _Layers:
    """Turns the engine's reports per layer into one percentage that never falls."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._sizes: dict[str, tuple[float, float]] = {}
        self._percent = -1
        self._unpacking = False

    def line(self, item: dict[str, Any]) -> str | None:
        """What to show after this report, None for nothing new."""
        detail = item.get("progressDetail")
        status, layer = item.get("status"), str(item.get("id", ""))
        if status == "Downloading" and isinstance(detail, dict):
            current, total = detail.get("current"), detail.get("total")
            if isinstance(current, int) and isinstance(total, int) and total > 0:
                self._sizes[layer] = (min(current, total), total)
        elif status in ("Download complete", "Pull complete") and layer in self._sizes:
            total_size = self._sizes[layer][1]
            self._sizes[layer] = (total_size, total_size)
        elif status == "Extracting" and not self._unpacking and self._downloaded() >= 100:
            self._unpacking = True
            return f"pulling {self._image}: unpacking"
        percent = self._downloaded()
        if percent <= self._percent or self._unpacking or not self._sizes:
            return None
        self._percent = percent
        return f"pulling {self._image}: {percent} %"

    def _downloaded(self) -> int:
        done = sum(current for current, _ in self._sizes.values())
        whole = sum(total for _, total in self._sizes.values())
        return int(100 * done / whole) if whole else 100


def registry_of(image: str) -> str:
    """The host (and port) that serves an image: "docker.io" for a bare name."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return first
    return "docker.io"


def failure(image: str, message: str) -> PreflightFailed:
    """A failed pull in words, from what the registry or the engine says."""
    cause, hint = in_words(_FAILURES, message, registry=registry_of(image), said=tidy(message))
    return PreflightFailed(f"cannot pull {image}: {cause}", hint=hint)
