"""The keys of containers alone, with Compose's names, meaning and short forms.

Each leaves here in one form, however it was written: that is what a specification holds.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from mic_supervisor.config.types import Strict
from mic_supervisor.workloads import OUR_LABELS

ULIMITS = (
    *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc"),
    *("rss", "rtprio", "rttime", "sigpending", "stack"),
)
# Of the kernel's settings those that a container has for itself. Source: docs.docker.com, "docker
# container run", "Configure namespaced kernel parameters".
_OF_NETWORK = ("net.",)
_OF_IPC = ("kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue.")
# Docker's own labels: a container that has them is taken for one of its Compose projects or swarms.
_RESERVED_LABELS = (OUR_LABELS, "com.docker.", "io.docker.", "org.dockerproject.")
# What a tmpfs is mounted with: moby, pkg/mount, validFlags and flags.
_TMPFS = re.compile(
    r"(size|nr_blocks|nr_inodes)=[0-9]+[kmgKMG%]?|mode=[0-7]{1,4}|[ug]id=[0-9]+|mpol=[^,:]+"
    r"|ro|rw|defaults|(no)?(suid|dev|exec|(dir|rel)?atime)|a?sync|dirsync|(no)?strictatime"
)
_SECURITY = {
    "no-new-privileges": "true|false",
    "apparmor": r"\S+",
    "label": r"disable|(user|role|type|level|filetype):\S+",
    "seccomp": r"unconfined|builtin|/\S+",
    "systempaths": "unconfined",
}


# --- one value ----------------------------------------------------------------------------------


def _network(name: str) -> str:
    if name in ("bridge", "host", "default", "none"):
        raise ValueError(
            f"{name} is no network that others reach it in by name: name one of your own, as "
            "`docker network ls` lists it; for the engine's bridge or the host's network use the "
            "key network"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{name!r} is no network: write a name, as `docker network ls` lists it")
    return name


def _device(given: str) -> str:
    source, target, mode, *more = [*given.split(":"), "", ""]
    if not mode and re.fullmatch("[rwm]+", target):
        target, mode = "", target
    target, mode = target or source, mode or "rwm"
    if re.fullmatch(r"/dev/nvidia[0-9]+", source):
        raise ValueError(f"{source} is a GPU, which a model is given under gpus:")
    if not (source.startswith("/") and target.startswith("/") and re.fullmatch("[rwm]+", mode)):
        raise ValueError(
            f"{given!r} is no device: write its path on the host, as in `/dev/fuse` or "
            "`/dev/fuse:/dev/fuse:rwm`; GPUs are given to models under gpus:"
        )
    if any(more):
        raise ValueError(f"{given!r} has a part too much: write `{source}:{target}:{mode}`")
    return f"{source}:{target}:{mode}"


def _capability(name: str) -> str:
    bare = name.upper().removeprefix("CAP_")
    if not re.fullmatch("[A-Z][A-Z_]*", bare):
        raise ValueError(f"{name!r} is no capability: write its name, as in `SYS_PTRACE` or `ALL`")
    return bare


def _security(given: str) -> str:
    name, *rest = re.split("[=:]", given, maxsplit=1)
    value = rest[0] if rest else "true" if name == "no-new-privileges" else ""
    if name not in _SECURITY:
        raise ValueError(f"{given!r} is none of {', '.join(_SECURITY)}")
    if not re.fullmatch(_SECURITY[name], value):
        example = {"apparmor": "PROFILE", "label": "disable", "seccomp": "/etc/mic/seccomp.json"}
        shown = example.get(name, _SECURITY[name].partition("|")[0])
        raise ValueError(f"{given!r} says nothing of {name}: write it as in `{name}={shown}`")
    return f"{name}={value}"


def _host(given: str) -> str:
    name, _, address = re.sub("[=:]", "=", given, count=1).partition("=")
    address = address.strip("[]")
    if not re.fullmatch(r"[^\s,/]+", name) or not (address == "host-gateway" or _is_ip(address)):
        raise ValueError(
            f"{given!r} is no name with its address: write `db:192.0.2.9`, or `api:host-gateway` "
            "for this machine"
        )
    return f"{name}:{address}"


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _ip(text: str) -> str:
    if not _is_ip(text):
        raise ValueError(f"{text!r} is no IP address: write one, as in `192.0.2.53`")
    return text


def _tmpfs(given: str) -> str:
    path, _, options = given.partition(":")
    wrong = [one for one in options.split(",") if options and not _TMPFS.fullmatch(one)]
    if not path.startswith("/"):
        raise ValueError(f"{given!r} does not begin with a path of the container: write `/run`")
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is no option of a tmpfs: write `{path}:size=64m`, or the path alone"
        )
    return f"{path}:{options}" if options else path


def _ulimit(given: Any) -> str:
    """ "SOFT:HARD" of a number, or of Compose's {soft: …, hard: …}."""
    numbers = [given, given]
    if isinstance(given, dict) and given.keys() == {"soft", "hard"}:
        numbers = [given["soft"], given["hard"]]
    soft, hard = numbers
    if not all(type(one) is int and one >= -1 for one in numbers):
        raise ValueError("a limit is a number, -1 for none at all, or `{soft: 1024, hard: 2048}`")
    if hard != -1 and not -1 < soft <= hard:
        raise ValueError(f"soft: {soft} is more than the hard limit, {hard}")
    return f"{soft}:{hard}"


