"""The keys of containers as the engine has them, there and back: one row for each.

Fields: Docker Engine API, ContainerCreate and ContainerInspect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mic_supervisor import codec
from mic_supervisor.errors import PreflightFailed
from mic_supervisor.host.files import read_text
from mic_supervisor.model import ContainerSpec

_PROFILE = "seccomp=/"


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the file, and `field` of the engine's `HostConfig` or `Config`.

    `write` makes the engine's value of the specification's, `read` the file's of the engine's.
    """

    key: str
    field: str
    write: Callable[[Any], Any] = list
    read: Callable[[Any], Any] = list
    section: str = "HostConfig"


def _same(value: Any) -> Any:
    return value


def _device(text: str) -> dict[str, str]:
    source, target, mode = text.rsplit(":", 2)
    return {"PathOnHost": source, "PathInContainer": target, "CgroupPermissions": mode}


def _ulimit(name: str, limit: str) -> dict[str, Any]:
    soft, hard = map(int, limit.split(":"))
    return {"Name": name, "Soft": soft, "Hard": hard}


def _read_device(one: Mapping[str, str]) -> str:
    source = one.get("PathOnHost", "")
    return (
        f"{source}:{one.get('PathInContainer') or source}:{one.get('CgroupPermissions') or 'rwm'}"
    )


def _read_ulimit(one: Mapping[str, Any]) -> Any:
    soft, hard = one.get("Soft"), one.get("Hard")
    return soft if soft == hard else {"soft": soft, "hard": hard}


KEYS = (
    Key("ipc", "IpcMode", _same, _same),
    Key(
        "devices",
        "Devices",
        lambda value: [_device(one) for one in value],
        lambda value: [_read_device(one) for one in value],
    ),
    Key("cap_add", "CapAdd"),
    Key("cap_drop", "CapDrop"),
    Key("security_opt", "SecurityOpt"),
    Key("group_add", "GroupAdd"),
    Key("extra_hosts", "ExtraHosts"),
    Key("dns", "Dns"),
    Key(
        "tmpfs",
        "Tmpfs",
        lambda value: {path: options for path, _, options in (one.partition(":") for one in value)},
        lambda value: [f"{k}:{v}" if v else k for k, v in value.items()],
    ),
    Key(
        "ulimits",
        "Ulimits",
        lambda value: [_ulimit(*one) for one in value],
        lambda value: {one["Name"]: _read_ulimit(one) for one in value},
    ),
    Key("read_only", "ReadonlyRootfs", _same, _same),
    Key("cpuset", "CpusetCpus", _same, _same),
    Key("labels", "Labels", dict, dict, "Config"),
    Key("hostname", "Hostname", _same, _same, "Config"),
    Key("sysctls", "Sysctls", dict, dict),
)
_IN_SPEC = {"devices": "host_devices"}
_DEFAULTS = {one.name: one.default for one in fields(ContainerSpec)}
BY_FIELD = {(key.section, key.field): key for key in KEYS}


def settings(spec: ContainerSpec, section: str) -> dict[str, Any]:
    """What the keys that were given are in this section of the engine's document."""
    found = {}
    for key in KEYS:
        name = _IN_SPEC.get(key.key, key.key)
        value = getattr(spec, name)
        if key.section == section and value != _DEFAULTS[name]:
            found[key.field] = key.write(value)
    if "SecurityOpt" in found and "systempaths=unconfined" in found["SecurityOpt"]:
        # The client's own, which says it to the engine so.
        found["SecurityOpt"].remove("systempaths=unconfined")
        found |= {"MaskedPaths": [], "ReadonlyPaths": []}
    return found


def with_profiles(spec: ContainerSpec) -> ContainerSpec:
    """The specification with what stands in the seccomp profiles that it names, as the engine wants
    them. Raises PreflightFailed.
    """
    options = [_profile(one) if one.startswith(_PROFILE) else one for one in spec.security_opt]
    return replace(spec, security_opt=tuple(options))


def _profile(option: str) -> str:
    path = option.removeprefix("seccomp=")
    try:
        profile = codec.parse(read_text(Path(path)))
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise PreflightFailed(
            f"cannot use the seccomp profile {path}: {cause}",
            hint="give security_opt the absolute path of a profile in JSON",
        ) from error
    return f"seccomp={json.dumps(profile)}"
