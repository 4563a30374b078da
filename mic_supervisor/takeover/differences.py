"""What a container has besides, as keys of gpus.yaml; and what no key says, as lines for people.

Each key that the engine shows is compared with what a plain `docker run` of the same image has. A
key that stands in no table here is compared with the empty value of its type, so that a setting of
a later engine is not dropped in silence. Fields: Docker Engine API, ContainerInspect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from mic_supervisor.config.container import ContainerOptions
from mic_supervisor.runtimes.docker.create import CDI_KIND, LOGS
from mic_supervisor.runtimes.docker.keys import BY_FIELD
from mic_supervisor.text import one_line

_LONGEST = 300  # characters of one value

# What `containers` carries over, or notes itself.
_CARRIED = {
    *("Binds", "Cmd", "CpuPeriod", "CpuQuota", "Entrypoint", "Env", "Healthcheck", "Image"),
    *("Memory", "Mounts", "NanoCpus", "NetworkMode", "PortBindings", "PublishAllPorts"),
    *("ShmSize", "StopSignal", "StopTimeout", "Ulimits", "User", "VolumesFrom", "WorkingDir"),
}
# Of the client that started it, of the image's build, or without effect by itself.
_NO_SETTING = {
    *("ArgsEscaped", "AttachStderr", "AttachStdin", "AttachStdout", "ConsoleSize"),
    *("ContainerIDFile", "ExposedPorts", "OnBuild", "Shell", "StdinOnce", "Volumes"),
}
# What the engine shows of a network itself; the rest of an endpoint was asked for.
_STATE_OF_ENDPOINT = {
    *("DNSNames", "EndpointID", "Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen"),
    *("IPAddress", "IPPrefixLen", "IPv6Gateway", "MacAddress", "NetworkID"),
}
# Later engines hide more; these are what all have (Engine 19.03 to 29).
_HIDDEN = {
    "MaskedPaths": {
        *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
        *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats"),
        "/sys/firmware",
    },
    "ReadonlyPaths": {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
}
_OPTIONS = {
    "AutoRemove": "--rm",
    "BlkioWeight": "--blkio-weight",
    "CapAdd": "--cap-add",
    "CapDrop": "--cap-drop",
    "CgroupParent": "--cgroup-parent",
    "CgroupnsMode": "--cgroupns",
    "CpuShares": "--cpu-shares",
    "CpusetCpus": "--cpuset-cpus",
    "CpusetMems": "--cpuset-mems",
    "DeviceCgroupRules": "--device-cgroup-rule",
    "DeviceRequests": "--gpus",
    "Devices": "--device",
    "Dns": "--dns",
    "DnsOptions": "--dns-option",
    "DnsSearch": "--dns-search",
    "Domainname": "--domainname",
    "ExtraHosts": "--add-host",
    "GroupAdd": "--group-add",
    "Hostname": "--hostname",
    "IpcMode": "--ipc",
    "Labels": "--label",
    "Links": "--link",
    "LogConfig": "--log-driver",
    "MacAddress": "--mac-address",
    "MemoryReservation": "--memory-reservation",
    "MemorySwap": "--memory-swap",
    "OomScoreAdj": "--oom-score-adj",
    "OpenStdin": "--interactive",
    "PidMode": "--pid",
    "PidsLimit": "--pids-limit",
    "Privileged": "--privileged",
    "ReadonlyRootfs": "--read-only",
    "RestartPolicy": "--restart",
    "Runtime": "--runtime",
    "SecurityOpt": "--security-opt",
    "StorageOpt": "--storage-opt",
    "Sysctls": "--sysctl",
    "Tmpfs": "--tmpfs",
    "Tty": "--tty",
    "UTSMode": "--uts",
    "UsernsMode": "--userns",
}
FOR_ALL = 'every container gets it by "{}" in /etc/docker/daemon.json'
_ADVICE = {
    "AutoRemove": "as soon as it is stopped, Docker removes it, and its unnamed volumes with "
    "their data",
    "DnsOptions": FOR_ALL.format("dns-opts"),
    "DnsSearch": FOR_ALL.format("dns-search"),
    "IpcMode": "the model has a /dev/shm of its own, of shm_size",
    "Labels": "programs that look for containers by label, such as proxies, do not find the model",
    "LogConfig": "a model logs to {} with {}, for `mic-supervisor logs`".format(
        LOGS["Type"], ", ".join(f"{name}={value}" for name, value in LOGS["Config"].items())
    ),
    "MaskedPaths": "as with --security-opt systempaths=unconfined",
    "ReadonlyPaths": "as with --security-opt systempaths=unconfined",
    "RestartPolicy": "the supervisor starts a model again whenever it ends",
    "SecurityOpt": "save a profile in a file, and name that: `security_opt: [seccomp=/PATH]`",
}
_IN_BRIDGE, _AS_GIVEN = (
    "the model is in its other networks alone",
    "Docker chooses these for a model",
)


def differences(
    inspected: Mapping[str, Any], image: Mapping[str, Any], info: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Keys with their values, and one line for each setting that has no key. `image` is the image's
    own `Config`, `info` what the engine says of itself.
    """
    config, host = dict(inspected.get("Config") or {}), dict(inspected.get("HostConfig") or {})
    host["RestartPolicy"] = (host.get("RestartPolicy") or {}).get("Name")
    host["DeviceRequests"] = [*filter(None, map(_request, host.get("DeviceRequests") or ()))]
    config["Labels"] = _labels(config.get("Labels") or {}, image.get("Labels") or {})
    host["SecurityOpt"] = _security(host)
    plain = _plain(inspected, info)
    entry, found = _networks(inspected)
    sections: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
        ("HostConfig", host, {}),
        ("Config", config, {**image, "Labels": {}}),
    )
    for section, values, own in sections:
        for key, value in sorted(values.items()):
            if key in _CARRIED | _NO_SETTING or value == own.get(key):
                continue
            if key in _HIDDEN:
                unconfined = "systempaths=unconfined" in host["SecurityOpt"]
                is_plain = value is None or _HIDDEN[key] <= set(value) or unconfined
            else:
                is_plain = not (value or own.get(key)) or value in plain.get(key, ())
            if is_plain:
                continue
            if (row := BY_FIELD.get((section, key))) is not None:
                given, value = _divided(row.key, row.read(value))
                entry |= {row.key: given} if given else {}
                if not value:
                    continue
            if (shown := _shown(key, value)) is not None:
                found.append(line(_OPTIONS.get(key, f"{section}.{key}"), shown, _ADVICE.get(key)))
    return entry, found