def _ulimit_name(name: str) -> str:
    if name not in ULIMITS:
        raise ValueError(f"{name} is no limit: they are {', '.join(ULIMITS)}")
    return name


def _cpuset(given: str) -> str:
    cpus_of(given)
    return given


def cpus_of(cpuset: str) -> set[int]:
    """The CPUs that "0-3,8" means. Raises ValueError."""
    found: set[int] = set()
    for part in cpuset.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first, last if dash else first]
        if not all(re.fullmatch("[0-9]{1,4}", end) for end in ends) or int(ends[0]) > int(ends[1]):
            raise ValueError(f'{cpuset!r} is no set of CPUs: write it as in `"0-3,8"`')
        found.update(range(int(ends[0]), int(ends[1]) + 1))
    return found


def _label(name: str) -> str:
    if reserved := next((one for one in _RESERVED_LABELS if name.startswith(one)), None):
        whose = "the supervisor" if reserved == OUR_LABELS else "Docker"
        raise ValueError(f"labels that begin with {reserved} are set by {whose}; remove it")
    if not name:
        raise ValueError("a label has a name: write `NAME: VALUE`")
    return name


def _hostname(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?", name):
        raise ValueError(
            f"{name!r} is no host name: letters, digits, '-' and '.', at most 63 of them"
        )
    return name


def _sysctl(name: str) -> str:
    if not name.startswith((*_OF_NETWORK, *_OF_IPC)):
        raise ValueError(
            f"{name} belongs to the whole host, and a container has none of its own; set it there: "
            f"`sysctl {name}=VALUE`"
        )
    return name


def _text(value: Any) -> Any:
    """Compose takes numbers, true and false for texts here; 1.10 would become another one."""
    return str(value).lower() if isinstance(value, bool | int) else value


# --- lists and maps -----------------------------------------------------------------------------

_STRING = {"type": "string", "minLength": 1}
_SCALAR = {"type": ["string", "integer", "boolean"]}


def _alone(value: Any) -> Any:
    """One text for a list of it."""
    return [value] if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    """A map of Compose's list of NAME=VALUE."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return value
    return {name: text for name, _, text in (item.partition("=") for item in value)}


def _lines(value: Any) -> Any:
    """A list of Compose's map from names to addresses."""
    return [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value


def _set(items: list[str]) -> list[str]:
    """Another order is no change."""
    return sorted({*items})


def _forms(*schemas: Mapping[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [dict(schema) for schema in schemas]})


_LIST = {"type": "array", "items": _STRING}
_MAP = {"type": "object", "additionalProperties": _SCALAR}

Networks = list[Annotated[str, AfterValidator(_network)]]
Texts = list[Annotated[str, Field(min_length=1)]]
Devices = list[Annotated[str, AfterValidator(_device)]]
Capabilities = Annotated[list[Annotated[str, AfterValidator(_capability)]], AfterValidator(_set)]
SecurityOptions = list[Annotated[str, AfterValidator(_security)]]
Groups = Annotated[
    list[Annotated[str, BeforeValidator(_text)]],
    WithJsonSchema({"type": "array", "items": {"type": ["string", "integer"]}}),
]
Hosts = Annotated[
    list[Annotated[str, AfterValidator(_host)]],
    BeforeValidator(_lines),
    _forms(_LIST, {"type": "object", "additionalProperties": _STRING}),
]
Servers = Annotated[
    list[Annotated[str, AfterValidator(_ip)]], BeforeValidator(_alone), _forms(_STRING, _LIST)
]
Tmpfs = Annotated[
    list[Annotated[str, AfterValidator(_tmpfs)]], BeforeValidator(_alone), _forms(_STRING, _LIST)
]
Ulimits = Annotated[
    dict[Annotated[str, AfterValidator(_ulimit_name)], Annotated[str, BeforeValidator(_ulimit)]],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"enum": [*ULIMITS]},
            "additionalProperties": {
                "anyOf": [
                    {"type": "integer", "minimum": -1},
                    {
                        "type": "object",
                        "required": ["soft", "hard"],
                        "additionalProperties": False,
                        "properties": {
                            "soft": {"type": "integer", "description": "What holds at first."},
                            "hard": {"type": "integer", "description": "How far it may go up."},
                        },
                    },
                ]
            },
        }
    ),
]
Labels = Annotated[
    dict[Annotated[str, AfterValidator(_label)], Annotated[str, BeforeValidator(_text)]],
    BeforeValidator(_pairs),
    _forms(_MAP, _LIST),
]
Sysctls = Annotated[
    dict[Annotated[str, AfterValidator(_sysctl)], Annotated[str, BeforeValidator(_text)]],
    BeforeValidator(_pairs),
    _forms(_MAP, _LIST),
]


