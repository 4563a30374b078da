"""Metrics for Prometheus, collected from the last snapshot whenever one is asked for.

There are no gauges to be set: a GPU that is gone has no series, and what is not known is left out.
Names and units: https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from mic_supervisor.http import documents
from mic_supervisor.model import OwnerKind
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.status import by_model
from mic_supervisor.views.status import GpuState, gpu_rows

if TYPE_CHECKING:
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.http.documents import Durations, Published
    from mic_supervisor.http.views import Answer, Views
    from mic_supervisor.model import Gpu, GpuInventory

_OPENMETRICS = "application/openmetrics-text"
_OWNERS = {
    OwnerKind.MANAGED: "managed",
    OwnerKind.CONTAINER: "foreign",
    OwnerKind.UNIT: "foreign",
    OwnerKind.ORPHAN: "orphan",
}
_MODEL = ("model", "backend", "mic_instance")


def render(views: Views, accept: str) -> Answer:
    """The exposition, as OpenMetrics for who names it; made once per round.

    What else the header says never becomes part of an answer.
    """
    encode, media = choose_encoder(_OPENMETRICS if _OPENMETRICS in accept else "")

    def make(published: Published) -> tuple[bytes, bytes]:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(SnapshotCollector(published))
        body = encode(registry)
        return body, body

    return views.answer(f"metrics {media}", media, make)


class SnapshotCollector(Collector):
    """Everything that one published view says."""

    def __init__(self, published: Published) -> None:
        self._published = published

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is depends on the snapshot."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Families that have something to say, and no others."""
        return (family for family in self._families() if family.samples)

    def _families(self) -> Iterator[Metric]:
        began = time.perf_counter()
        published, snapshot = self._published, self._published.snapshot
        if snapshot is not None:
            inventory = snapshot.observed.inventory
            if inventory.unreadable is None:
                yield from _gpus(inventory)
                yield from _states(snapshot)
                yield from _xids(published)
            yield from _models(snapshot)
            yield from _sources(snapshot)
            yield from _hook(snapshot)
        yield from _loop(published)
        yield _histogram(
            "mic_gpu_memory_release_seconds",
            "Time from the end of an instance until its GPUs were free for the next one.",
            published.loop.releases,
        )
        yield InfoMetricFamily(
            "mic_build",
            "The version of mic-supervisor that runs.",
            {"version": published.version, "revision": revision()},
        )
        yield _gauge(
            "mic_collect_duration_seconds",
            "Time that it took to make these metrics.",
            time.perf_counter() - began,
        )


# --- GPUs -------------------------------------------------------------------------------------


def _gpus(inventory: GpuInventory) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "mic_gpu_info",
        "A GPU that is there; its index is the driver's of today.",
        labels=("uuid", "index", "name", "pci_bus_id"),
    )
    for gpu in inventory.gpus:
        info.add_metric((gpu.uuid, str(gpu.index), gpu.name, gpu.pci_bus_id or ""), 1)
    yield info
    for name, text, values in (
        ("memory_total_bytes", "Memory of the GPU.", _memory(inventory, "total")),
        ("memory_used_bytes", "Memory in use, without the driver's.", _memory(inventory, "used")),
        ("memory_free_bytes", "Memory that can be allocated.", _memory(inventory, "free")),
        ("memory_reserved_bytes", "Memory that the driver keeps.", _memory(inventory, "reserved")),
        ("utilization_ratio", "Share of the time with a kernel.", _field(inventory, "utilization")),
        ("power_draw_watts", "Power that is drawn.", _field(inventory, "power_draw")),
        ("power_limit_watts", "Power limit that is enforced.", _field(inventory, "power_limit")),
        ("temperature_celsius", "Temperature of the chip.", _field(inventory, "temperature")),
    ):
        family = GaugeMetricFamily(f"mic_gpu_{name}", text, labels=("uuid",))
        for uuid, value in values:
            family.add_metric((uuid,), value)
        yield family
    yield from _telemetry(inventory.gpus)
    yield _holders(inventory.gpus)
    if inventory.driver is not None:
        versions = {"driver": inventory.driver, "nvml": inventory.nvml, "cuda": inventory.cuda}
        yield InfoMetricFamily(
            "mic_driver",
            "Versions of the driver, its management library and the CUDA that it supports.",
            {name: version for name, version in versions.items() if version is not None},
        )


def _memory(inventory: GpuInventory, what: str) -> Iterator[tuple[str, float]]:
    for gpu in inventory.gpus:
        value = getattr(gpu.memory, what, None)
        if value is not None:
            yield gpu.uuid, float(value)


def _field(inventory: GpuInventory, what: str) -> Iterator[tuple[str, float]]:
    for gpu in inventory.gpus:
        value = getattr(gpu, what)
        if value is not None:
            yield gpu.uuid, float(value)


