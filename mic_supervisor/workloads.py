"""Workloads: what an instance runs, a container or a tree of host processes; what a running one is
asked, its probes and the calls about the models inside it; and the programs that are told of it.

Part of the nouns in model.py, which is where everybody imports them from. Frozen data.

Command and environment texts may hold `${port}`, `${port:NAME}`, `${gpu_indices}` and
`${env:NAME}`. They are filled in at launch and are not part of a workload's identity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

OUR_LABELS = "io.mic."
"""How the labels begin that a container of ours is known by."""

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Mount:
    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a workload serves on.

    `host` None: chosen from the range. `container` None: the same number as the host's.
    """

    name: str  # "http", "grpc", "metrics"
    host: int | None = None
    container: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    memory: int | None = None  # bytes
    cpus: float | None = None
    nofile: int | None = None
    memlock: int | None = None  # bytes, -1 is unlimited
    numa: Literal["near"] | None = None  # on the CPUs and the memory next to its GPUs alone


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """A container. `devices` are the GPU UUIDs to ask the engine for; empty for simulated GPUs.

    `file_env` is what `env_file` holds; `variables` are the values of the `${env:NAME}` that the
    texts refer to. Both, and `env`, are secrets: they have no repr and enter labels as keyed
    digests only.
    """

    image: str
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: Pairs = field(default=(), repr=False)
    env_file: str | None = None
    file_env: Pairs = field(default=(), repr=False)
    variables: Pairs = field(default=(), repr=False)
    devices: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    ports: tuple[Port, ...] = ()
    listen: str = "127.0.0.1"
    network: Literal["bridge", "host"] = "bridge"
    shm_size: int | None = None  # bytes
    user: str | None = None
    working_dir: str | None = None
    limits: Limits = Limits()
    stop_signal: str = "SIGTERM"
    stop_timeout: float = 30.0  # seconds between the stop signal and KILL
    # The keys of containers alone, in the forms that config/container.py makes of them.
    networks: tuple[str, ...] = ()  # that it joins instead of the engine's own bridge
    network_aliases: tuple[str, ...] = ()
    ipc: str = "private"
    host_devices: tuple[str, ...] = ()  # the key `devices`: "/dev/fuse:/dev/fuse:rwm"
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    security_opt: tuple[str, ...] = ()  # "NAME=VALUE"
    group_add: tuple[str, ...] = ()
    extra_hosts: tuple[str, ...] = ()  # "NAME:ADDRESS"
    dns: tuple[str, ...] = ()
    tmpfs: tuple[str, ...] = ()  # "/run" or "/run:size=64m,mode=1777"
    ulimits: Pairs = ()  # "SOFT:HARD" by name
    read_only: bool = False
    cpuset: str | None = None  # "0-3,8"
    labels: Pairs = ()
    hostname: str | None = None
    sysctls: Pairs = ()
    pull: Literal["missing", "always", "never"] = "missing"
    digest: str | None = None  # what the image's tag was pulled as; None: as the engine has it


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A host process and its tree. Secrets as in ContainerSpec.

    `directories` are absolute paths that a runtime makes before it executes the command, in this
    order, where they are not there: 0700 and the user's own; their parents are 0755.
    """

    command: tuple[str, ...]
    env: Pairs = field(default=(), repr=False)
    env_file: str | None = None
    file_env: Pairs = field(default=(), repr=False)
    variables: Pairs = field(default=(), repr=False)
    ports: tuple[Port, ...] = ()
    listen: str = "127.0.0.1"
    user: str | None = None
    working_dir: str | None = None
    limits: Limits = Limits()
    stop_signal: str = "SIGTERM"
    stop_timeout: float = 30.0
    directories: tuple[str, ...] = ()


Workload = ContainerSpec | ProcessSpec


@dataclass(frozen=True, slots=True)
class Preparation:
    """A command that is run on the host before an instance is made, as its user and with its
    environment. It may hold `${…}` as a workload's texts do; `variables` are the secrets in it.
    """

    command: tuple[str, ...]
    variables: Pairs = field(default=(), repr=False)
    timeout: float = 14400.0  # seconds


# --- Probes -----------------------------------------------------------------------------------
#
# They are remembered, so that what runs by an earlier specification can be asked by it. `kind` says
# which check it was.

# A probe that a later version wrote, with something that this one does not know, is no probe: what
# it would ask is unknown.
_WHOLE = {"extra": "forbid"}


@dataclass(frozen=True, slots=True)
class HttpCheck:
    """GET `path` on the port called `port`; 2xx or 3xx passes.

    A port may be answered by a foreign process. `expect` names top-level members of the JSON answer
    and the values they must have; `listed` names lists in it by their path ("system.argv", or
    "data[].id" for that member of each item), and an item that each must hold.
    """

    path: str
    port: str = "http"
    expect: Pairs = ()
    listed: Pairs = ()
    kind: Literal["http"] = field(default="http", kw_only=True)
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class TcpCheck:
    port: str = "http"
    kind: Literal["tcp"] = field(default="tcp", kw_only=True)
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class ExecCheck:
    """A command, run on the host for a process and inside the container for a container."""

    command: tuple[str, ...]
    kind: Literal["exec"] = field(default="exec", kw_only=True)
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """The health check that the image itself declares, as the engine reports it."""

    kind: Literal["engine"] = field(default="engine", kw_only=True)
    __pydantic_config__ = _WHOLE


Check = HttpCheck | TcpCheck | ExecCheck | EngineCheck


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One call to a running server's port "http". A 2xx answer is success."""

    method: Literal["GET", "POST"]
    path: str
    body: str | None = None
    timeout: float = 10.0  # seconds
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class Progress:
    """A counter that moves while there is work, and the request that decides where it stands still.

    `metric` is a name of Prometheus' text format, at `path` of the port called `port`. Its value is
    the sum over all labels.
    """

    metric: str
    request: HttpCall  # its timeout is how long an answer may take
    path: str = "/metrics"
    port: str = "http"
    within: float = 120.0  # seconds that the counter may stand still before the request is sent
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class Probe:
    """A check, a counter that has to move, or both: then both have to pass."""

    check: Check | None = None
    period: float = 5.0  # seconds from the end of one try to the next
    timeout: float = 3.0  # seconds
    failures: int = 3  # in a row, until it counts
    progress: Progress | None = None
    __pydantic_config__ = _WHOLE

    def __post_init__(self) -> None:
        if min(self.period, self.timeout, self.failures) <= 0:
            raise ValueError(f"{self} would never be asked, or never count")
        if self.check is None and self.progress is None:
            raise ValueError(f"{self} would ask for nothing")


