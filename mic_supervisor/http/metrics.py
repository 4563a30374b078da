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
from typing import Any, get_args

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

from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.http import documents
from mic_supervisor.http.documents import Durations, Published
from mic_supervisor.http.views import Answer, Views
from mic_supervisor.model import Gpu, GpuInventory, GpuProcess, OwnerKind
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.status import InstanceStatus, by_model
from mic_supervisor.views.status import ClaimState, GpuState, claims, gpu_rows

_OPENMETRICS = "application/openmetrics-text"
_OWNERS = {
    OwnerKind.MANAGED: "managed",
    OwnerKind.CONTAINER: "foreign",
    OwnerKind.UNIT: "foreign",
    OwnerKind.ORPHAN: "orphan",
}
_MODEL = "model backend mic_instance"
Row = tuple[tuple[str, ...], float | None]
"""The values of the labels, and the value of the series; None is not known."""


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
            yield _claims(snapshot)
            text = "Whether a person took the host out of service."
            drained = snapshot.memory.drained is not None
            yield GaugeMetricFamily("mic_drained", text, drained)
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
        yield GaugeMetricFamily(
            "mic_collect_duration_seconds",
            "Time that it took to make these metrics.",
            time.perf_counter() - began,
        )


# --- GPUs -------------------------------------------------------------------------------------


def _gpus(inventory: GpuInventory) -> Iterator[Metric]:
    gpus = inventory.gpus
    # To Prometheus an empty label is none: `parent` changes the series of slices alone.
    names = [
        ((gpu.uuid, str(gpu.index), gpu.name, gpu.pci_bus_id or "", gpu.parent or ""), 1)
        for gpu in gpus
    ]
    text = "A GPU or slice that is there; its index is the driver's of today, or its parent's."
    yield _gauges("mic_gpu_info", text, "uuid index name pci_bus_id parent", names)
    for name, text, path in (
        ("memory_total_bytes", "Memory of the GPU.", "memory.total"),
        ("memory_used_bytes", "Memory in use, without the driver's.", "memory.used"),
        ("memory_free_bytes", "Memory that can be allocated.", "memory.free"),
        ("memory_reserved_bytes", "Memory that the driver keeps.", "memory.reserved"),
        ("utilization_ratio", "Share of the time with a kernel.", "utilization"),
        ("power_draw_watts", "Power that is drawn.", "power_draw"),
        ("power_limit_watts", "Power limit that is enforced.", "power_limit"),
        ("temperature_celsius", "Temperature of the chip.", "temperature"),
    ):
        rows = [((gpu.uuid,), _measured(gpu, path)) for gpu in gpus]
        yield _gauges(f"mic_gpu_{name}", text, "uuid", rows)
    yield from _telemetry(gpus)
    yield _holders(gpus)
    if inventory.driver is not None:
        versions = {"driver": inventory.driver, "nvml": inventory.nvml, "cuda": inventory.cuda}
        yield InfoMetricFamily(
            "mic_driver",
            "Versions of the driver, its management library and the CUDA that it supports.",
            {name: version for name, version in versions.items() if version is not None},
        )


def _measured(found: Any, path: str) -> float | None:
    """An attribute of a GPU, or, as in "memory.used", of what it may have."""
    for name in path.split("."):
        found = getattr(found, name, None)
    return None if found is None else float(found)


def _telemetry(gpus: Iterable[Gpu]) -> Iterator[Metric]:
    reported = [(gpu.uuid, gpu.telemetry) for gpu in gpus if gpu.telemetry is not None]
    energy = [((uuid,), one.energy) for uuid, one in reported]
    text = "Energy used since the driver was loaded."
    yield _counters("mic_gpu_energy_joules", text, "uuid", energy)
    clocks = [((uuid, domain), hertz) for uuid, one in reported for domain, hertz in one.clocks]
    yield _gauges("mic_gpu_clock_hertz", "Clock of a domain.", "uuid domain", clocks)
    held = [
        ((uuid, reason), active) for uuid, one in reported for reason, active in one.clock_events
    ]
    text = "Whether this holds the clocks back."
    yield _gauges("mic_gpu_clock_event_active", text, "uuid reason", held)
    errors = [((uuid, kind), count) for uuid, one in reported for kind, count in one.ecc_errors]
    text = "Memory errors since the driver was loaded."
    yield _counters("mic_gpu_ecc_errors", text, "uuid kind", errors)


