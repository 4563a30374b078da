"""Images: one pull per image for all lanes, with progress, credentials, and failures in words."""

from __future__ import annotations

import binascii
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from docker import APIClient
from docker.auth import AuthConfig, load_config
from docker.errors import APIError, DockerException
from docker.utils.config import find_config_file

from mic_supervisor import codec
from mic_supervisor.errors import (
    MicError,
    PreflightFailed,
    RuntimeRefused,
    RuntimeUnavailable,
    Withdrawn,
)
from mic_supervisor.host import programs
from mic_supervisor.host.files import read_text
from mic_supervisor.runtimes import Progress
from mic_supervisor.runtimes.docker.engine import (
    Engine,
    is_read_timeout,
    other_version,
    refusal,
    refused,
)
from mic_supervisor.text import quoted

_HUB = "docker.io"
_HUB_SERVER = "https://index.docker.io/v1/"
_TOKEN_USER = "<token>"  # a helper's way to say that the secret is an identity token
_HELPER_TIMEOUT = 30.0  # seconds
_HELPER_HINT = (
    "try it by hand: echo {server} | {program} get; where that works, mic.service keeps network or "
    'files from it: docs/troubleshooting.md, "The image cannot be pulled", has the drop-in'
)
# What a registry says of an image that it shows to nobody who has not logged in.
_WANTS_LOGIN = re.compile(
    r"denied|unauthori[sz]ed|authentication|no basic auth|not found|\b40[134]\b", re.I
)


@dataclass
class _Pull:
    """One pull under way. `line` is the last progress, `error` its failure, once `done`."""

    done: threading.Event = field(default_factory=threading.Event)
    line: str = ""
    error: MicError | None = None


class Puller:
    """Pulls images through one engine.

    `config` is where registry credentials are, see `credentials`. A pull fails after
    `silence` seconds without a word: the engine reports each layer several times a second, while it
    unpacks as well.
    """

    def __init__(self, engine: Engine, config: Path | None, *, silence: float = 600.0) -> None:
        self._silence = silence
        self._engine = engine
        self._config = config
        self._lock = threading.Lock()
        self._pulls: dict[str, _Pull] = {}

    def ensure(
        self,
        image: str,
        progress: Progress,
        when: Literal["missing", "always", "never"] = "missing",
    ) -> None:
        """Pull the image unless the engine has it; `always` also then, `never` refuses instead.
        PreflightFailed, RuntimeUnavailable.

        A caller who comes while the image is being pulled waits, sees the same progress, and gets
        the same outcome.
        """
        if when == "never" and not self._present(image):
            raise PreflightFailed(
                f"cannot use {image}: it is not on this machine, and with pull: never it is not "
                "pulled",
                hint=f"bring it: docker pull {image}, or docker load; or remove the key pull",
            )
        if when == "always":
            self.renew(image, progress)
        elif not self._present(image):
            # Between the first look and the lock, another lane may have ended its pull.
            self._once(image, progress, unless=lambda: self._present(image))

    def renew(self, image: str, progress: Progress) -> None:
        """As `ensure`, whether or not the engine has something under that name."""
        self._once(image, progress, unless=lambda: False)

    def _once(self, image: str, progress: Progress, *, unless: Callable[[], bool]) -> None:
        while True:
            with self._lock:
                pull = self._pulls.get(image)
                if pull is None:
                    pull = self._pulls[image] = _Pull()
                    break
            if self._wait(pull, progress):
                return
        try:
            if not unless():
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
    def _wait(pull: _Pull, progress: Progress) -> bool:
        """Whether it was pulled; False: who pulled it has given up, and the next one has to."""
        shown = ""
        while not pull.done.wait(0.2):
            if pull.line != shown:
                shown = pull.line
                progress(shown)
        if isinstance(pull.error, Withdrawn):
            return False
        if pull.error is not None:
            raise type(pull.error)(pull.error.message, hint=pull.error.hint)
        return True

    def _present(self, image: str) -> bool:
        try:
            return self._engine.image(f"cannot look for the image {image}", image) is not None
        except RuntimeRefused as error:
            if refused(error)[0] == 400:  # not the name of an image, which the pull says better
                return False
            raise

    def registry_digest(self, image: str) -> str:
        """See `Images`. The engine asks, as it would for a pull, and nothing is downloaded."""
        auth, without = credentials(self._config, registry_of(image))
        what = f"cannot ask for the digest of {image}"

        def ask(api: APIClient) -> str:
            try:
                found = api.inspect_distribution(image, auth_config=auth)  # type: ignore[no-untyped-call]
            except APIError as error:
                if other_version(error):
                    raise
                raise failure(image, refused(error)[1], without, what=what) from error
            return str(found["Descriptor"]["digest"])

        return self._engine.call(what, ask, patient=True)

    def digests(self, image: str) -> tuple[str, ...]:
        """See `Images`."""
        found = self._engine.image(f"cannot look for the image {image}", image) or {}
        return tuple(str(one).partition("@")[2] for one in found.get("RepoDigests") or ())

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
                    raise failure(image, str(item["error"]), without)
                if line := layers.line(item):
                    show(line)

        show(f"pulling {image}")
        # With none of ours, the SDK would look for some, and wait for a helper without end.
        auth, without = credentials(self._config, registry_of(image))
        try:
            self._engine.call(what, ask, silence=self._silence)
        except RuntimeRefused as error:
            raise failure(image, refused(error)[1] or error.message, without) from error
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
    return _HUB


