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

from mic_supervisor.workloads import Check as Check
from mic_supervisor.workloads import ContainerSpec as ContainerSpec
from mic_supervisor.workloads import EngineCheck as EngineCheck
from mic_supervisor.workloads import ExecCheck as ExecCheck
from mic_supervisor.workloads import Health as Health
from mic_supervisor.workloads import Hook as Hook
from mic_supervisor.workloads import HttpCall as HttpCall
from mic_supervisor.workloads import HttpCheck as HttpCheck
from mic_supervisor.workloads import Limits as Limits
from mic_supervisor.workloads import LoadState as LoadState
from mic_supervisor.workloads import Mount as Mount
from mic_supervisor.workloads import Pairs as Pairs
from mic_supervisor.workloads import Placement as Placement
from mic_supervisor.workloads import PlacementState as PlacementState
from mic_supervisor.workloads import Port as Port
from mic_supervisor.workloads import Preparation as Preparation
from mic_supervisor.workloads import Probe as Probe
from mic_supervisor.workloads import ProbeResult as ProbeResult
from mic_supervisor.workloads import Probes as Probes
from mic_supervisor.workloads import ProcessSpec as ProcessSpec
from mic_supervisor.workloads import Progress as Progress
from mic_supervisor.workloads import TcpCheck as TcpCheck
from mic_supervisor.workloads import WarmUp as WarmUp
from mic_supervisor.workloads import Workload as Workload

# --- GPUs: what one look at this machine's gave, and the processes on them --------------------


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
class Near:
    """The CPUs and the memory (NUMA) nodes that are the nearest to a GPU, by number, sorted."""

    cpus: tuple[int, ...]
    nodes: tuple[int, ...] = ()  # empty: not known


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
    """One GPU, keyed by `uuid`. `index` is NVML's today and may be another one tomorrow.

    A slice of a GPU that has MIG on is a GPU, too: it has memory and processes of its own, and
    `parent`. Its `index` is its GPU's, and names that one only.
    """

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
    near: Near | None = None  # None: the driver does not say
    parent: str | None = None  # the UUID of the GPU that it is a MIG slice of; None: it is none

    @property
    def number(self) -> int | str:
        """What people call it: 3 of GPU 3. The driver counts no slices, so the UUID of one."""
        return self.index if self.parent is None else self.uuid


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
    late: bool = False  # the driver has been asked, and may answer yet

    @property
    def error_line(self) -> str | None:
        """The error, and what to do about it, in one line."""
        return None if self.error is None else _in_one(self.error, self.hint)

    @property
    def indices(self) -> dict[str, int]:
        """UUID to the number that the driver gives the GPU today. It gives none to a slice."""
        return {gpu.uuid: gpu.index for gpu in self.gpus if gpu.parent is None}

    @property
    def numbers(self) -> dict[str, int | str]:
        """UUID to what people call it, slices too."""
        return {gpu.uuid: gpu.number for gpu in self.gpus}

    @property
    def unreadable(self) -> str | None:
        """Why nothing can be said of any GPU; None where something can."""
        return (
            "cannot read GPUs: MIC_GPU_SOURCE is none" if self.source == "none" else self.error_line
        )