def _divided(key: str, value: Any) -> tuple[Any, Any]:
    """What of a value the file can say, and what it cannot."""
    if isinstance(value, list):
        said = [item for item in value if _can_say(key, [item])]
        return said, [item for item in value if item not in said]
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if _can_say(key, {name: item})}
        return kept, {name: item for name, item in value.items() if name not in kept}
    return (value, None) if _can_say(key, value) else (None, value)


def _can_say(key: str, value: Any) -> bool:
    try:
        ContainerOptions.model_validate({key: value})
    except ValidationError:
        return False
    return "${" not in str(value)


def _labels(given: Mapping[str, str], of_image: Mapping[str, str]) -> dict[str, str]:
    """Those that somebody asked for: not the image's, and not Compose's own records."""
    return {
        name: text
        for name, text in given.items()
        if of_image.get(name) != text and not name.startswith("com.docker.compose.")
    }


def _security(host: Mapping[str, Any]) -> list[str]:
    given = [str(one) for one in host.get("SecurityOpt") or ()]
    if "host" in (host.get("IpcMode"), host.get("PidMode")):  # then the engine adds it itself
        given = [one for one in given if one != "label=disable"]
    if host.get("MaskedPaths") == [] == host.get("ReadonlyPaths"):
        given.append("systempaths=unconfined")  # how the client says it
    return given


def line(option: str, value: str = "", advice: str | None = None) -> str:
    """ "--dns 1.1.1.1: instead, …"."""
    return f"{option} {value}".rstrip() + (f": {advice}" if advice else "")