def _holders(gpus: Iterable[Gpu]) -> Metric:
    rows: list[Row] = []
    for gpu in gpus:
        if gpu.processes is None:
            continue
        count = Counter(map(_owner, gpu.processes))
        rows += [((gpu.uuid, owner), count[owner]) for owner in ("managed", "foreign", "orphan")]
        rows.append(((gpu.uuid, "unknown"), count["unknown"] or None))
    text = "Processes that hold the GPU, by whose they are."
    return _gauges("mic_gpu_holders", text, "uuid owner", rows)


def _owner(process: GpuProcess) -> str:
    if process.instance is not None:
        return "managed"
    return "unknown" if process.owner is None else _OWNERS.get(process.owner.kind, "unknown")


def _claims(snapshot: Snapshot) -> Metric:
    """Nothing where the file hands nothing over, and nothing is claimed."""
    found = [claim.state for claim in claims(snapshot)]
    states = get_args(ClaimState) if snapshot.desired.fleet or found else ()
    counts = [((state,), found.count(state)) for state in states]
    return _gauges("mic_claims", "Claims of GPUs that are handed over.", "state", counts)


def _states(snapshot: Snapshot) -> Iterator[Metric]:
    """Also of GPUs that the file binds and that are not there: that is what one wants to know."""
    rows = gpu_rows(snapshot.desired, snapshot.observed)
    healthy = [((row.uuid,), row.state not in ("lost", "unhealthy")) for row in rows]
    text = "Whether it is there, and nothing speaks against it."
    yield _gauges("mic_gpu_healthy", text, "uuid", healthy)
    states = [((row.uuid, one), row.state == one) for row in rows for one in get_args(GpuState)]
    text = "What the GPU is to the supervisor: 1 for one state."
    yield _gauges("mic_gpu_state", text, "uuid state", states)
    unopened = len(snapshot.observed.inventory.unopened)
    text = "GPUs that the driver counts and does not open."
    yield GaugeMetricFamily("mic_gpus_unopened", text, unopened)


def _xids(published: Published) -> Iterator[Metric]:
    """Counted since the daemon started; of a GPU that nobody could name there is nothing to say."""
    named = [((one.uuid, str(one.xid)), one) for one in published.xids if one.uuid is not None]
    counts = [(key, record.count) for key, record in named]
    text = "Xid errors that the driver reported."
    yield _counters("mic_gpu_xid_errors", text, "uuid xid", counts)
    last = [(key, record.last_at) for key, record in named]
    text = "When this Xid came last."
    yield _gauges("mic_gpu_xid_last_timestamp_seconds", text, "uuid xid", last)


# --- models -----------------------------------------------------------------------------------


def _models(snapshot: Snapshot) -> Iterator[Metric]:
    """One series per instance: `mic_instance` parts the instances of one model.

    It is not called `instance`, which is Prometheus' own name for the target.
    """
    rows = [
        ((row.model, row.backend, row.id), row)
        for whole in snapshot.statuses
        for row in by_model(whole)
    ]
    names = [((*key, ",".join(row.gpus), _unit(row)), 1) for key, row in rows]
    text = "An instance, its GPUs and its unit."
    yield _gauges("mic_model_info", text, f"{_MODEL} gpu_uuids unit", names)
    states = [((*key, phase.value), row.phase is phase) for key, row in rows for phase in Phase]
    text = "Where the instance is on its way: 1 for one."
    yield _gauges("mic_model_state", text, f"{_MODEL} state", states)
    ready = [(key, _is_ready(row)) for key, row in rows]
    yield _gauges("mic_model_ready", "Whether a probe says that it serves.", _MODEL, ready)
    desired = [(key, row.as_desired) for key, row in rows]
    text = "Whether it is as the file says, as far as can be known."
    yield _gauges("mic_model_as_desired", text, _MODEL, desired)
    restarts = [(key, row.restarts) for key, row in rows]
    text = "Restarts by the supervisor since the file named it."
    yield _counters("mic_model_restarts", text, _MODEL, restarts)
    used = _memory_by_instance(snapshot)
    memory = [((*key, uuid), used.get((row.id, uuid))) for key, row in rows for uuid in row.gpus]
    text = "Memory of the GPU that it uses."
    yield _gauges("mic_model_gpu_memory_bytes", text, f"{_MODEL} uuid", memory)
    started = documents.started(snapshot)
    began = [(key, started.get(row.ref or "")) for key, row in rows]
    text = "When its process or container started."
    yield _gauges("mic_model_start_time_seconds", text, _MODEL, began)
    retry = [(key, row.next_retry) for key, row in rows]
    text = "When its start is tried again."
    yield _gauges("mic_model_next_retry_timestamp_seconds", text, _MODEL, retry)


