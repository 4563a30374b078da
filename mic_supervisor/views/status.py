"""The document of `status --json`, and the rows of it that other documents have as well."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from mic_supervisor.desired.claims import turn
from mic_supervisor.model import Claim, DesiredState, Gpu, ObservedState, Owner, OwnerKind
from mic_supervisor.plan.assess import is_alive, workloads
from mic_supervisor.plan.claims import ClaimState as ClaimState
from mic_supervisor.plan.claims import standing
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.look import Look
from mic_supervisor.plan.memory import Paused
from mic_supervisor.plan.status import InstanceStatus, Sync
from mic_supervisor.plan.words import gpus_down
from mic_supervisor.text import printable
from mic_supervisor.views import view
from mic_supervisor.views.plan import PlanDocument, plan_document

GpuState = Literal[
    "managed", "idle", "kept_empty", "fleet", "unmanaged", "foreign", "unhealthy", "lost", "unknown"
]
Code = Annotated[
    str | None,
    Field(description="the code of the reason; null: a probe or a program says it"),
]
_NOT_THERE = 1 << 16  # sorts behind every index


@dataclass(frozen=True, slots=True)
class GpuRef:
    """`index` is null for a GPU that is not there, and for a MIG slice."""

    uuid: str
    index: int | None


@dataclass(frozen=True, slots=True)
class ConfigInUse:
    """`hash` is "" while there is no configuration."""

    path: str
    hash: str
    generation: Annotated[
        int | None,
        Field(description="counts accepted configurations; null: this one was not accepted"),
    ]
    loaded_at: float | None
    last_reload_ok: bool
    error: str | None
    unconfirmed: Annotated[
        str | None,
        Field(description="why the file as it is now waits for a person; null: it does not"),
    ] = None
    profile: Annotated[str | None, Field(description="the profile that is on; null: none")] = None


@dataclass(frozen=True, slots=True)
class StatusModel:
    """One model in a server of several."""

    model: str
    gpus: list[GpuRef]
    phase: Phase
    reason: str | None
    code: Code
    next_retry: float | None


@dataclass(frozen=True, slots=True)
class StatusInstance:
    id: str
    origin: str
    model: str
    backend: str
    gpus: list[GpuRef]
    phase: Phase
    sync: Sync
    health: str
    reason: str | None
    code: Code
    since: float | None
    restarts: int
    next_retry: float | None
    endpoints: dict[str, str]
    container_id: str | None
    unit: str | None
    pid: int | None
    spec_hash: str | None
    serving: Annotated[bool | None, Field(description="what its probes say; null: nothing")]
    models: Annotated[
        list[StatusModel], Field(description="of a server of several models; else empty")
    ]
    as_desired: bool
    openai_model: Annotated[
        str | None, Field(description="its name in OpenAI's API; null: it has no such API")
    ] = None


@dataclass(frozen=True, slots=True)
class Holder:
    """A process on a GPU, and whose it is."""

    pid: int
    name: str | None
    used_memory: Annotated[int | None, Field(description="bytes")]
    since: Annotated[
        float | None, Field(description="when it was started, seconds since the epoch")
    ]
    owner: OwnerKind
    ref: Annotated[str | None, Field(description="the container's id, or the unit's name")]
    instance: str | None


@dataclass(frozen=True, slots=True)
class StatusGpu:
    uuid: str
    index: int | None
    pci_bus_id: str | None
    name: str | None
    instance: str | None
    state: GpuState
    trouble: Annotated[str | None, Field(description="what is wrong with it; null: nothing")]
    holders: Annotated[list[Holder] | None, Field(description="null: they cannot be read")]
    parent: Annotated[
        str | None, Field(description="the UUID of the GPU that it is a MIG slice of; null: none")
    ] = None


@dataclass(frozen=True, slots=True)
class PauseEntry:
    """Of a model, or of a GPU; the other one is null."""

    model: str | None
    gpu: GpuRef | None
    since: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class DrainEntry:
    """Since when the host is out of service."""

    since: float
    reason: str | None
    until_reboot: bool


@dataclass(frozen=True, slots=True)
class ClaimEntry:
    """A claim of GPUs that the file hands over."""

    model: str
    size: Annotated[int, Field(description="of how many GPUs it is")]
    gpus: Annotated[list[GpuRef], Field(description="empty while it waits its turn")]
    instance: str | None
    state: ClaimState
    reason: Annotated[str | None, Field(description="why it is not ready; null: it is")]
    by: Annotated[str, Field(description="the user who holds it; empty: it is not known yet")]
    holder: Annotated[str, Field(description="what the holder calls itself")]
    since: Annotated[
        float, Field(description="since when it waits, has its GPUs, or has no holder any more")
    ]
    until: Annotated[
        float | None, Field(description="when it ends unless a holder comes; null: it has one")
    ]


@dataclass(frozen=True, slots=True)
class StatusDocument:
    version: Literal[1]
    host: str
    at: Annotated[
        float, Field(description="when the machine was observed, seconds since the epoch")
    ]
    config: ConfigInUse
    instances: list[StatusInstance]
    gpus: list[StatusGpu]
    paused: list[PauseEntry]
    unreadable: list[str]
    warnings: list[str]
    waiting: Annotated[
        PlanDocument | None,
        Field(description="what a file that waits for a person would change; null: none waits"),
    ] = None
    daemon: Annotated[
        bool, Field(description="whether a daemon runs; without one nothing restarts what dies")
    ] = True
    drained: Annotated[DrainEntry | None, Field(description="null: the host is in service")] = None
    claims: list[ClaimEntry] = field(default_factory=list)


def unreadable(observed: ObservedState, gpus: Collection[str] | None = None) -> list[str]:
    """Which runtimes cannot be read, and why; with `gpus` those that may run something there."""
    return [
        f"{view.runtime} cannot be read: {view.error}"
        for view in observed.runtimes
        if view.error is not None
        and (
            gpus is None
            or view.last is None
            or any(not {*gpus}.isdisjoint(one.identity.gpus) for one in view.last)
        )
    ]


def status_document(
    look: Look, config: ConfigInUse, host: str, *, daemon: bool = True
) -> StatusDocument:
    """What `status --json` prints and `/api/v1/status` answers. `look` is as it is told."""
    observed = look.observed
    down = unreadable(observed)
    if observed.inventory.error_line is not None:
        down.append(gpus_down(observed.inventory.error_line))
    waiting, order = look.waiting(), look.memory.drained
    return StatusDocument(
        version=1,
        host=host,
        at=observed.at,
        config=config,
        instances=instances(look.statuses, look.indices),
        gpus=gpu_rows(look.desired, observed),
        paused=pauses(look.memory.paused, look.indices),
        unreadable=down,
        warnings=[*look.plan.warnings],
        waiting=None
        if waiting is None
        else plan_document(
            waiting.plan,
            host=host,
            config_hash=waiting.desired.config_hash,
            profile=waiting.desired.profile,
        ),
        daemon=daemon,
        drained=None
        if order is None
        else DrainEntry(order.since, order.reason, order.boot is not None),
        claims=claims(look),
    )


def claims(look: Look) -> list[ClaimEntry]:
    """Those that have GPUs first, as the driver counts them, then by their turns."""
    found, grace = look.desired.claims, look.desired.claim_grace
    rows = {row.id: row for row in look.statuses}

    def entry(claim: Claim) -> ClaimEntry:
        now = standing(found, claim, rows, look.desired)
        since = claim.asked_at if claim.got_at is None else claim.got_at
        away = claim.vanished_at
        until = None if away is None or grace is None else away + grace + look.offset
        return ClaimEntry(
            model=claim.model,
            size=claim.size,
            gpus=_refs(claim.gpus or (), look.indices),
            instance=claim.instance,
            state=now.state,
            reason=now.reason,
            by=claim.by,
            holder=claim.holder,
            since=(since if away is None else away) + look.offset,
            until=until,
        )

    def order(claim: Claim) -> tuple[int, tuple[int, int]]:
        numbers = [look.indices.get(uuid, _NOT_THERE) for uuid in claim.gpus or ()]
        waits = claim.gpus is None and claim.ending is None
        return min(numbers, default=_NOT_THERE + 1), turn(found, claim) if waits else (0, 0)

    return [entry(claim) for claim in sorted(found, key=order)]


def instances(rows: Iterable[InstanceStatus], indices: Mapping[str, int]) -> list[StatusInstance]:
    """In the order in which the driver counts the GPUs; what has none that is there comes last."""

    def order(row: InstanceStatus) -> tuple[int, str]:
        numbers = [indices.get(uuid, _NOT_THERE) for uuid in row.gpus]
        return min(numbers, default=_NOT_THERE + 1), row.id

    return [_instance(row, indices) for row in sorted(rows, key=order)]


def _instance(row: InstanceStatus, indices: Mapping[str, int]) -> StatusInstance:
    return view(
        StatusInstance,
        row,
        gpus=_refs(row.gpus, indices),
        endpoints={**row.endpoints},
        container_id=row.ref if row.runtime == "docker" else None,
        unit=row.ref if row.runtime == "systemd" else None,
        models=[view(StatusModel, one, gpus=_refs(one.gpus, indices)) for one in row.models],
        as_desired=row.as_desired,
    )


def _refs(uuids: Iterable[str], indices: Mapping[str, int]) -> list[GpuRef]:
    return [GpuRef(uuid, indices.get(uuid)) for uuid in uuids]


def pauses(paused: Paused, indices: Mapping[str, int]) -> list[PauseEntry]:
    """Models first, then GPUs as the driver counts them."""
    models = [
        PauseEntry(name, None, pause.since, pause.reason)
        for name, pause in sorted(paused.models.items())
    ]
    gpus = sorted(paused.gpus.items(), key=lambda item: (indices.get(item[0], _NOT_THERE), item[0]))
    return models + [
        PauseEntry(None, GpuRef(uuid, indices.get(uuid)), pause.since, pause.reason)
        for uuid, pause in gpus
    ]


def gpu_rows(desired: DesiredState, observed: ObservedState) -> list[StatusGpu]:
    """In the driver's order; bound GPUs that are not there come last."""
    wanted = {uuid: item.id for item in desired.instances for uuid in item.gpus}
    running = {
        uuid: workload.identity.instance
        for workload in workloads(observed)
        if is_alive(workload)
        for uuid in workload.identity.gpus
    }
    rows = [
        view(
            StatusGpu,
            gpu,
            index=observed.inventory.indices.get(gpu.uuid),
            instance=running.get(gpu.uuid) or wanted.get(gpu.uuid),
            state=_gpu_state(gpu, desired, wanted, running),
            holders=_holders(gpu),
        )
        for gpu in observed.inventory.gpus
    ]
    present = {gpu.uuid for gpu in observed.inventory.gpus}
    unopened = {gpu.uuid: gpu.error_line for gpu in observed.inventory.unopened}
    missing = {u for item in desired.unsatisfiable for u in item.gpus}
    if observed.inventory.error is not None:
        missing |= {*wanted, *desired.kept_empty}
    return rows + [
        StatusGpu(
            uuid=uuid,
            index=None,
            pci_bus_id=None,
            name=None,
            instance=running.get(uuid) or wanted.get(uuid),
            state="unknown" if observed.inventory.error is not None else "lost",
            trouble=unopened.get(uuid),
            holders=None,
        )
        for uuid in sorted(missing - present)
    ]


def _holders(gpu: Gpu) -> list[Holder] | None:
    if gpu.processes is None:
        return None
    return [
        view(
            Holder,
            process,
            name=None if process.name is None else printable(process.name),
            since=process.started_at,
            owner=owner.kind,
            ref=owner.ref,
            instance=owner.instance,
        )
        for process in gpu.processes
        for owner in [process.owner or Owner(OwnerKind.UNKNOWN)]
    ]


def _gpu_state(
    gpu: Gpu, desired: DesiredState, wanted: Mapping[str, str], running: Mapping[str, str]
) -> GpuState:
    if gpu.trouble is not None:
        return "unhealthy"
    if gpu.uuid in wanted or gpu.uuid in running:
        return "managed"
    if gpu.processes is None:
        return "unknown"
    foreign = not all(process.managed for process in gpu.processes)
    if gpu.uuid in desired.kept_empty:
        offered = any(gpu.uuid in entry.gpus for entry in desired.fleet)
        return "foreign" if foreign else "fleet" if offered else "kept_empty"
    if any(gpu.uuid in item.gpus for item in desired.unsatisfiable):
        return "managed"
    return "unmanaged" if foreign else "idle"
