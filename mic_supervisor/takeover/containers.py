"""Foreign containers that use GPUs, as proposals. Fields: Docker Engine API, ContainerInspect."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mic_supervisor.config.container import cpus_of
from mic_supervisor.config.types import format_duration, format_size
from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.kill import Survey
from mic_supervisor.model import OwnerKind, Pairs
from mic_supervisor.runtimes.checks import signal_number
from mic_supervisor.runtimes.docker.create import CDI_KIND, MANAGED_BY
from mic_supervisor.runtimes.docker.keys import BY_FIELD
from mic_supervisor.takeover import Proposal, for_env_file, numbers_of, refusal
from mic_supervisor.takeover.differences import differences, line, of_mount

if TYPE_CHECKING:
    from mic_supervisor.runtimes.docker.engine import Engine

_DEFAULT_SHM = 64 << 20
_VISIBLE = "NVIDIA_VISIBLE_DEVICES"
_CHOSEN = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


@dataclass(frozen=True, slots=True)
class Around:
    """What the engine says besides of a container: of itself, of its volumes, of its image.

    `image` is None where that is gone. `volumes` maps names to the options that they were made
    with.
    """

    image: Mapping[str, Any] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    volumes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    image_moved: bool = False


def proposals(survey: Survey, engine: Engine) -> list[Proposal]:
    what = "cannot look for containers"
    info = engine.call(what, lambda api: api.info())
    known = survey.inventory.numbers
    found = []
    for listed in sorted(engine.call(what, lambda api: api.containers()), key=_name):
        try:
            inspected = _inspect(engine, str(listed["Id"]))
            wanted = wanted_gpus(inspected, info.get("DefaultRuntime"))
            held = _held(survey, str(listed["Id"]))
            if not is_candidate(inspected) or not (wanted or held):
                continue
            around = _around(engine, inspected, info)
        except RuntimeRefused:
            continue  # it has ended meanwhile
        wanted = wanted or [str(index) for index in held]
        found.append(propose(inspected, around, wanted, known, held))
    return found


def _name(listed: Any) -> str:
    return str((listed.get("Names") or [listed.get("Id")])[0])


def _inspect(engine: Engine, ref: str) -> dict[str, Any]:
    found: dict[str, Any] = engine.call(
        f"cannot inspect container {ref[:12]}", lambda api: api.inspect_container(ref)
    )
    return found


def _around(engine: Engine, inspected: Mapping[str, Any], info: Mapping[str, Any]) -> Around:
    ref, name = str(inspected.get("Image")), str((inspected.get("Config") or {}).get("Image"))
    image, named = _image(engine, ref), _image(engine, name)
    mounts = inspected.get("Mounts") or ()
    volumes = [str(one["Name"]) for one in mounts if one.get("Type") == "volume"]
    return Around(
        image=image,
        info=info,
        volumes={volume: _options(engine, volume) for volume in volumes},
        image_moved=named is not None and named.get("Id") not in (ref, (image or {}).get("Id")),
    )


def _image(engine: Engine, ref: str) -> dict[str, Any] | None:
    try:
        return engine.image(f"cannot inspect image {ref}", ref)
    except RuntimeRefused:
        return None


def _options(engine: Engine, volume: str) -> Mapping[str, str]:
    what = f"cannot inspect volume {volume}"
    try:
        return engine.call(what, lambda api: api.inspect_volume(volume)).get("Options") or {}
    except RuntimeRefused:
        return {"type": "not known"}  # its path may be empty as well


def _held(survey: Survey, container: str) -> list[int | str]:
    return [
        gpu.number
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
        names = [str(name) for name in request.get("DeviceIDs") or ()]
        if request.get("Driver") == "cdi":
            wanted += [name.removeprefix(CDI_KIND) for name in names if CDI_KIND in name]
        elif "gpu" in kinds or request.get("Driver") == "nvidia":
            count = int(request.get("Count") or 0)
            ids = [name.removeprefix(CDI_KIND) for name in names]
            wanted += ids or (["all"] if count < 0 else [str(n) for n in range(count)])
    runtime = host.get("Runtime") or default_runtime
    if not wanted and runtime == "nvidia":
        visible = dict(_environment(inspected.get("Config") or {})).get(_VISIBLE, "")
        if visible not in ("none", "void"):
            wanted = [name for name in visible.split(",") if name]
    return wanted


def propose(
    inspected: Mapping[str, Any],
    around: Around,
    wanted: Sequence[str],
    known: Mapping[str, int | str],
    held: Sequence[int | str],
) -> Proposal:
    """`known` maps UUIDs to what GPUs are called; the driver sees the container on `held`."""
    name = str(inspected.get("Name") or inspected["Id"][:12]).lstrip("/")
    config, host = inspected.get("Config") or {}, inspected.get("HostConfig") or {}
    base = (around.image or {}).get("Config") or {}
    notes: list[str] = []
    besides, left = differences(inspected, base, around.info)
    entry: dict[str, Any] = {"backend": "container", "image": config.get("Image") or "?"}
    if around.image_moved:
        notes.append("It runs an earlier image of that name; the model gets what it names now.")
    command = list(config.get("Cmd") or [])
    entrypoint = config.get("Entrypoint")
    # Docker drops the image's own command where the entrypoint is replaced.
    if entrypoint != base.get("Entrypoint") or (base.get("Cmd") and not command):
        entry["entrypoint"] = list(entrypoint or [])
    if command and (command != base.get("Cmd") or "entrypoint" in entry):
        entry["command"] = command
    notes += _ports(entry, inspected)
    entry |= {**besides, **_limits(host)}
    left += _mounts(entry, inspected, around.volumes, notes)
    shm = host.get("ShmSize")
    if shm not in (None, 0, _DEFAULT_SHM) and besides.get("ipc") not in ("host", "none"):
        entry["shm_size"] = format_size(shm)
    for key, from_field in (("user", "User"), ("working_dir", "WorkingDir")):
        if config.get(from_field) and config[from_field] != base.get(from_field):
            entry[key] = config[from_field]
    left += [*_stopping(entry, config), *_health(entry, config, base)]
    secrets, unset = _own_environment(config, base, notes)
    left += unset
    asked = numbers_of(wanted, known)
    # A slice may be asked for as "0:1", which tells nothing without the driver.
    gpus = tuple(number for number in asked if number in held) or asked or tuple(held)
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
        left=tuple(left),
        secrets=secrets,
        refused=refusal(texts),
    )


def is_candidate(inspected: Mapping[str, Any]) -> bool:
    """Whether it could be taken over: not what any scope of ours, or a swarm, manages."""
    labels = (inspected.get("Config") or {}).get("Labels") or {}
    return MANAGED_BY not in labels and not any(
        str(key).startswith("com.docker.swarm.") for key in labels
    )


def _ports(entry: dict[str, Any], inspected: Mapping[str, Any]) -> list[str]:
    host = inspected.get("HostConfig") or {}
    if str(host.get("NetworkMode")) == "host":
        entry["network"] = "host"
        return ["It serves on the host's network: give its port here, and in its command."]
    asked = host.get("PortBindings") or {}
    # Of a running container also those that Docker chose.
    actual = (inspected.get("NetworkSettings") or {}).get("Ports") or asked
    published: list[tuple[int, int, str]] = []
    others: list[str] = []
    chosen: set[int] = set()
    for inside, bindings in actual.items():
        number, _, protocol = str(inside).partition("/")
        fixed = {str(one.get("HostPort")) for one in asked.get(inside) or ()}
        for binding in bindings or ():
            port, address = str(binding.get("HostPort") or ""), binding.get("HostIp") or "0.0.0.0"
            if protocol not in ("", "tcp") or not port.isdigit():
                others.append(f"{port} to {inside}")
                continue
            published.append((int(port), int(number), str(address)))
            if port not in fixed:
                chosen.add(int(port))
    notes = []
    if published:
        outside, within, address = min(published)
        if outside in chosen:
            entry["container_port"] = within
            notes.append(
                f"Docker chose its port {outside}, and the supervisor chooses another one. "
                "`port` gives it a fixed one."
            )
        else:
            entry["port"] = outside
            if within != outside:
                entry["container_port"] = within
        if address != "127.0.0.1":
            entry["listen"] = address
        more = {(out, inner, at) for out, inner, at in published} - {(outside, within, address)}
        same = sorted(at for out, inner, at in more if (out, inner) == (outside, within))
        if same:
            notes.append(f"It listens on {', '.join(same)}, too, and `listen` is one address.")
        others += [f"{out} to {inner}" for out, inner, at in sorted(more) if at not in same]
    if others:
        listed = ", ".join(dict.fromkeys(others))
        notes.append(f"It publishes more ports, which are not carried over: {listed}.")
    return notes


def _mounts(
    entry: dict[str, Any],
    inspected: Mapping[str, Any],
    volumes: Mapping[str, Mapping[str, str]],
    notes: list[str],
) -> list[str]:
    mounts, left = [], []
    requests = (inspected.get("HostConfig") or {}).get("Mounts") or ()
    for mount in sorted(inspected.get("Mounts") or (), key=lambda one: str(one["Destination"])):
        kind, target = mount.get("Type"), str(mount.get("Destination"))
        source = mount.get("Source")
        if kind == "tmpfs":
            entry.setdefault("tmpfs", []).append(_tmpfs(target, requests))
            continue
        if kind not in ("bind", "volume") or not source:
            left.append(line("--mount", f"of type {kind} at {target}"))
            continue
        options = volumes.get(str(mount.get("Name"))) or {} if kind == "volume" else {}
        device = str(options.get("device", ""))
        if "bind" in options.get("o", "").split(",") and device.startswith("/"):
            source = device
        elif options:
            # Its path on this host is an empty directory while no container uses it.
            left.append(
                line(
                    "--mount",
                    f"of the volume {mount.get('Name')} at {target}, which Docker mounts "
                    f"(type {options.get('type', '?')}, device {device or '?'})",
                    "mount it on this host, and give its path under `mounts`",
                )
            )
            continue
        one = {"source": str(source), "target": target}
        if mount.get("RW") is False:
            one["read_only"] = True  # type: ignore[assignment]
        if kind == "volume":
            notes.append(f"{target} is the volume {mount.get('Name')}, by its path on this host.")
        left += of_mount(mount, requests)
        mounts.append(one)
    if mounts:
        entry["mounts"] = mounts
    return left


def _tmpfs(target: str, requests: Sequence[Mapping[str, Any]]) -> str:
    """What `--mount type=tmpfs` asked for, as `--tmpfs` says it."""
    asked = [one.get("TmpfsOptions") or {} for one in requests if one.get("Target") == target]
    given: Mapping[str, Any] = next(iter(asked), {})
    said = ["=".join(one) for one in given.get("Options") or ()]
    if size := given.get("SizeBytes"):
        said.append(f"size={size}")
    if mode := given.get("Mode"):
        said.append(f"mode={mode:o}")
    return f"{target}:{','.join(said)}" if said else target


def _limits(host: Mapping[str, Any]) -> dict[str, Any]:
    """`limits` and `ulimits`."""
    limits: dict[str, Any] = {}
    if host.get("Memory"):
        limits["memory"] = format_size(int(host["Memory"]))
    if host.get("NanoCpus"):
        limits["cpus"] = int(host["NanoCpus"]) / 1e9
    elif int(host.get("CpuQuota") or 0) > 0:
        limits["cpus"] = int(host["CpuQuota"]) / int(host.get("CpuPeriod") or 100_000)
    if "cpus" in limits and (cpuset := host.get("CpusetCpus")):
        limits["cpus"] = min(limits["cpus"], len(cpus_of(cpuset)))
    ulimits = BY_FIELD["HostConfig", "Ulimits"].read(host.get("Ulimits") or ())
    if type(files := ulimits.get("nofile")) is int and files > 0:
        limits["nofile"] = ulimits.pop("nofile")
    if type(locked := ulimits.get("memlock")) is int:
        limits["memlock"] = "unlimited" if locked < 0 else format_size(locked)
        del ulimits["memlock"]
    found = {"limits": limits, "ulimits": ulimits}
    return {key: value for key, value in found.items() if value}


def _stopping(entry: dict[str, Any], config: Mapping[str, Any]) -> list[str]:
    left = []
    # The image's own signal counts here, too: without the key it would be SIGTERM.
    if text := str(config.get("StopSignal") or ""):
        try:
            name = signal.Signals(signal_number(text) or 0).name
        except ValueError:
            left.append(line("--stop-signal", text, "the model gets SIGTERM"))
        else:
            if name != "SIGTERM":
                entry["stop_signal"] = name
    timeout = config.get("StopTimeout")
    if isinstance(timeout, int) and timeout >= 0:
        entry["stop_timeout"] = f"{timeout}s"
    elif timeout is not None:
        left.append(line("--stop-timeout", str(timeout), "give a long `stop_timeout`, as in 24h"))
    return left


def _health(entry: dict[str, Any], config: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Its health check as the probe: the image's by `docker`, one of its own by `exec`."""
    own, of_image = config.get("Healthcheck") or {}, base.get("Healthcheck") or {}
    kind, *words = [str(word) for word in own.get("Test") or ["NONE"]]
    if kind == "NONE":
        if of_image.get("Test") in (None, [], ["NONE"]):
            return []
        return [line("--no-healthcheck", "", "the image's check runs, and nothing follows it")]
    # The engine's own numbers where none were given, in nanoseconds.
    interval, timeout, start = (
        (own.get(key) or default) / 1e9
        for key, default in (("Interval", 30e9), ("Timeout", 30e9), ("StartPeriod", 0))
    )
    if start > 300:  # the budget without the key
        entry["start_timeout"] = format_duration(start)
    if own == of_image:
        entry["probe"] = {"docker": True}
        return []
    if kind == "CMD-SHELL":
        words = [*(config.get("Shell") or ("/bin/sh", "-c")), *words]
    if refusal(words) is not None or not all(words):
        return [line("--health-cmd", " ".join(words), "give a `probe`")]
    entry["probe"] = {
        "exec": words,
        "period": format_duration(interval),
        "timeout": format_duration(timeout),
        "failures": int(own.get("Retries") or 3),
    }
    return []


def _own_environment(
    config: Mapping[str, Any], base: Mapping[str, Any], notes: list[str]
) -> tuple[Pairs, list[str]]:
    """What was set for it and not by its image, and what was taken away from that."""
    items = {str(item) for item in config.get("Env") or ()}
    unset = sorted(item for item in items if "=" not in item)
    set_here = set(_environment(config)) - set(_environment(base))
    chosen = sorted(name for name, _ in set_here if name in _CHOSEN)
    if chosen:
        notes.append(f"{', '.join(chosen)} is left out: a model sees its own GPUs and no other.")
    secrets, lost = for_env_file(
        (name, value) for name, value in set_here if name not in (_VISIBLE, *chosen)
    )
    if lost:
        notes.append(f"An env_file cannot hold {', '.join(lost)}: put it under env.")
    return secrets, [line("--env", name, "it unsets the image's variable") for name in unset]


def _environment(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    items = (str(item) for item in config.get("Env") or ())
    pairs = (item.partition("=") for item in items if "=" in item)
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