def _telemetry(gpus: Iterable[Gpu]) -> Iterator[Metric]:
    energy = CounterMetricFamily(
        "mic_gpu_energy_joules", "Energy used since the driver was loaded.", labels=("uuid",)
    )
    clocks = GaugeMetricFamily(
        "mic_gpu_clock_hertz", "Clock of a domain.", labels=("uuid", "domain")
    )
    events = GaugeMetricFamily(
        "mic_gpu_clock_event_active",
        "Whether this holds the clocks back.",
        labels=("uuid", "reason"),
    )
    errors = CounterMetricFamily(
        "mic_gpu_ecc_errors", "Memory errors since the driver was loaded.", labels=("uuid", "kind")
    )
    for gpu in gpus:
        telemetry = gpu.telemetry
        if telemetry is None:
            continue
        if telemetry.energy is not None:
            energy.add_metric((gpu.uuid,), telemetry.energy)
        for domain, hertz in telemetry.clocks:
            clocks.add_metric((gpu.uuid, domain), hertz)
        for reason, active in telemetry.clock_events:
            events.add_metric((gpu.uuid, reason), float(active))
        for kind, count in telemetry.ecc_errors:
            errors.add_metric((gpu.uuid, kind), count)
    yield from (energy, clocks, events, errors)


def _holders(gpus: Iterable[Gpu]) -> Metric:
    family = GaugeMetricFamily(
        "mic_gpu_holders",
        "Processes that hold the GPU, by whose they are.",
        labels=("uuid", "owner"),
    )
    for gpu in gpus:
        if gpu.processes is None:
            continue
        count = Counter(
            _OWNERS.get(process.owner.kind, "unknown") if process.owner else "unknown"
            for process in gpu.processes
        )
        for owner in ("managed", "foreign", "orphan"):
            family.add_metric((gpu.uuid, owner), count[owner])
        if count["unknown"]:
            family.add_metric((gpu.uuid, "unknown"), count["unknown"])
    return family


def _states(snapshot: Snapshot) -> Iterator[Metric]:
    """Also of GPUs that the file binds and that are not there: that is what one wants to know."""
    healthy = GaugeMetricFamily(
        "mic_gpu_healthy",
        "Whether it is there, and nothing speaks against it.",
        labels=("uuid",),
    )
    state = GaugeMetricFamily(
        "mic_gpu_state",
        "What the GPU is to the supervisor: 1 for one state.",
        labels=("uuid", "state"),
    )
    for row in gpu_rows(snapshot.desired, snapshot.observed):
        healthy.add_metric((row.uuid,), float(row.state not in ("lost", "unhealthy")))
        for name in get_args(GpuState):
            state.add_metric((row.uuid, name), float(row.state == name))
    unopened = _gauge(
        "mic_gpus_unopened",
        "GPUs that the driver counts and does not open.",
        len(snapshot.observed.inventory.unopened),
    )
    yield from (healthy, state, unopened)


def _xids(published: Published) -> Iterator[Metric]:
    """Counted since the daemon started; of a GPU that nobody could name there is nothing to say."""
    errors = CounterMetricFamily(
        "mic_gpu_xid_errors", "Xid errors that the driver reported.", labels=("uuid", "xid")
    )
    last = GaugeMetricFamily(
        "mic_gpu_xid_last_timestamp_seconds", "When this Xid came last.", labels=("uuid", "xid")
    )
    for record in published.xids:
        if record.uuid is not None:
            errors.add_metric((record.uuid, str(record.xid)), record.count)
            last.add_metric((record.uuid, str(record.xid)), record.last_at)
    yield from (errors, last)


# --- models -----------------------------------------------------------------------------------


def _models(snapshot: Snapshot) -> Iterator[Metric]:
    """One series per instance: `mic_instance` parts the instances of one model.

    It is not called `instance`, which is Prometheus' own name for the target.
    """
    info = GaugeMetricFamily(
        "mic_model_info",
        "An instance, its GPUs and its unit.",
        labels=(*_MODEL, "gpu_uuids", "unit"),
    )
    state = GaugeMetricFamily(
        "mic_model_state", "Where the instance is on its way: 1 for one.", labels=(*_MODEL, "state")
    )
    ready = GaugeMetricFamily(
        "mic_model_ready", "Whether a probe says that it serves.", labels=_MODEL
    )
    desired = GaugeMetricFamily(
        "mic_model_as_desired",
        "Whether it is as the file says, as far as can be known.",
        labels=_MODEL,
    )
    restarts = CounterMetricFamily(
        "mic_model_restarts", "Restarts by the supervisor since the file named it.", labels=_MODEL
    )
    memory = GaugeMetricFamily(
        "mic_model_gpu_memory_bytes", "Memory of the GPU that it uses.", labels=(*_MODEL, "uuid")
    )
    began = GaugeMetricFamily(
        "mic_model_start_time_seconds", "When its process or container started.", labels=_MODEL
    )
    retry = GaugeMetricFamily(
        "mic_model_next_retry_timestamp_seconds", "When its start is tried again.", labels=_MODEL
    )
    used = _memory_by_instance(snapshot)
    for row in (one for whole in snapshot.statuses for one in by_model(whole)):
        key = (row.model, row.backend, row.id)
        unit = row.ref if row.runtime == "systemd" and row.ref is not None else ""
        info.add_metric((*key, ",".join(row.gpus), unit), 1)
        for phase in Phase:
            state.add_metric((*key, phase.value), float(row.phase is phase))
        if row.phase is not Phase.UNPROBED and (
            row.phase is not Phase.PAUSED or row.serving is not None
        ):
            ready.add_metric(key, float(row.phase is Phase.READY or row.serving is True))
        desired.add_metric(key, float(row.settled_well))
        restarts.add_metric(key, row.restarts)
        for uuid in row.gpus:
            if (row.id, uuid) in used:
                memory.add_metric((*key, uuid), used[row.id, uuid])
        at = documents.started_at(snapshot, row)
        if at is not None:
            began.add_metric(key, at)
        if row.next_retry is not None:
            retry.add_metric(key, row.next_retry)
    yield from (info, state, ready, desired, restarts, memory, began, retry)