def _in_one(error: str, hint: str | None) -> str:
    return error if hint is None else f"{error}; {hint}"


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
    frozen_models: tuple[str, ...] = ()  # left as they are: their entry is unsatisfiable
    start_timeout: float = 300.0  # seconds; the budget from its start until it is ready
    drain_timeout: float = 0.0  # seconds
    drain: HttpCall | None = None  # asked for until the backend's `is_drained` says so
    rollback: bool = True
    max_unavailable: int = 1
    vram: int | None = None  # bytes, on each of its GPUs
    on_foreign: Literal["block", "wait", "ignore"] = "block"
    foreign_threshold: int = 512 << 20  # bytes; below it, who only draws is not foreign
    origin: str = "file"
    location: str = ""  # "gpus.yaml:41:3"
    prepare: Preparation | None = None
    metrics_path: str | None = None  # of metrics on port "http"; a port "metrics" needs none
    warm_up: WarmUp | None = None  # what has to be answered before it is ready, after a start
    openai_model: str | None = None  # its name in OpenAI's API on port "http"; None: no such API


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
class FleetEntry:
    """GPUs that the file hands over together; a claim gets all of them, or none.

    `digits` is what an instance's id has of them. `size` is how many the file names, also where
    some of them are not known. `trouble` says why no claim can get them now.
    """

    gpus: tuple[str, ...]  # UUIDs, in the file's order
    digits: tuple[str, ...]
    size: int
    trouble: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a claim is over, while what it had is taken away.

    `released`: its holder asked for it; `vanished`: its holder was away for the whole grace;
    `failed`: it cannot be served; `drained`: the host is; `refused`: it can never be served here.
    `text` and `hint` are for the holder, as an error has them.
    """

    kind: Literal["released", "vanished", "failed", "drained", "refused"]
    text: str = ""
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """That somebody outside wants an instance of a model, on GPUs that the file hands over.

    Times are steady. Nothing of it is written down: a restart of the supervisor finds again what
    runs, and its holder comes back and says which instance it had.
    """

    token: str  # what its holder calls it, unique
    model: str
    size: int  # how many GPUs it has, or is to have
    asked_at: float  # the earliest has its turn first
    by: str = ""  # the user who holds it, as the kernel knows it
    holder: str = ""  # what its holder calls itself
    gpus: tuple[str, ...] | None = None  # UUIDs, as their entry has them; None: it waits its turn
    instance: str | None = None  # the id of what it has; while it waits, of what it says it had
    got_at: float | None = None
    vanished_at: float | None = None  # None: its holder is there
    first: bool = False  # before all others: the file took back what it had
    found: bool = False  # it ran when the supervisor came, and its holder did not come back yet
    ending: Ending | None = None
    down_since: float | None = None  # since when nothing of it is on its way, nor serves
    gone_since: float | None = None  # since when nothing of it runs any more, while it ends


@dataclass(frozen=True, slots=True)
class DesiredState:
    """What should run. Instances are sorted by id and own disjoint sets of GPUs.

    Of what is handed over, the GPUs that no claim has are among those that are kept empty.
    """

    instances: tuple[Instance, ...] = ()
    kept_empty: tuple[str, ...] = ()  # UUIDs
    unsatisfiable: tuple[Unsatisfiable, ...] = ()
    bindings: tuple[tuple[str, str], ...] = ()  # index key of the file -> UUID
    warnings: tuple[str, ...] = ()
    config_hash: str = ""
    hook: Hook | None = None
    on_transition: Hook | None = None
    profile: str | None = None  # of the file, that is on
    # Of GPUs that only profiles name that are not on: UUID, and a model of theirs, its server or
    # `fleet`.
    aside: tuple[tuple[str, str], ...] = ()
    fleet: tuple[FleetEntry, ...] = ()
    claimable: frozenset[str] = frozenset()  # the models of the file that a claim can be of
    claims: tuple[Claim, ...] = ()
    claim_grace: float | None = None  # seconds; None: what claims have stays as it is, since only a
    # daemon knows who holds them
    down: bool = False  # a person asked for everything to be removed
    waiting: DesiredState | None = None  # what a file asks for that waits for a person's word


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
    `late` set: it has been asked, and may answer yet.
    `off` set: it is switched off, and that is why; it runs nothing and can start nothing.
    `ignores_gpus` set: it takes requests for GPUs and ignores them; "Podman 4.3.1".
    """

    runtime: str
    workloads: tuple[ObservedWorkload, ...] = ()
    foreign_workloads: tuple[ForeignWorkload, ...] = ()
    error: str | None = None
    hint: str | None = None
    off: str | None = None
    ignores_gpus: str | None = None
    last: tuple[ObservedWorkload, ...] | None = None
    late: bool = False


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

    @property
    def late(self) -> bool:
        """Whether a part of it may be known soon, which is not now."""
        return self.inventory.late or any(view.late for view in self.runtimes)


# --- Launches: a workload with everything filled in -------------------------------------------


@dataclass(frozen=True, slots=True)
class Launch:
    """What a runtime is asked to create: every `${…}` replaced, every port chosen.

    In `spec`, `env` holds the whole environment (env_file and variables merged in), every Port
    has its `host` and `container` numbers, and `file_env` and `variables` are empty. `near` is what
    it is confined to; None: to nothing.
    """

    name: str
    runtime: str
    identity: Identity
    spec: Workload
    near: Near | None = None
