"""A launch as the engine's own JSON, an identity as labels and back, and the program in the image.

The document is written out rather than made with the SDK's helpers: it is what the API's reference
shows (https://docs.docker.com/reference/api/engine/, ContainerCreate), and tests compare it whole.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping
from typing import Any

from docker import APIClient
from docker.errors import NotFound

from mic_supervisor import codec
from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.model import ContainerSpec, Identity, Launch, Near
from mic_supervisor.runtimes.docker import keys, networks
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.workloads import OUR_LABELS

PREFIX = OUR_LABELS
MANAGED_BY = PREFIX + "managed-by"
SCOPE = PREFIX + "scope"
HOST = PREFIX + "host"
INSTANCE = PREFIX + "instance"
MADE = PREFIX + "made"
"""The label that no image can carry: another value for each container."""
MANAGER = "mic-supervisor"

CDI_KIND = "nvidia.com/gpu="
LOGS: dict[str, Any] = {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "3"}}


def ownership(scope: str, host: str) -> dict[str, str]:
    """The labels that make a container ours; all of them must match."""
    return {MANAGED_BY: MANAGER, SCOPE: scope, HOST: host}


def labels(identity: Identity) -> dict[str, str]:
    """The labels of a container; `identity_of` reads them back."""
    values = {
        **ownership(identity.scope, identity.host),
        PREFIX + "schema": str(identity.schema),
        INSTANCE: identity.instance,
        PREFIX + "model": identity.model,
        PREFIX + "backend": identity.backend,
        PREFIX + "gpus": ",".join(identity.gpus),
        PREFIX + "ports": codec.canonical(dict(identity.ports)),
        PREFIX + "spec-hash": identity.spec_hash,
        PREFIX + "origin": identity.origin,
    }
    if identity.spec is not None:
        values[PREFIX + "spec"] = codec.canonical(dict(identity.spec))
    return values


def identity_of(found: Mapping[str, str], name: str) -> Identity:
    """What a container of ours carries. What cannot be read is empty, an unread `spec` None.

    `name` stands in for a missing instance id, so that the container still shows up as undesired.
    """
    ports = _document(found.get(PREFIX + "ports"))
    schema = found.get(PREFIX + "schema", "")
    return Identity(
        scope=found.get(SCOPE, ""),
        host=found.get(HOST, ""),
        instance=found.get(INSTANCE) or name,
        model=found.get(PREFIX + "model", ""),
        backend=found.get(PREFIX + "backend", ""),
        gpus=tuple(gpu for gpu in found.get(PREFIX + "gpus", "").split(",") if gpu),
        ports={key: port for key, port in (ports or {}).items() if type(port) is int},
        spec=_document(found.get(PREFIX + "spec")),
        spec_hash=found.get(PREFIX + "spec-hash", ""),
        schema=int(schema) if len(schema) < 10 and schema.isascii() and schema.isdigit() else 0,
        origin=found.get(PREFIX + "origin", "file"),
    )


def container_config(
    launch: Launch, spec: ContainerSpec, discovered: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The body of POST /containers/create.

    `discovered` are the device names that the engine found in its CDI specifications. If every GPU
    is among them, they are asked for by CDI, which `systemctl daemon-reload` does not take away
    from a running container; else by the older way through the NVIDIA hook.
    """
    cdi = bool(spec.devices) and all(CDI_KIND + uuid in discovered for uuid in spec.devices)
    config: dict[str, Any] = {
        **keys.settings(spec, "Config"),
        "Image": spec.image,
        "Labels": {**dict(spec.labels), **labels(launch.identity)},
        "Env": _environment(spec, hide_gpus=cdi or not spec.devices),
        "StopSignal": spec.stop_signal,
        "StopTimeout": math.ceil(spec.stop_timeout),
        "HostConfig": _host_config(spec, cdi, launch.near),
    }
    if spec.command:
        config["Cmd"] = list(spec.command)
    if spec.entrypoint is not None:
        # The engine reads [] as "the image's own" and [""] as "none".
        config["Entrypoint"] = list(spec.entrypoint) or [""]
    if spec.user is not None:
        config["User"] = spec.user
    if spec.working_dir is not None:
        config["WorkingDir"] = spec.working_dir
    if bindings := _bindings(spec):
        config["ExposedPorts"] = {port: {} for port in bindings}
    if spec.networks:
        config["NetworkingConfig"] = networks.endpoints(spec.networks, spec.network_aliases)
    return config


def _host_config(spec: ContainerSpec, cdi: bool, near: Near | None) -> dict[str, Any]:
    host: dict[str, Any] = {
        **keys.settings(spec, "HostConfig"),
        "Init": True,
        "LogConfig": LOGS,
        "NetworkMode": next(iter(spec.networks), spec.network),
        "RestartPolicy": {"Name": "no"},
    }
    if bindings := _bindings(spec):
        host["PortBindings"] = bindings
    if spec.devices:
        host["DeviceRequests"] = [_device_request(spec.devices, cdi)]
    if spec.mounts:
        # Unlike "Binds", "Mounts" never makes the engine create a missing directory.
        host["Mounts"] = [
            {"Type": "bind", "Source": m.source, "Target": m.target, "ReadOnly": m.read_only}
            for m in spec.mounts
        ]
    if spec.shm_size is not None:
        host["ShmSize"] = spec.shm_size
    limits = spec.limits
    if limits.memory is not None:
        host["Memory"] = limits.memory
    if limits.cpus is not None:
        host["NanoCpus"] = round(limits.cpus * 1e9)
    if near is not None:
        host["CpusetCpus"] = ",".join(map(str, near.cpus))
        host["CpusetMems"] = ",".join(map(str, near.nodes))
    ulimits = [("nofile", limits.nofile), ("memlock", limits.memlock)]
    if given := [{"Name": n, "Soft": v, "Hard": v} for n, v in ulimits if v is not None]:
        host["Ulimits"] = [*given, *host.get("Ulimits", ())]
    return host