def _memory_by_instance(snapshot: Snapshot) -> dict[tuple[str, str], int]:
    """(instance, GPU) to bytes; what one process does not tell makes the sum unknown."""
    found: dict[tuple[str, str], int] = {}
    unknown: set[tuple[str, str]] = set()
    for gpu in snapshot.observed.inventory.gpus:
        for process in gpu.processes or ():
            if process.owner is None or process.owner.instance is None:
                continue
            key = process.owner.instance, gpu.uuid
            if process.used_memory is None:
                unknown.add(key)
            else:
                found[key] = found.get(key, 0) + process.used_memory
    return {key: value for key, value in found.items() if key not in unknown}


# --- the loop and the sources -----------------------------------------------------------------


def _loop(published: Published) -> Iterator[Metric]:
    loop, config = published.loop, published.config
    yield _counter("mic_reconcile", "Rounds of the loop.", loop.rounds)
    yield _counter("mic_reconcile_errors", "Changes that failed.", loop.errors)
    if loop.last_duration is not None:
        yield _gauge(
            "mic_reconcile_duration_seconds", "Time that the last round took.", loop.last_duration
        )
    if loop.last_success_at is not None:
        yield _gauge(
            "mic_reconcile_last_success_timestamp_seconds",
            "When the last round ended.",
            loop.last_success_at,
        )
    yield _gauge(
        "mic_config_last_reload_successful",
        "Whether the file as it is now is what runs.",
        float(config.last_reload_ok),
    )
    if config.loaded_at is not None:
        yield _gauge(
            "mic_config_last_reload_success_timestamp_seconds",
            "When the configuration that runs was loaded.",
            config.loaded_at,
        )
    if config.hash:
        family = GaugeMetricFamily(
            "mic_config_hash_info", "The configuration that runs.", labels=("hash",)
        )
        family.add_metric((config.hash,), 1)
        yield family


def _hook(snapshot: Snapshot) -> Iterator[Metric]:
    if snapshot.desired.hook is None:
        return
    state = snapshot.hook
    yield _counter("mic_endpoints_hook_runs", "Runs of on_endpoints_change.", state.runs)
    yield _counter(
        "mic_endpoints_hook_failures", "Runs of on_endpoints_change that failed.", state.failures
    )
    if state.last_success_at is not None:
        yield _gauge(
            "mic_endpoints_hook_last_success_timestamp_seconds",
            "When on_endpoints_change ended well last.",
            state.last_success_at,
        )


def _sources(snapshot: Snapshot) -> Iterator[Metric]:
    inventory = snapshot.observed.inventory
    if inventory.source == "nvml":
        yield _gauge("mic_nvml_up", "Whether NVML can be read.", float(inventory.error is None))
    for view in snapshot.observed.runtimes:
        if view.off is None:
            yield _gauge(
                f"mic_{view.runtime}_up",
                f"Whether {view.runtime} can be read.",
                float(view.error is None),
            )
    yield _gauge(
        "mic_plan_changes", "Changes that are due, those that wait included.", snapshot.plan.count
    )
    yield _gauge(
        "mic_plan_blocked", "Instances for which nothing can be done.", len(snapshot.plan.blocked)
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _histogram(name: str, text: str, seen: Durations) -> Metric:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, seen.bounds), "+Inf"), seen.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=seen.total)


@cache
def revision() -> str:
    """The commit that the installed package was built from, where pip was told one.

    Source: PEP 610, direct_url.json.
    """
    try:
        text = distribution("mic-supervisor").read_text("direct_url.json")
        commit = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (PackageNotFoundError, ValueError, AttributeError):
        return "unknown"
    return str(commit) if commit else "unknown"
