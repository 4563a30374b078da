"""Registry credentials from a Docker client configuration. Never logged, never in a message.

The file is the one that `docker login` writes: `auths`, `credsStore`, `credHelpers`
(https://docs.docker.com/reference/cli/docker/login/). The SDK parses it; credential helpers are
called here, because the SDK waits for them without end.
"""

from __future__ import annotations

import binascii
import json
from pathlib import Path
from typing import Any

from docker.auth import AuthConfig, load_config
from docker.errors import DockerException
from docker.utils.config import find_config_file

from mic_supervisor.errors import PreflightFailed
from mic_supervisor.host import programs

_HUB = "docker.io"
_HUB_SERVER = "https://index.docker.io/v1/"
_TOKEN_USER = "<token>"  # a helper's way to say that the secret is an identity token
_HELPER_TIMEOUT = 30.0  # seconds


def credentials(config: Path | None, registry: str) -> dict[str, Any]:
    """What the SDK calls `auth_config` for a registry; empty when there are no credentials for it.

    `config` is a directory with a config.json, or such a file; None is the client's own place
    ($DOCKER_CONFIG, else ~/.docker). PreflightFailed when what is there cannot be used.
    """
    path = config / "config.json" if config is not None and config.is_dir() else config
    if path is None:
        found = find_config_file()
        if found is None:
            return {}
        path = Path(str(found))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        for key in ("auths", "credHelpers"):
            if not isinstance(document.get(key) or {}, dict):
                raise ValueError(f"{key} is not a JSON object")
        known = load_config(config_dict=document) if document else AuthConfig({})
    except OSError as error:
        raise _unusable(path, error.strerror or "it cannot be read") from error
    except (DockerException, json.JSONDecodeError, binascii.Error) as error:
        raise _unusable(path, str(error)) from error
    except (ValueError, TypeError) as error:
        # Not quoted: the SDK's words for a malformed entry may hold a piece of it.
        raise _unusable(path, "an entry is malformed") from error
    store = known.get_credential_store(registry)
    if store is not None and (found_there := _ask_helper(str(store), registry)):
        return found_there
    return AuthConfig({"auths": dict(known.auths)}).resolve_authconfig(registry) or {}


def _ask_helper(name: str, registry: str) -> dict[str, str] | None:
    """Credentials from `docker-credential-NAME get`; None when it has none.

    Protocol: https://github.com/docker/docker-credential-helpers
    """
    server = _HUB_SERVER if registry == _HUB else registry
    program = f"docker-credential-{name}"
    try:
        done = programs.run([program, "get"], _HELPER_TIMEOUT, given=server.encode(), apart=True)
    except FileNotFoundError as error:
        raise PreflightFailed(
            f"cannot get credentials for {registry}: there is no program {program}",
            hint="install it on the supervisor's PATH, or remove it from the Docker configuration",
        ) from error
    except OSError as error:
        raise PreflightFailed(
            f"cannot get credentials for {registry}: {program} does not run ({error.strerror})",
            hint=f"try it by hand: echo {server} | {program} get",
        ) from error
    if done.code is None:
        raise PreflightFailed(
            f"cannot get credentials for {registry}: {program} gives no answer "
            f"within {_HELPER_TIMEOUT:.0f} s",
            hint=f"try it by hand: echo {server} | {program} get",
        )
    if done.code != 0:
        if b"credentials not found" in done.output + done.errors:
            return None
        raise PreflightFailed(
            f"cannot get credentials for {registry}: {program} exits with {done.code}",
            hint=f"try it by hand: echo {server} | {program} get",
        )
    try:
        answer: Any = json.loads(done.output)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, LookupError, TypeError):
        # The cause is dropped on purpose: it holds the helper's output, that is, the secret.
        raise PreflightFailed(
            f"cannot get credentials for {registry}: {program} gives an answer that is no JSON "
            "object with Username and Secret",
            hint=f"try it by hand: echo {server} | {program} get",
        ) from None
    if user == _TOKEN_USER:
        return {"IdentityToken": secret, "ServerAddress": server}
    return {"Username": user, "Password": secret, "ServerAddress": server}


def _unusable(path: Path, reason: str) -> PreflightFailed:
    return PreflightFailed(
        f"cannot use the registry credentials in {path}: {reason}",
        hint="log in anew with: docker login, or set MIC_DOCKER_CONFIG to the right place",
    )
