"""What the daemon publishes after every round, and the JSON documents that HTTP makes of it.

Nothing is asked for them, and nothing else is looked at. Those that HTTP alone has are defined
here, as in `mic_supervisor.views`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from mic_supervisor.converge.events import Event
from mic_supervisor.converge.snapshot import ConfigState, Snapshot
from mic_supervisor.gpu.events import XidRecord
from mic_supervisor.http import access
from mic_supervisor.model import Gpu, OwnerKind
from mic_supervisor.plan.assess import is_alive, workloads
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.selection import drained
from mic_supervisor.plan.status import by_model
from mic_supervisor.views.plan import plan_document
from mic_supervisor.views.status import GpuState, StatusGpu, gpu_rows, status_document

MIB = 1 << 20

RELEASE_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Durations:
    """How often something took how long, in seconds.

    `counts[i]` are those of at most `bounds[i]` that no smaller bound holds; the last count is of
    those above every bound.
    """

    bounds: tuple[float, ...] = RELEASE_BOUNDS
    counts: tuple[int, ...] = (0,) * (len(RELEASE_BOUNDS) + 1)
    total: float = 0.0

    def with_one(self, seconds: float) -> Durations:
        bucket = bisect_left(self.bounds, seconds)
        counts = (*self.counts[:bucket], self.counts[bucket] + 1, *self.counts[bucket + 1 :])
        return replace(self, counts=counts, total=self.total + seconds)


@dataclass(frozen=True, slots=True)
class LoopState:
    """How the loop itself is. Durations in seconds, times since the epoch.

    `errors` counts changes that failed. `releases` are the waits for the memory of a GPU after its
    holder was stopped.
    """

    rounds: int = 0
    errors: int = 0
    last_duration: float | None = None
    last_success_at: float | None = None
    releases: Durations = Durations()


@dataclass(frozen=True, slots=True)
class Published:
    """One consistent view. `snapshot` is None until the first round is done.

    `history` is the newest first. `xids` counts since the daemon started. `down` names the parts of
    the daemon that are not alive, and says why. `scrubber` knows what is confidential in this view.
    All times are the wall clock's as it is set now; less `offset` they are steady.
    """

    host: str
    version: str
    config: ConfigState
    loop: LoopState
    snapshot: Snapshot | None = None
    offset: float = 0.0
    history: tuple[Event, ...] = ()
    xids: tuple[XidRecord, ...] = ()
    down: Mapping[str, str] = field(default_factory=dict)
    scrubber: access.Scrubber = field(default_factory=access.Scrubber)


# --- the documents ------------------------------------------------------------------------------

Mib = Annotated[int | None, Field(description="MiB")]
Watts = Annotated[float | None, Field(description="watts")]
Percent = Annotated[float | None, Field(description="percent")]


@dataclass(frozen=True, slots=True)
class Problem:
    detail: str


@dataclass(frozen=True, slots=True)
class Refusal:
    detail: str
    command: Annotated[str, Field(description="the command line that does it")]


@dataclass(frozen=True, slots=True)
class Root:
    status: Literal["ok"]
    message: str


@dataclass(frozen=True, slots=True)
class GpuProcess:
    pid: int
    name: str | None
    gpu_memory_usage: Mib
    owner: OwnerKind
    instance: str | None


@dataclass(frozen=True, slots=True)
class GpuUse:
    """Null is unknown, never 0.

    The clients of the former service read `id`, `memory_usage`, `power_draw` and `processes`.
    """

    id: Annotated[int, Field(description="the driver's index of today; of a slice, its GPU's")]
    memory_usage: Percent
    power_draw: Watts
    processes: Annotated[list[GpuProcess] | None, Field(description="null: they cannot be read")]
    uuid: str
    name: str
    memory_used: Mib
    memory_total: Mib
    power_limit: Watts
    utilization: Percent
    temperature: Annotated[float | None, Field(description="degrees Celsius")]
    state: GpuState
    instance: str | None
    parent: Annotated[
        str | None, Field(description="the UUID of the GPU that it is a MIG slice of; null: none")
    ] = None


@dataclass(frozen=True, slots=True)
class RunningModel:
    model_name: str
    model_type: Annotated[str, Field(description="the backend")]
    gpu_id: Annotated[int | None, Field(description="null: the GPU is not there now")]
    gpu_uuid: str
    instance: str
    phase: Phase
    endpoint: str | None


@dataclass(frozen=True, slots=True)
class Target:
    targets: list[str]
    labels: dict[str, str]


LivenessStatus = Literal["ok", "starting", "stalled", "broken"]


@dataclass(frozen=True, slots=True)
class Liveness:
    status: LivenessStatus
    detail: str | None
    age: Annotated[float, Field(description="seconds since the last round")]


@dataclass(frozen=True, slots=True)
class Waiting:
    instance: str
    phase: Phase
    reason: str | None


@dataclass(frozen=True, slots=True)
class Readiness:
    status: Literal["ready", "not ready"]
    reason: str | None
    waiting: list[Waiting]


def served_status(published: Published, snapshot: Snapshot) -> dict[str, Any]:
    """The document of `status --json`, without what is confidential."""
    document = asdict(status_document(snapshot, published.config.in_use, published.host))
    if document["waiting"] is not None:
        document["waiting"] = access.plan_document(document["waiting"])
    return _scrubbed(published, document)


def served_plan(published: Published, snapshot: Snapshot) -> dict[str, Any]:
    """The document of `plan --json` for what is still out of sync, without what is confidential."""
    asked = snapshot.desired
    document = plan_document(
        snapshot.plan, host=published.host, config_hash=asked.config_hash, profile=asked.profile
    )
    return _scrubbed(published, access.plan_document(asdict(document)))


def _scrubbed(published: Published, document: dict[str, Any]) -> dict[str, Any]:
    scrubbed: dict[str, Any] = published.scrubber.document(document)
    return scrubbed


def gpus(snapshot: Snapshot) -> list[GpuUse]:
    """One entry per GPU that can be read, by index."""
    rows = {row.uuid: row for row in gpu_rows(snapshot.desired, snapshot.observed)}
    return [_gpu(gpu, rows[gpu.uuid]) for gpu in snapshot.observed.inventory.gpus]


def _gpu(gpu: Gpu, row: StatusGpu) -> GpuUse:
    memory = gpu.memory
    used = memory.used if memory is not None else None
    total = memory.total if memory is not None else None
    processes = None
    if row.holders is not None:
        processes = [
            GpuProcess(one.pid, one.name, _mib(one.used_memory), one.owner, one.instance)
            for one in row.holders
        ]
    return GpuUse(
        id=gpu.index,
        memory_usage=round(100 * used / total, 2) if used is not None and total else None,
        power_draw=gpu.power_draw,
        processes=processes,
        uuid=gpu.uuid,
        name=gpu.name,
        memory_used=_mib(used),
        memory_total=_mib(total),
        power_limit=gpu.power_limit,
        utilization=None if gpu.utilization is None else round(100 * gpu.utilization, 2),
        temperature=gpu.temperature,
        state=row.state,
        instance=row.instance,
        parent=gpu.parent,
    )


def _mib(count: int | None) -> int | None:
    return None if count is None else count // MIB


def running(snapshot: Snapshot) -> list[RunningModel]:
    """One entry per model that runs and GPU that it runs on, by instance.

    It runs as soon as its process does; `phase` says how far it is.
    """
    alive = started(snapshot)
    indices = snapshot.indices
    return [
        RunningModel(
            model_name=row.model,
            model_type=row.backend,
            gpu_id=indices.get(uuid),
            gpu_uuid=uuid,
            instance=row.id,
            phase=row.phase,
            endpoint=row.endpoints.get("http"),
        )
        for whole in snapshot.statuses
        if whole.ref in alive
        for row in by_model(whole)
        for uuid in row.gpus
    ]


def started(snapshot: Snapshot) -> dict[str, float | None]:
    """What runs, by its reference, and when its process or container began."""
    return {item.ref: item.started_at for item in workloads(snapshot.observed) if is_alive(item)}


def discovery(snapshot: Snapshot) -> list[Target]:
    """Prometheus HTTP service discovery: a target per instance with metrics of its own.

    The labels begin with mic_: `model` and `instance` are the targets' own and Prometheus'.
    Source: https://prometheus.io/docs/prometheus/latest/http_sd/
    """
    urls = [(row, urlsplit(row.endpoints.get("metrics", ""))) for row in snapshot.statuses]
    return [
        Target(
            targets=[url.netloc],
            labels={
                "__scheme__": url.scheme,
                "__metrics_path__": url.path,
                "mic_model": row.model,
                "mic_backend": row.backend,
                "mic_instance": row.id,
                "mic_gpu_uuids": ",".join(row.gpus),
            },
        )
        for row, url in urls
        if url.netloc
    ]


def readiness(published: Published, stalled: str | None) -> dict[str, Any]:
    """Whether every instance is as the file says, and which are not."""
    snapshot = published.snapshot
    waiting = [
        Waiting(row.id, row.phase, row.reason)
        for row in (snapshot.statuses if snapshot is not None else ())
        if not row.as_desired
    ]
    order = snapshot.memory.drained if snapshot is not None else None
    reason = stalled if snapshot is None or order is None else str(drained(order, snapshot.at))
    document = Readiness("not ready" if reason or waiting else "ready", reason, waiting)
    return _scrubbed(published, asdict(document))