def _plain(inspected: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What a plain container has where that is not empty; several where engines differ."""
    host = inspected.get("HostConfig") or {}
    config = inspected.get("Config") or {}
    network, names = str(host.get("NetworkMode")), [str(inspected.get("Id"))[:12]]
    if "host" in (network, host.get("UTSMode")):
        names.append(str(info.get("Name")))
    # Then it has the name of the other one.
    joined = network.startswith("container:")
    return {
        # Without cgroup namespaces of version 2, the host's is the default.
        "CgroupnsMode": ("private", *(["host"] if info.get("CgroupVersion") == "1" else [])),
        "Domainname": (config.get("Domainname"),) if joined else (),
        "Hostname": (*names, config.get("Hostname") if joined else ""),
        "Init": (True,),  # which every container of ours has
        "IpcMode": ("private",),
        "Isolation": ("default",),
        "MemorySwap": (2 * int(host.get("Memory") or 0),),
        "MemorySwappiness": (-1,),
        "PidsLimit": (-1,),
        "RestartPolicy": ("no", "always", "unless-stopped"),
        "Runtime": ("runc", "io.containerd.runc.v2", "nvidia", info.get("DefaultRuntime")),
    }


def _shown(key: str, value: Any) -> str | None:
    """None: nothing is worth a line. What may be secret is shown by its name alone."""
    if key == "Labels":
        return one_line(", ".join(sorted(value)), _LONGEST)
    if key == "LogConfig":
        options = ", ".join(sorted(value.get("Config") or ()))
        if value.get("Type") == "json-file" and not options:
            return None
        return one_line(f"{value.get('Type')}{f' (with {options})' if options else ''}", _LONGEST)
    return one_line("" if value is True else words(value) or "(empty)", _LONGEST)


def words(value: Any) -> str:
    """A value of the engine's JSON on one line: "a, b", "k=v"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={words(item)}" for key, item in value.items() if item)
    if isinstance(value, list):
        return ", ".join(map(words, value))
    return str(value)


def _networks(inspected: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    mode = str((inspected.get("HostConfig") or {}).get("NetworkMode"))
    left = []
    if mode.startswith("container:"):
        advice = (
            "the model has a network of its own: publish its port here, and let both find each "
            "other there"
        )
        left.append(line("--network", mode[: len("container:") + 12], advice))
    elif mode == "none":
        advice = "the model is in the network bridge, and may reach others"
        left.append(line("--network", mode, advice))
    endpoints = (inspected.get("NetworkSettings") or {}).get("Networks") or {}
    names = sorted(set(endpoints) - {"bridge", "host", "none"}, key=lambda one: (one != mode, one))
    # What the engine gives by itself, and to the model, too.
    usual = (str(inspected.get("Id"))[:12], (inspected.get("Config") or {}).get("Hostname"))
    aliases = {str(inspected.get("Name")).lstrip("/")}
    for name, endpoint in sorted(endpoints.items()):
        asked = {
            key: value
            for key, value in (endpoint or {}).items()
            if value and key not in _STATE_OF_ENDPOINT
        }
        aliases.update(str(one) for one in asked.pop("Aliases", ()) if one not in usual)
        in_bridge = name == "bridge" and bool(names)
        if any(asked.values()) or in_bridge:
            with_it = "; ".join(f"{key} {words(value)}" for key, value in asked.items() if value)
            shown = f"{name}{f' ({with_it})' if with_it else ''}"
            left.append(line("--network", shown, _IN_BRIDGE if in_bridge else _AS_GIVEN))
    # By its own name, too, as Docker has it: others may know it by that.
    return {"networks": names, "network_aliases": sorted(aliases)} if names else {}, left


def _request(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a request for devices has beyond GPUs to compute with."""
    kinds = {kind for group in request.get("Capabilities") or () for kind in group}
    given = dict(request)
    if request.get("Driver") == "cdi":
        ids = [name for name in request.get("DeviceIDs") or () if CDI_KIND not in str(name)]
        given |= {"Driver": "", "DeviceIDs": ids}
    elif "gpu" in kinds or request.get("Driver") == "nvidia":
        more = sorted(kinds - {"gpu", "nvidia", "compute", "utility"})
        given |= {"Driver": "", "Count": 0, "DeviceIDs": None, "Capabilities": more}
    return {key: value for key, value in given.items() if value}


# --- mounts --------------------------------------------------------------------------------------

_USUAL_OPTIONS = {"", "ro", "rw", "z", "rprivate", "nocopy", "cached", "delegated", "consistent"}
_OF_MOUNT = {"Type", "Name", "Source", "Destination", "Driver", "Mode", "RW", "Propagation"}
_OF_REQUEST = {"Type", "Source", "Target", "ReadOnly", "Consistency"}
_AT_ITS_MAKING = {"CreateMountpoint", "DriverConfig", "Labels", "NoCopy", "Propagation"}


def of_mount(mount: Mapping[str, Any], requests: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a mount has beyond source, target and whether it may be written.

    `requests` are all of `HostConfig.Mounts`, where options are that its own description lacks.
    """
    target = str(mount.get("Destination"))
    given = {*str(mount.get("Mode") or "").split(","), str(mount.get("Propagation") or "")}
    found = sorted(given - _USUAL_OPTIONS)
    if (driver := mount.get("Driver")) not in (None, "", "local"):
        found.append(f"volume-driver={driver}")
    found += [f"{k}={words(v)}" for k, v in mount.items() if v and k not in _OF_MOUNT]
    for request in requests:
        options = (v for k, v in request.items() if k not in _OF_REQUEST and isinstance(v, dict))
        if request.get("Target") == target:
            found += [
                f"{key}={words(value)}"
                for group in options
                for key, value in group.items()
                if value and key not in _AT_ITS_MAKING
            ]
    return [line("--mount", f"at {target} with {', '.join(found)}")] if found else []