def _unit(row: InstanceStatus) -> str:
    return row.ref if row.runtime == "systemd" and row.ref is not None else ""


def _is_ready(row: InstanceStatus) -> bool | None:
    """None where no probe says anything."""
    if row.phase is Phase.UNPROBED or (row.phase is Phase.PAUSED and row.serving is None):
        return None
    return row.phase is Phase.READY or row.serving is True


def _memory_by_instance(snapshot: Snapshot) -> dict[tuple[str, str], int]:
    """(instance, GPU) to bytes; what one process does not tell makes the sum unknown."""
    found: dict[tuple[str, str], int] = {}
    unknown: set[tuple[str, str]] = set()
    for gpu in snapshot.observed.inventory.gpus:
        for process in gpu.processes or ():
            if process.instance is None:
                continue
            key = process.instance, gpu.uuid
            if process.used_memory is None:
                unknown.add(key)
            else:
                found[key] = found.get(key, 0) + process.used_memory
    return {key: value for key, value in found.items() if key not in unknown}


# --- the loop and the sources -----------------------------------------------------------------


def _loop(published: Published) -> Iterator[Metric]:
    loop, config = published.loop, published.config
    yield CounterMetricFamily("mic_reconcile", "Rounds of the loop.", loop.rounds)
    yield CounterMetricFamily("mic_reconcile_errors", "Changes that failed.", loop.errors)
    known: list[Row] = [((config.hash,), 1)] if config.hash else []
    waiting = None if published.snapshot is None else published.snapshot.waiting()
    yield _gauges("mic_config_hash_info", "The configuration that runs.", "hash", known)
    for name, text, value in (
        ("reconcile_duration_seconds", "Time that the last round took.", loop.last_duration),
        (
            "reconcile_last_success_timestamp_seconds",
            "When the last round ended.",
            loop.last_success_at,
        ),
        (
            "config_last_reload_successful",
            "Whether the file as it is now has no errors.",
            config.last_reload_ok,
        ),
        (
            "config_waiting",
            "Whether the file as it is now waits for a person.",
            config.unconfirmed is not None,
        ),
        (
            "config_waiting_changes",
            "What a file that waits for a person would change.",
            None if waiting is None else waiting.plan.count,
        ),
        (
            "config_last_reload_success_timestamp_seconds",
            "When the configuration that runs was loaded.",
            config.loaded_at,
        ),
    ):
        yield GaugeMetricFamily(f"mic_{name}", text, value)


def _hook(snapshot: Snapshot) -> Iterator[Metric]:
    if snapshot.desired.hook is None:
        return
    name, state = "mic_endpoints_hook", snapshot.hook
    yield CounterMetricFamily(f"{name}_runs", "Runs of on_endpoints_change.", state.runs)
    text = "Runs of on_endpoints_change that failed."
    yield CounterMetricFamily(f"{name}_failures", text, state.failures)
    text = "When on_endpoints_change ended well last."
    yield GaugeMetricFamily(f"{name}_last_success_timestamp_seconds", text, state.last_success_at)


def _sources(snapshot: Snapshot) -> Iterator[Metric]:
    inventory, plan = snapshot.observed.inventory, snapshot.plan
    if inventory.source == "nvml":
        yield GaugeMetricFamily("mic_nvml_up", "Whether NVML can be read.", inventory.error is None)
    for view in snapshot.observed.runtimes:
        if view.off is None:
            text = f"Whether {view.runtime} can be read."
            yield GaugeMetricFamily(f"mic_{view.runtime}_up", text, view.error is None)
    text = "Whether what is remembered could be saved."
    yield GaugeMetricFamily("mic_state_saved", text, "state" not in snapshot.context.amiss)
    text = "Whether the daemon found what was remembered damaged."
    yield GaugeMetricFamily("mic_state_damaged", text, snapshot.memory.lost is not None)
    text = "Changes that are due, those that wait included."
    yield GaugeMetricFamily("mic_plan_changes", text, plan.count)
    text = "Instances for which nothing can be done."
    yield GaugeMetricFamily("mic_plan_blocked", text, len(plan.blocked))


# --- families: one without a value, or without a series, says nothing, and is left out ----------


def _gauges(name: str, text: str, labels: str, rows: Iterable[Row]) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels.split()), rows)


def _counters(name: str, text: str, labels: str, rows: Iterable[Row]) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels.split()), rows)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, rows: Iterable[Row]) -> Metric:
    for values, value in rows:
        if value is not None:
            family.add_metric(values, value)
    return family


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