def _device_request(devices: tuple[str, ...], cdi: bool) -> dict[str, Any]:
    if cdi:
        return {"Driver": "cdi", "DeviceIDs": [CDI_KIND + uuid for uuid in devices]}
    return {
        "Driver": "",
        "DeviceIDs": list(devices),
        "Capabilities": [["gpu", "compute", "utility"]],
    }


def _environment(spec: ContainerSpec, *, hide_gpus: bool) -> list[str]:
    env = [f"{key}={value}" for key, value in spec.env]
    if hide_gpus and not any(key == "NVIDIA_VISIBLE_DEVICES" for key, _ in spec.env):
        # CUDA images say NVIDIA_VISIBLE_DEVICES=all, and where the NVIDIA runtime is the engine's
        # default that alone hands out every GPU. "void" is what the toolkit's own CDI
        # specifications set.
        env.append("NVIDIA_VISIBLE_DEVICES=void")
    return env


def _bindings(spec: ContainerSpec) -> dict[str, list[dict[str, str]]]:
    bindings: dict[str, list[dict[str, str]]] = {}
    if spec.network == "host":
        return bindings
    for port in spec.ports:
        if port.host is not None:
            inside = f"{port.container if port.container is not None else port.host}/tcp"
            bindings.setdefault(inside, []).append(
                {"HostIp": spec.listen, "HostPort": str(port.host)}
            )
    return bindings


def _document(text: str | None) -> dict[str, Any] | None:
    try:
        value = codec.parse(text or "")
    except codec.BadDocument:
        return None
    return value if isinstance(value, dict) else None


# --- the program of a created container ---------------------------------------------------------
#
# With an init process the engine starts a container whose program is missing without complaint: it
# is the init that fails, with exit code 127, after the predecessor was stopped. A created
# container's files can be looked at before, in a few milliseconds each.

# What runc falls back to when neither the image nor the specification sets PATH.
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Bits of Go's os.FileMode, which is how the engine tells a mode.
_DIRECTORY = 1 << 31
_SYMLINK = 1 << 27
_EXECUTABLE = 0o111


def check_program(engine: Engine, what: str, inspected: Mapping[str, Any]) -> None:
    """RuntimeRefused when the program of a created container is certainly not there.

    `inspected` is the engine's description of the container. A file below a mount is not looked
    for, nor is anything that the engine cannot tell: then the start decides.
    """
    program = inspected.get("Path")
    config = inspected.get("Config") or {}
    if not isinstance(program, str) or not program:
        return
    mounts = tuple(
        str(mount.get("Destination", "")).rstrip("/") + "/"
        for mount in inspected.get("Mounts") or ()
        if isinstance(mount, Mapping)
    )
    candidates = _candidates(program, config)
    if any(path.startswith(mounts) for path in candidates if mounts):
        return
    verdicts = []
    for path in candidates:
        verdict = _search(engine, what, str(inspected.get("Id", "")), path, mounts)
        if verdict is None or verdict == "runs":
            return
        verdicts.append(verdict)
    if "not executable" in verdicts:
        raise RuntimeRefused(
            f"{what}: {program} in the image is not an executable file",
            hint="check the command and the entrypoint",
        )
    raise RuntimeRefused(
        f"{what}: the image has no program {program}",
        hint="check the command and the entrypoint",
    )


def _candidates(program: str, config: Mapping[str, Any]) -> list[str]:
    root = str(config.get("WorkingDir") or "/")
    if "/" in program:
        return [posixpath.normpath(posixpath.join("/", root, program))]
    env = [str(entry) for entry in config.get("Env") or ()]
    paths = [entry.removeprefix("PATH=") for entry in env if entry.startswith("PATH=")]
    candidates = (paths[-1] if paths else _DEFAULT_PATH).split(":")
    return [
        posixpath.normpath(posixpath.join("/", root, candidate, program))
        for candidate in candidates
    ]


def _search(
    engine: Engine, what: str, ref: str, path: str, mounts: tuple[str, ...], links: int = 8
) -> str | None:
    """ "runs", "missing" or "not executable"; None: it cannot be told."""
    if not links or (mounts and path.startswith(mounts)):
        return None
    try:
        stat = _stat(engine, what, ref, path)
    except RuntimeRefused:
        return None
    if stat is None:
        return "missing"
    mode, target = stat.get("mode"), stat.get("linkTarget")
    if not isinstance(mode, int):
        return None
    if mode & _SYMLINK:
        if not isinstance(target, str) or not target:
            return None
        return _search(engine, what, ref, target, mounts, links - 1)
    if mode & _DIRECTORY or not mode & _EXECUTABLE:
        return "not executable"
    return "runs"


def _stat(engine: Engine, what: str, ref: str, path: str) -> Mapping[str, Any] | None:
    def ask(api: APIClient) -> Mapping[str, Any] | None:
        try:
            # The file itself would be read from the other half, which is dropped, and so closed.
            return api.get_archive(ref, path)[1] or {}
        except NotFound:
            return None

    return engine.call(what, ask)
