"""The JSON documents that are served, made from what was published. Nothing is asked for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mic_supervisor.http import redact
from mic_supervisor.http.published import status_of
from mic_supervisor.plan import endpoints, render
from mic_supervisor.plan.assess import is_alive, workloads
from mic_supervisor.plan.status import by_model, gpu_rows

if TYPE_CHECKING:
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.http.published import Published
    from mic_supervisor.model import Gpu, GpuInventory, ObservedWorkload
    from mic_supervisor.plan.status import InstanceStatus

MIB = 1 << 20


def served_status(published: Published, snapshot: Snapshot) -> dict[str, Any]:
    """The document of `status --json`, without what is confidential."""
    document = status_of(published)
    assert document is not None  # there is a snapshot
    config = {**document["config"], "error": redact.config_error(published.config.error)}
    scrubbed: dict[str, Any] = redact.Scrubber(snapshot.desired).document(
        {**document, "config": config}
    )
    return scrubbed


def served_plan(published: Published, snapshot: Snapshot) -> dict[str, Any]:
    """The document of `plan --json` for what is still out of sync, without what is confidential."""
    document = render.to_json(
        snapshot.plan, host=published.host, config_hash=snapshot.desired.config_hash
    )
    scrubbed: dict[str, Any] = redact.Scrubber(snapshot.desired).document(
        redact.plan_document(document)
    )
    return scrubbed


def why_no_gpus(inventory: GpuInventory) -> str | None:
    """Why nothing can be said of any GPU, None where something can."""
    if inventory.source == "none":
        return "cannot read GPUs: MIC_GPU_SOURCE is none"
    return inventory.error


def gpus(snapshot: Snapshot) -> list[dict[str, Any]]:
    """One entry per GPU that can be read, by index: percent, watts, MiB, degrees Celsius.

    Null is unknown, never 0. `id`, `memory_usage`, `power_draw` and `processes` are what the
    clients of the former service read.
    """
    states = {row["uuid"]: row for row in gpu_rows(snapshot.desired, snapshot.observed)}
    return [_gpu(gpu, states[gpu.uuid]) for gpu in snapshot.observed.inventory.gpus]


def _gpu(gpu: Gpu, row: Mapping[str, Any]) -> dict[str, Any]:
    memory = gpu.memory
    used = memory.used if memory is not None else None
    total = memory.total if memory is not None else None
    return {
        "id": gpu.index,
        "memory_usage": round(100 * used / total, 2) if used is not None and total else None,
        "power_draw": gpu.power_draw,
        "processes": None
        if gpu.processes is None
        else [
            {
                "pid": process.pid,
                "name": process.name,
                "gpu_memory_usage": _mib(process.used_memory),
                "owner": process.owner.kind.value if process.owner is not None else "unknown",
                "instance": process.owner.instance if process.owner is not None else None,
            }
            for process in gpu.processes
        ],
        "uuid": gpu.uuid,
        "name": gpu.name,
        "memory_used": _mib(used),
        "memory_total": _mib(total),
        "power_limit": gpu.power_limit,
        "utilization": None if gpu.utilization is None else round(100 * gpu.utilization, 2),
        "temperature": gpu.temperature,
        "state": row["state"],
        "instance": row["instance"],
    }


def _mib(count: int | None) -> int | None:
    return None if count is None else count // MIB


def running(snapshot: Snapshot) -> list[dict[str, Any]]:
    """One entry per model that runs and GPU that it runs on, by instance.

    It runs as soon as its process does; `phase` says how far it is.
    """
    alive = _alive(snapshot)
    indices = {gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus}
    return [
        {
            "model_name": row.model,
            "model_type": row.backend,
            "gpu_id": indices.get(uuid),
            "gpu_uuid": uuid,
            "instance": row.id,
            "phase": row.phase.value,
            "endpoint": row.endpoints.get("http"),
        }
        for whole in snapshot.statuses
        if whole.ref in alive
        for row in by_model(whole)
        for uuid in row.gpus
    ]


def _alive(snapshot: Snapshot) -> Mapping[str, ObservedWorkload]:
    return {item.ref: item for item in workloads(snapshot.observed) if is_alive(item)}


def started_at(snapshot: Snapshot, row: InstanceStatus) -> float | None:
    """When the process or container behind this row began."""
    workload = _alive(snapshot).get(row.ref or "")
    return workload.started_at if workload is not None else None


def served_endpoints(published: Published, snapshot: Snapshot) -> dict[str, Any]:
    """Who serves each model now: what the hook on_endpoints_change is told."""
    return endpoints.document(snapshot.endpoints, published.host)


def discovery(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Prometheus HTTP service discovery: a target per instance with metrics of its own.

    The labels begin with mic_: `model` and `instance` are the targets' own and Prometheus'.
    Source: https://prometheus.io/docs/prometheus/latest/http_sd/
    """
    from urllib.parse import urlsplit

    targets = []
    for row in snapshot.statuses:
        url = urlsplit(row.endpoints.get("metrics", ""))
        if not url.netloc:
            continue
        targets.append(
            {
                "targets": [url.netloc],
                "labels": {
                    "__scheme__": url.scheme,
                    "__metrics_path__": url.path,
                    "mic_model": row.model,
                    "mic_backend": row.backend,
                    "mic_instance": row.id,
                    "mic_gpu_uuids": ",".join(row.gpus),
                },
            }
        )
    return targets


def readiness(published: Published, stalled: str | None) -> dict[str, Any]:
    """Whether every instance is as the file says, and which are not."""
    snapshot = published.snapshot
    waiting = [
        {"instance": row.id, "phase": row.phase.value, "reason": row.reason}
        for row in (snapshot.statuses if snapshot is not None else ())
        if not row.settled_well
    ]
    scrubbed: dict[str, Any] = redact.Scrubber(snapshot.desired if snapshot else None).document(
        {
            "status": "not ready" if stalled or waiting else "ready",
            "reason": stalled,
            "waiting": waiting,
        }
    )
    return scrubbed