class ContainerOptions(Strict):
    """What a container may be besides, as in Compose."""

    networks: Networks = Field(
        default=[],
        description="Networks of the engine that it joins instead of the bridge; they must exist. "
        "Others there reach it by the model's name.",
    )
    network_aliases: Texts = Field(default=[], description="More names for it in these networks.")
    ipc: Literal["private", "shareable", "host", "none"] = Field(
        default="private", description="Whose shared memory it has."
    )
    devices: Devices = Field(
        default=[], description="Devices of the host that are no GPUs: SOURCE:TARGET:rwm."
    )
    cap_add: Capabilities = Field(default=[], description="Capabilities that it has besides.")
    cap_drop: Capabilities = Field(default=[], description="Capabilities that it does not have.")
    security_opt: SecurityOptions = Field(
        default=[], description="As in `no-new-privileges:true` or `seccomp=/etc/mic/seccomp.json`."
    )
    group_add: Groups = Field(default=[], description="More groups of its user, by name or number.")
    extra_hosts: Hosts = Field(
        default=[], description="Names for its /etc/hosts, as in `db:192.0.2.9`."
    )
    dns: Servers = Field(default=[], description="Its name servers.")
    tmpfs: Tmpfs = Field(
        default=[], description="Directories in memory, as in `/run` or `/run:size=64m`."
    )
    ulimits: Ulimits = Field(
        default={}, description="Limits by name: a number, or {soft: 1024, hard: 2048}."
    )
    read_only: bool = Field(default=False, description="Whether its own files cannot be written.")
    cpuset: Annotated[str, AfterValidator(_cpuset)] | None = Field(
        default=None, description="The CPUs that it runs on, as in `0-3,8`."
    )
    labels: Labels = Field(default={}, description="Labels for programs that look for them.")
    hostname: Annotated[str, AfterValidator(_hostname)] | None = Field(
        default=None, description="Its own host name."
    )
    sysctls: Sysctls = Field(default={}, description="Settings of the kernel for it alone.")
    pull: Literal["missing", "always", "never"] = Field(
        default="missing",
        description="When its image is pulled as an instance is created: where it is missing; "
        "always, so that a tag that moved counts; or never.",
    )

    @model_validator(mode="after")
    def _no_key_against_another(self) -> Self:
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self


KEYS = tuple(ContainerOptions.model_fields)


def _contradictions(options: ContainerOptions) -> Iterator[str]:
    """ "KEY: why", of keys that say both one thing and another; some are those of a subclass."""
    host = getattr(options, "network", None) == "host"
    if host and options.networks:
        yield (
            "networks: with network: host it has the host's network and joins no other; remove one "
            "of them, or say network: bridge where defaults say host"
        )
    if options.network_aliases and not options.networks:
        yield "network_aliases: they are names in networks, and networks names none; remove the key"
    for name in options.sysctls:
        key = "network" if name.startswith(_OF_NETWORK) else "ipc"
        if host if key == "network" else options.ipc == "host":
            yield f"sysctls: with {key}: host {name} is the host's own; remove it"
    limits = getattr(options, "limits", None)
    for name in ("nofile", "memlock"):
        if name in options.ulimits and getattr(limits, name, None) is not None:
            yield f"ulimits: {name} is given as limits.{name}, too; remove one of them"
    cpus = getattr(limits, "cpus", None)
    if options.cpuset is not None and cpus is not None and cpus > len(cpus_of(options.cpuset)):
        yield f"cpuset: it has fewer CPUs than limits.cpus, {cpus:g}; change one of them"
    if options.cpuset is not None and getattr(limits, "numa", None) is not None:
        yield "cpuset: limits.numa chooses the CPUs, too; remove one of them"
    if options.ipc in ("host", "none") and "shm_size" in options.model_fields_set:
        yield f"shm_size: with ipc: {options.ipc} it has no /dev/shm of its own; remove the key"
    if both := {*options.cap_add} & {*options.cap_drop}:
        yield f"cap_add: {min(both)} is in cap_drop, too; remove one of them"
    targets = [mount.target.rstrip("/") for mount in getattr(options, "mounts", None) or ()]
    for one in options.tmpfs:
        if (target := one.partition(":")[0].rstrip("/")) in targets:
            yield f"tmpfs: there are two mounts at {target}; remove one of them"
        targets.append(target)
