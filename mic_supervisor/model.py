"""The nouns of the program: frozen data that every layer shares, and no behaviour.

Units are in the names or the comments: bytes, seconds, watts, degrees Celsius, ratios from 0 to 1.
Times are seconds since the epoch, unless they are said to be steady: seconds since the boot, which
is what decisions are made of (see clocks.py). An unknown number is None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from mic_supervisor.calls import Check as Check
from mic_supervisor.calls import EngineCheck as EngineCheck
from mic_supervisor.calls import ExecCheck as ExecCheck
from mic_supervisor.calls import HttpCall as HttpCall
from mic_supervisor.calls import HttpCheck as HttpCheck
from mic_supervisor.calls import LoadState as LoadState
from mic_supervisor.calls import Pairs as Pairs
from mic_supervisor.calls import Placement as Placement
from mic_supervisor.calls import PlacementState as PlacementState
from mic_supervisor.calls import Probe as Probe
from mic_supervisor.calls import Probes as Probes
from mic_supervisor.calls import TcpCheck as TcpCheck

# --- GPUs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes. `used` excludes what the driver reserves wherever the driver can tell them apart."""

    total: int
    used: int | None
    free: int | None
    reserved: int | None = None


class OwnerKind(StrEnum):
    """Whose a process on a GPU is."""

    MANAGED = "managed"  # ours: `instance` says which
    CONTAINER = "container"  # a foreign container
    UNIT = "unit"  # a foreign systemd unit
    ORPHAN = "orphan"  # nobody's
    UNKNOWN = "unknown"  # could not be read


@dataclass(frozen=True, slots=True)
class Owner:
    kind: OwnerKind
    ref: str | None = None  # container id, unit name
    instance: str | None = None  # of a foreign MPS server: the one that it serves


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """One process that NVML lists on a GPU.

    `start_time` is field 22 of /proc/PID/stat, clock ticks since boot; PID and start time together
    identify a process. None: the process could not be read or no longer exists.
    """

    pid: int
    name: str | None
    used_memory: int | None  # bytes
    start_time: int | None = None
    kinds: tuple[str, ...] = ()  # of "compute", "graphics", "mps"
    owner: Owner | None = None
    started_at: float | None = None  # seconds since the epoch, as exact as the clock was at boot

    @property
    def managed(self) -> bool:
        """Whether it is of an instance of ours, as far as is known."""
        return self.owner is not None and self.owner.kind is OwnerKind.MANAGED

    @property
    def instance(self) -> str | None:
        """The instance that it belongs to, or that it serves, as far as is known."""
        return None if self.owner is None else self.owner.instance


@dataclass(frozen=True, slots=True)
class GpuTelemetry:
    """What only metrics are made of. What this GPU or driver does not know is left out."""

    energy: float | None = None  # joules since the driver was loaded
    clocks: tuple[tuple[str, float], ...] = ()  # domain ("sm", "memory", …), hertz
    clock_events: tuple[tuple[str, bool], ...] = ()  # what may slow the clocks, whether it does
    ecc_errors: tuple[tuple[str, int], ...] = ()  # "corrected", "uncorrected" since the driver load