class Nothing(NamedTuple):
    """What became of the question to a credential helper that is configured and gave nothing."""

    why: str
    hint: str


def failure(
    image: str, message: str, without: Nothing | None = None, *, what: str | None = None
) -> PreflightFailed:
    """A failed pull in words, from what the registry or the engine says.

    `without`: why it went out without credentials, although a helper is to give some. `what` begins
    the sentence where it is no pull.
    """
    cause, hint = refusal(message, registry=registry_of(image))
    if without is not None and _WANTS_LOGIN.search(message):
        cause = f"{cause}; it went out without credentials: {without.why}"
        hint = "; else ".join(filter(None, (without.hint, hint)))
    return PreflightFailed(f"{what or f'cannot pull {image}'}: {cause}", hint=hint)


# --- Credentials: never logged, never in a message ------------------------------------------------
#
# The file is the one that `docker login` writes: `auths`, `credsStore`, `credHelpers`
# (https://docs.docker.com/reference/cli/docker/login/). The SDK parses it; credential helpers are
# called here, because the SDK waits for them without end.


def credentials(config: Path | None, registry: str) -> tuple[dict[str, Any], Nothing | None]:
    """What the SDK calls `auth_config` for a registry; empty when there are no credentials for it.
    And what a helper said that was to give some, and gave none.

    `config` is a directory with a config.json, or such a file; None is the client's own place
    ($DOCKER_CONFIG, else ~/.docker). PreflightFailed when what is there cannot be used.
    """
    path = config / "config.json" if config is not None and config.is_dir() else config
    if path is None:
        found = find_config_file()
        if found is None:
            return {}, None
        path = Path(str(found))
    try:
        document = codec.parse(read_text(path))
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        for key in ("auths", "credHelpers"):
            if not isinstance(document.get(key) or {}, dict):
                raise ValueError(f"{key} is not a JSON object")
        known = load_config(config_dict=document) if document else AuthConfig({})
    except OSError as error:
        raise _unusable(path, error.strerror or "it cannot be read") from error
    except (DockerException, codec.BadDocument, binascii.Error) as error:
        raise _unusable(path, str(error)) from error
    except (ValueError, TypeError) as error:
        # Not quoted: the SDK's words for a malformed entry may hold a piece of it.
        raise _unusable(path, "an entry is malformed") from error
    store, nothing = known.get_credential_store(registry), None
    if store is not None:
        answer = _ask_helper(str(store), registry)
        if not isinstance(answer, Nothing):
            return answer, None
        nothing = answer
    found_here = AuthConfig({"auths": dict(known.auths)}).resolve_authconfig(registry) or {}
    return found_here, None if found_here else nothing


def _ask_helper(name: str, registry: str) -> dict[str, str] | Nothing:
    """Credentials from `docker-credential-NAME get`.

    Protocol: https://github.com/docker/docker-credential-helpers
    """
    server = _HUB_SERVER if registry == _HUB else registry
    program = f"docker-credential-{name}"
    by_hand = _HELPER_HINT.format(server=server, program=program)

    def failed(why: str, hint: str = by_hand) -> MicError:
        return PreflightFailed(f"cannot get credentials for {registry}: {why}", hint=hint)

    try:
        done = programs.run([program, "get"], _HELPER_TIMEOUT, given=server.encode(), apart=True)
    except FileNotFoundError as error:
        raise failed(
            f"there is no program {program}",
            "install it on the supervisor's PATH, or remove it from the Docker configuration",
        ) from error
    except OSError as error:
        raise failed(f"{program} does not run ({error.strerror})") from error
    # Its standard output is never quoted: it may be the secret, whatever the exit status is.
    complaint = done.errors.decode(errors="replace").strip()
    said = f": {quoted(complaint, 300)}" if complaint else ""
    if done.code is None:
        raise failed(f"{program} gives no answer within {_HELPER_TIMEOUT:.0f} s{said}")
    if done.code != 0:
        if b"credentials not found" in done.output + done.errors:
            return Nothing(f"{program} is configured for {registry} and gives none{said}", by_hand)
        raise failed(f"{program} exits with {done.code}{said}")
    try:
        answer: Any = codec.parse(done.output)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, LookupError, TypeError):
        # The cause is dropped on purpose: it holds the helper's output, that is, the secret.
        raise failed(
            f"{program} gives an answer that is no JSON object with Username and Secret"
        ) from None
    if not secret:
        return Nothing(f"{program} is configured for {registry} and gives an empty secret", by_hand)
    if user == _TOKEN_USER:
        return {"IdentityToken": secret, "ServerAddress": server}
    return {"Username": user, "Password": secret, "ServerAddress": server}


def _unusable(path: Path, reason: str) -> PreflightFailed:
    return PreflightFailed(
        f"cannot use the registry credentials in {path}: {reason}",
        hint="log in anew with: docker login, or set MIC_DOCKER_CONFIG to the right directory",
    )
