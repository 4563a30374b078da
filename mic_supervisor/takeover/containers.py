"""Foreign containers that use GPUs, as proposals. Fields: Docker Engine API, ContainerInspect."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.kill import Survey
from mic_supervisor.model import OwnerKind
from mic_supervisor.runtimes.docker.create import MANAGED_BY
from mic_supervisor.takeover import Proposal, for_env_file, indices_of, refusal

if TYPE_CHECKING:
    from mic_supervisor.runtimes.docker.engine import Engine

_CDI = "nvidia.com/gpu="
_DEFAULT_SHM = 64 << 20
_VISIBLE = "NVIDIA_VISIBLE_DEVICES"
_NOT_CARRIED = (
    ("Privileged", "privileged"),
    ("CapAdd", "added capabilities"),
    ("Devices", "devices"),
    ("ExtraHosts", "extra hosts"),
    ("SecurityOpt", "security options"),
    ("Tmpfs", "tmpfs mounts"),
)


def proposals(survey: Survey, engine: Engine) -> list[Proposal]:
    what = "cannot look for containers"
    info = engine.call(what, lambda api: api.info())
    default = info.get("DefaultRuntime")
    known = survey.inventory.indices
    found = []
    for listed in sorted(engine.call(what, lambda api: api.containers()), key=_name):
        try:
            inspected = _inspect(engine, str(listed["Id"]))
            wanted = wanted_gpus(inspected, default)
            held = _held(survey, str(listed["Id"]))
            if not is_candidate(inspected) or not (wanted or held):
                continue
            image = _image(engine, str(inspected.get("Image")))
        except RuntimeRefused:
            continue  # it has ended meanwhile
        wanted = wanted or [str(index) for index in held]
        found.append(propose(inspected, image, wanted, known, held))
    return found


def _name(listed: Any) -> str:
    return str((listed.get("Names") or [listed.get("Id")])[0])


def _inspect(engine: Engine, ref: str) -> dict[str, Any]:
    found: dict[str, Any] = engine.call(
        f"cannot inspect container {ref[:12]}", lambda api: api.inspect_container(ref)
    )
    return found


def _image(engine: Engine, ref: str) -> dict[str, Any] | None:
    try:
        return engine.image(f"cannot inspect image {ref}", ref)
    except RuntimeRefused:
        return None


def _held(survey: Survey, container: str) -> list[int]:
    return [
        gpu.index
        for gpu in survey.inventory.gpus
        if any(
            process.owner is not None
            and process.owner.kind is OwnerKind.CONTAINER
            and process.owner.ref == container
            for process in gpu.processes or ()
        )
    ]


def wanted_gpus(inspected: Mapping[str, Any], default_runtime: str | None) -> list[str]:
    """What a container asked for: indices, UUIDs, "all"; empty: it uses no GPU."""
    host = inspected.get("HostConfig") or {}
    wanted: list[str] = []
    for request in host.get("DeviceRequests") or ():
        kinds = {kind for group in request.get("Capabilities") or () for kind in group}
        ids = [str(name).removeprefix(_CDI) for name in request.get("DeviceIDs") or ()]
        if request.get("Driver") == "cdi":
            wanted += [str(n).removeprefix(_CDI) for n in request["DeviceIDs"] if _CDI in str(n)]
        elif "gpu" in kinds or request.get("Driver") == "nvidia":
            count = int(request.get("Count") or 0)
            wanted += ids or (["all"] if count < 0 else [str(n) for n in range(count)])
    runtime = host.get("Runtime") or default_runtime
    if not wanted and runtime == "nvidia":
        visible = dict(_environment(inspected)).get(_VISIBLE, "")
        if visible not in ("none", "void"):
            wanted = [name for name in visible.split(",") if name]
    return wanted


def propose(
    inspected: Mapping[str, Any],
    image: Mapping[str, Any] | None,
    wanted: Sequence[str],
    known: Mapping[str, int],
    held: Sequence[int],
) -> Proposal:
    """`image` is the inspection of its image, None where that is gone; `known` maps UUIDs to
    indices; `held` are the indices of the GPUs where the driver sees it.
    """
    name = str(inspected.get("Name") or inspected["Id"][:12]).lstrip("/")
    config, host = inspected.get("Config") or {}, inspected.get("HostConfig") or {}
    base = (image or {}).get("Config") or {}
    notes: list[str] = []
    entry: dict[str, Any] = {"backend": "container", "image": config.get("Image") or "?"}
    if (entrypoint := config.get("Entrypoint")) != base.get("Entrypoint"):
        entry["entrypoint"] = list(entrypoint or [])
    # Docker drops the image's own command where the entrypoint is replaced.
    if (config.get("Cmd") or []) != (base.get("Cmd") or []) or "entrypoint" in entry:
        entry["command"] = list(config.get("Cmd") or [])
        if not entry["command"]:
            del entry["command"]
    notes += _ports(entry, host)
    notes += _mounts(entry, inspected)
    if (shm := host.get("ShmSize") or 0) not in (0, _DEFAULT_SHM):
        entry["shm_size"] = shm
    for key, field in (("user", "User"), ("working_dir", "WorkingDir")):
        if config.get(field) and config[field] != base.get(field):
            entry[key] = config[field]
    if limits := _limits(host):
        entry["limits"] = limits
    if config.get("StopSignal") and config["StopSignal"] != base.get("StopSignal"):
        entry["stop_signal"] = config["StopSignal"]
    if config.get("StopTimeout"):
        entry["stop_timeout"] = f"{config['StopTimeout']}s"
    if (base.get("Healthcheck") or {}).get("Test") not in (None, [], ["NONE"]):
        entry["probe"] = {"docker": True}
    left = [words for field, words in _NOT_CARRIED if host.get(field)]
    if left:
        notes.append(f"Not carried over: {', '.join(left)}.")
    set_here = set(_environment(inspected)) - set(_environment({"Config": base}))
    secrets, lost = for_env_file(pair for pair in set_here if pair[0] != _VISIBLE)
    if lost:
        notes.append(f"An env_file cannot hold {', '.join(lost)}: put it under env.")
    asked = indices_of(wanted, known)
    gpus = tuple(index for index in asked if index in held) or asked
    if len(gpus) < len(asked):
        notes.append(f"It may see GPU {', '.join(map(str, asked))}, and uses these only.")
    texts = [*entry.get("command", ()), *entry.get("entrypoint", ())]
    return Proposal(
        name=_service(config) or name,
        what=f"container {name}",
        entry=entry,
        gpus=gpus,
        stop=_stop(name, config, host),
        notes=tuple(notes),
        secrets=secrets,
        refused=refusal(texts),
    )


def is_candidate(inspected: Mapping[str, Any]) -> bool:
    """Whether it could be taken over: not what any scope of ours, or a swarm, manages."""
    labels = (inspected.get("Config") or {}).get("Labels") or {}
    return MANAGED_BY not in labels and not any(
        str(key).startswith("com.docker.swarm.") for key in labels
    )


def _ports(entry: dict[str, Any], host: Mapping[str, Any]) -> list[str]:
    if str(host.get("NetworkMode")) == "host":
        entry["network"] = "host"
        return ["It serves on the host's network: give its port here, and in its command."]
    published = []
    for inside, bindings in (host.get("PortBindings") or {}).items():
        number, _, protocol = str(inside).partition("/")
        for binding in bindings or ():
            if protocol in ("", "tcp") and str(binding.get("HostPort") or "").isdigit():
                address = binding.get("HostIp") or "0.0.0.0"
                published.append((int(binding["HostPort"]), int(number), str(address)))
    published = sorted(set(published))
    if not published:
        return []
    outside, within, address = published[0]
    entry["port"] = outside
    if within != outside:
        entry["container_port"] = within
    if address != "127.0.0.1":
        entry["listen"] = address
    others = ", ".join(f"{out} to {inner}" for out, inner, _ in published[1:])
    return [f"It publishes more ports, which are not carried over: {others}."] if others else []


def _mounts(entry: dict[str, Any], inspected: Mapping[str, Any]) -> list[str]:
    mounts, notes = [], []
    for mount in inspected.get("Mounts") or ():
        kind, target = mount.get("Type"), str(mount.get("Destination"))
        if kind not in ("bind", "volume") or not mount.get("Source"):
            notes.append(f"The {kind} mount at {target} is not carried over.")
            continue
        one = {"source": str(mount["Source"]), "target": target}
        if mount.get("RW") is False:
            one["read_only"] = True  # type: ignore[assignment]
        if kind == "volume":
            notes.append(f"{target} is the volume {mount.get('Name')}, by its path on this host.")
        mounts.append(one)
    if mounts:
        entry["mounts"] = sorted(mounts, key=lambda one: one["target"])
    return sorted(notes)


def _limits(host: Mapping[str, Any]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if host.get("Memory"):
        limits["memory"] = int(host["Memory"])
    if host.get("NanoCpus"):
        limits["cpus"] = int(host["NanoCpus"]) / 1e9
    for limit in host.get("Ulimits") or ():
        soft = limit.get("Soft")
        if limit.get("Name") == "nofile" and isinstance(soft, int) and soft > 0:
            limits["nofile"] = soft
        if limit.get("Name") == "memlock" and isinstance(soft, int):
            limits["memlock"] = "unlimited" if soft < 0 else soft
    return limits


def _environment(inspected: Mapping[str, Any]) -> list[tuple[str, str]]:
    items = (inspected.get("Config") or {}).get("Env") or ()
    pairs = (str(item).partition("=") for item in items)
    return [(name, value) for name, _, value in pairs]


def _service(config: Mapping[str, Any]) -> str | None:
    found = (config.get("Labels") or {}).get("com.docker.compose.service")
    return str(found) if found else None


def _stop(name: str, config: Mapping[str, Any], host: Mapping[str, Any]) -> tuple[str, ...]:
    labels = config.get("Labels") or {}
    project, service = labels.get("com.docker.compose.project"), _service(config)
    if project and service:
        return (f"docker compose -p {shlex.quote(str(project))} stop {shlex.quote(service)}",)
    stop = f"docker stop {shlex.quote(name)}"
    policy = (host.get("RestartPolicy") or {}).get("Name")
    # "always" starts a stopped container again when Docker itself is restarted.
    if policy not in (None, "", "no"):
        return (f"docker update --restart=no {shlex.quote(name)}", stop)
    return (stop,)