# Why nobody will ever say who is on a GPU: what the driver lists cannot be true, or this platform
# does not tell (WSL2, some vGPU).
Unlisted = Literal["implausible", "untold"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, keyed by `uuid`. `index` is NVML's today and may be another one tomorrow."""

    uuid: str
    index: int
    name: str
    pci_bus_id: str | None = None  # "00000000:3B:00.0", lower or upper case as the driver gives it
    memory: GpuMemory | None = None
    processes: tuple[GpuProcess, ...] | None = None  # None: not known
    unlisted: Unlisted | None = None  # why not; None: they cannot be read now
    power_draw: float | None = None  # watts
    power_limit: float | None = None  # watts
    utilization: float | None = None  # ratio
    temperature: float | None = None  # degrees Celsius
    simulated: bool = False
    telemetry: GpuTelemetry | None = None
    trouble: str | None = None  # why nothing is started on it: what speaks against it, in words
    recovery_action: str | None = None  # what the driver says it needs: "none", "reset", …
    mig: bool | None = None  # None: it does not have the mode, or does not tell
    persistence: bool | None = None


@dataclass(frozen=True, slots=True)
class UnopenedGpu:
    """A GPU that the driver counts but does not open. It is reported, and is never fatal."""

    index: int
    error: str
    hint: str | None = None
    uuid: str | None = None  # where it answered before

    @property
    def error_line(self) -> str:
        """Why, and what to do, in one line."""
        return _in_one(self.error, self.hint)


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """What one look at the GPUs gave. `error` set: nothing is known, nothing may be concluded."""

    source: Literal["nvml", "simulated", "none"]
    gpus: tuple[Gpu, ...] = ()
    unopened: tuple[UnopenedGpu, ...] = ()
    error: str | None = None
    hint: str | None = None  # what to do about the error
    driver: str | None = None
    nvml: str | None = None  # version of the management library
    cuda: str | None = None  # the newest that the driver supports: "12.8"

    @property
    def error_line(self) -> str | None:
        """The error, and what to do about it, in one line."""
        return None if self.error is None else _in_one(self.error, self.hint)

    @property
    def indices(self) -> dict[str, int]:
        """UUID to the number that the driver gives the GPU today."""
        return {gpu.uuid: gpu.index for gpu in self.gpus}

    @property
    def unreadable(self) -> str | None:
        """Why nothing can be said of any GPU; None where something can."""
        return (
            "cannot read GPUs: MIC_GPU_SOURCE is none" if self.source == "none" else self.error_line
        )


def _in_one(error: str, hint: str | None) -> str:
    return error if hint is None else f"{error}; {hint}"


# --- Workloads: what an instance runs ---------------------------------------------------------
#
# Command and environment texts may hold `${port}`, `${port:NAME}`, `${gpu_indices}` and
# `${env:NAME}`. They are filled in at launch and are not part of a workload's identity.


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


# --- Desired state ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Instance:
    """One workload that owns a set of GPUs, usually one."""

    id: str
    model: str
    backend: str
    gpus: tuple[str, ...]  # UUIDs, in the file's order
    workload: Workload
    probes: Probes = field(default_factory=Probes)
    placements: tuple[Placement, ...] = ()
    shared: bool = False  # a server of several models: a load that fails concerns that model alone
    inventory: HttpCall | None = None  # whose answer the backend's `surplus` wants to see first
    # models in it that are left as they are: their entry is unsatisfiable
    frozen_models: tuple[str, ...] = ()
    start_timeout: float = 300.0  # seconds; the startup probe's budget
    drain_timeout: float = 0.0  # seconds
    drain: HttpCall | None = None  # asked for until the backend's `is_drained` says so
    rollback: bool = True
    max_unavailable: int = 1
    vram: int | None = None  # bytes, on each of its GPUs
    on_foreign: Literal["block", "wait", "ignore"] = "block"
    foreign_threshold: int = 512 << 20  # bytes; below it, who only draws is not foreign
    origin: str = "file"
    location: str = ""  # "gpus.yaml:41:3"
    metrics_path: str | None = None  # of metrics on port "http"; a port "metrics" needs none


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """An entry of the file that cannot be turned into an instance now.

    `gpus` are the UUIDs that are known to be concerned: whatever of ours runs there is left alone.
    `instances` are the ids that the entry would have had, as far as they are known.
    """

    subject: str  # how the file calls it: "GPU 5", "MAM on GPU 0"
    reason: str
    gpus: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    model: str | None = None
    hint: str | None = None

    @property
    def name(self) -> str:
        """An id that it would have had; where none is known, how the file calls it."""
        return self.instances[0] if self.instances else self.subject


@dataclass(frozen=True, slots=True)
class EndpointsHook:
    """A program that is told which instances serve each model. Times are seconds."""

    command: tuple[str, ...]
    timeout: float = 30.0
    settle: float = 1.0  # from its end until what it took out is stopped


@dataclass(frozen=True, slots=True)
class DesiredState:
    """What should run. Instances are sorted by id and own disjoint sets of GPUs."""

    instances: tuple[Instance, ...] = ()
    kept_empty: tuple[str, ...] = ()  # UUIDs
    unsatisfiable: tuple[Unsatisfiable, ...] = ()
    bindings: tuple[tuple[str, str], ...] = ()  # index key of the file -> UUID
    warnings: tuple[str, ...] = ()
    config_hash: str = ""
    hook: EndpointsHook | None = None
    down: bool = False  # a person asked for everything to be removed
    # What the file as it is now asks for, while it waits for a person's word; None: it does not.
    waiting: DesiredState | None = None


# --- Observed state ---------------------------------------------------------------------------


class RunState(StrEnum):
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    REMOVING = "removing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a workload of ours carries, as labels or as a record.

    `spec` is the normalised specification (see plan/spec.py); None: it could not be read.
    """

    scope: str
    host: str  # a digest of the machine id
    instance: str
    model: str
    backend: str
    gpus: tuple[str, ...]
    ports: Mapping[str, int]  # on the host
    spec: Mapping[str, Any] | None
    spec_hash: str
    schema: int = 1
    origin: str = "file"


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why what a workload is cannot be told for certain, by its PID where that is known."""

    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class ObservedWorkload:
    """One container, unit or process tree that is ours."""

    runtime: str  # "docker", "systemd", "subprocess"
    name: str  # unique in its runtime
    ref: str  # container id, unit name, record name
    identity: Identity
    state: RunState
    pid: int | None = None
    exit_code: int | None = None
    created_at: float | None = None
    started_at: float | None = None
    running_since: float | None = None  # steady; None: its runtime does not tell
    finished_at: float | None = None
    address: str | None = None  # the container's own, on its bridge
    engine_health: Literal["starting", "healthy", "unhealthy"] | None = None
    error: str | None = None  # what the runtime says went wrong
    image_id: str | None = None
    keeper: int | None = None  # a running PID that all of its processes stay descendants of
    doubt: Doubt | None = None  # it and its GPUs are left as they are; without any, those unknown


@dataclass(frozen=True, slots=True)
class ForeignWorkload:
    """A workload that is not ours and stands in the way, or might. Never touched."""

    runtime: str
    name: str
    ref: str
    ports: tuple[int, ...] = ()  # on the host
    running: bool = True
    reason: str = ""  # "it has no labels of ours", "it belongs to scope demo"
    claims: str | None = None  # the instance that it names, as only a copy of ours does
    has_our_name: bool = False  # it has the name, too, that we gave to what it is a copy of
    elsewhere: bool = False  # it belongs to another scope, which concerns nobody in this one


@dataclass(frozen=True, slots=True)
class RuntimeView:
    """What one runtime runs. `error` set: unknown, and the GPUs concerned are frozen.

    `last` is then all of ours that may run: what did when it could be read, and what was begun
    since. Only we start anything of ours. None: it could not be read yet.
    `off` set: it is switched off, and that is why; it runs nothing and can start nothing.
    """

    runtime: str
    workloads: tuple[ObservedWorkload, ...] = ()
    foreign_workloads: tuple[ForeignWorkload, ...] = ()
    error: str | None = None
    hint: str | None = None
    off: str | None = None
    last: tuple[ObservedWorkload, ...] | None = None


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


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP port of this machine that is listened on, at some or all of its addresses."""

    port: int
    pid: int | None = None
    name: str | None = None
    addresses: frozenset[str] = frozenset()  # "127.0.0.1", "::"; none: they are not known
    group: str | None = None  # its control group (version 2): "/system.slice/nginx.service"


@dataclass(frozen=True, slots=True)
class ObservedState:
    """Everything one observation gave, immutable.

    `health` is keyed by the workload's `ref`. `listeners` None: unknown.
    """

    inventory: GpuInventory
    runtimes: tuple[RuntimeView, ...]
    health: Mapping[str, Health] = field(default_factory=dict)
    listeners: tuple[Listener, ...] | None = None
    at: float = 0.0  # since the epoch, as all that is told


# --- Launches: a workload with everything filled in -------------------------------------------


@dataclass(frozen=True, slots=True)
class Launch:
    """What a runtime is asked to create: every `${…}` replaced, every port chosen.

    In `spec`, `env` holds the whole environment (env_file and variables merged in), every Port
    has its `host` and `container` numbers, and `file_env` and `variables` are empty.
    """

    name: str
    runtime: str
    identity: Identity
    spec: Workload