@dataclass(frozen=True, slots=True)
class Probes:
    """Startup gates the other two; liveness restarts; readiness only reports."""

    startup: Probe | None = None
    liveness: Probe | None = None
    readiness: Probe | None = None
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A request that has to be answered so many times before an instance is ready."""

    request: HttpCall
    count: int = 1


# --- Placements: models inside a server -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """One model inside a server, on some of the server's GPUs. `digest` identifies the
    configuration to be loaded.
    """

    model: str
    gpus: tuple[str, ...]
    digest: str
    load: HttpCall = field(repr=False)
    unload: HttpCall = field(repr=False)
    verify: HttpCall = field(repr=False)  # its answer goes to the backend's `placement_state`
    summary: Pairs = ()  # what a person would call it: (("instances_per_gpu", "8"),)
    entry: str | None = None  # as the file calls it, where that is another name than the server's
    directory: str | None = (
        None  # on the host, what a load reads; None: the server has it elsewhere
    )

    @property
    def called(self) -> str:
        """As people know it: by the file."""
        return self.entry or self.model


class LoadState(StrEnum):
    LOADED = "loaded"
    LOADING = "loading"
    ABSENT = "absent"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class PlacementState:
    """What the server says of one model. `digest` is comparable with Placement's, None unknown."""

    model: str
    state: LoadState
    digest: str | None = None
    reason: str | None = None
    summary: Pairs = ()


# --- What they answered -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """`ok` None: the prober itself could not tell.

    `failures` in a row lead to something, at a pace that the file sets: two that count are at least
    a period apart, however often is asked. `counted_at` is when the last of them was.
    """

    ok: bool | None
    reason: str
    at: float  # steady
    failures: int = 0
    counted_at: float | None = None  # steady


@dataclass(frozen=True, slots=True)
class Health:
    """What the probes of one running workload last said. None: not probed (yet)."""

    startup: ProbeResult | None = None
    liveness: ProbeResult | None = None
    readiness: ProbeResult | None = None
    placements: tuple[PlacementState, ...] = ()
    surplus: tuple[Placement, ...] = ()  # what the server has of ours, and nobody asks for
    devices: ProbeResult | None = None  # whether a container sees its GPUs from inside
    warm_up: ProbeResult | None = None


# --- Programs that are told -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hook:
    """A program that is told of something. Times are seconds."""

    command: tuple[str, ...]
    timeout: float = 30.0
    settle: float = 1.0  # from its end until what it took out is stopped
    name: str = "on_endpoints_change"  # as the file calls it
