"""What a scrape says, and what it leaves out."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mic_supervisor.gpu.events import XidRecord, XidSeverity
from mic_supervisor.http import metrics
from mic_supervisor.http.documents import Durations, LoopState, Published
from mic_supervisor.model import GpuInventory, Owner, OwnerKind, RuntimeView
from tests.unit.http import views_of
from tests.unit.http.ask import Site
from tests.unit.plan import builders as b

Samples = dict[str, float]


def scrape(*shown: Published) -> Samples:
    """Series as Prometheus writes them, with sorted labels, to their values."""
    text = Site(*shown)("/metrics").text
    return {
        series(sample.name, sample.labels): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def series(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name


def names(samples: Samples) -> set[str]:
    return {name.partition("{")[0] for name in samples}


def of(name: str, samples: Samples) -> Samples:
    return {key: value for key, value in samples.items() if key.partition("{")[0] == name}


def test_every_gpu_metric_with_its_unit() -> None:
    found = scrape(views_of.good())
    uuid = f'uuid="{b.uuid(0)}"'
    mine = {
        key.replace(f",{uuid}", "").replace(uuid, ""): value
        for key, value in found.items()
        if uuid in key and key.startswith("mic_gpu_") and not key.startswith("mic_gpu_state")
    }
    assert mine == {
        'mic_gpu_info{index="0",name="NVIDIA H200",parent="",pci_bus_id="00000000:3B:00.0"}': 1,
        "mic_gpu_memory_total_bytes{}": 80 * 2**30,
        "mic_gpu_memory_used_bytes{}": int(18.2 * 2**30),
        "mic_gpu_memory_free_bytes{}": 80 * 2**30 - int(18.2 * 2**30),
        "mic_gpu_memory_reserved_bytes{}": 300 * 2**20,
        "mic_gpu_utilization_ratio{}": 0.37,
        "mic_gpu_power_draw_watts{}": 71.3,
        "mic_gpu_power_limit_watts{}": 700,
        "mic_gpu_temperature_celsius{}": 36,
        "mic_gpu_energy_joules_total{}": 123456.789,
        'mic_gpu_clock_hertz{domain="sm"}': 1.98e9,
        'mic_gpu_clock_hertz{domain="memory"}': 3.2e9,
        'mic_gpu_clock_event_active{reason="sw_power_cap"}': 1,
        'mic_gpu_clock_event_active{reason="hw_slowdown"}': 0,
        'mic_gpu_ecc_errors_total{kind="corrected"}': 3,
        'mic_gpu_ecc_errors_total{kind="uncorrected"}': 0,
        'mic_gpu_holders{owner="managed"}': 1,
        'mic_gpu_holders{owner="foreign"}': 0,
        'mic_gpu_holders{owner="orphan"}': 0,
        "mic_gpu_healthy{}": 1,
    }


def test_every_model_metric_per_instance() -> None:
    found = scrape(views_of.good())
    key = 'backend="triton",mic_instance="MAM-aaaaaaaa",model="MAM"'
    mine = {
        name.replace(key, "…"): value
        for name, value in found.items()
        if key in name and not name.startswith("mic_model_state")
    }
    assert found[f'mic_model_info{{backend="triton",gpu_uuids="{b.uuid(0)}",'
                 'mic_instance="MAM-aaaaaaaa",model="MAM",unit=""}'] == 1  # fmt: skip
    assert mine == {
        "mic_model_ready{…}": 1,
        "mic_model_as_desired{…}": 1,
        "mic_model_restarts_total{…}": 0,
        f'mic_model_gpu_memory_bytes{{…,uuid="{b.uuid(0)}"}}': int(18.2 * 2**30),
        "mic_model_start_time_seconds{…}": views_of.NOW - 3600,
    }
    states = {name: value for name, value in of("mic_model_state", found).items() if key in name}
    assert len(states) == 13
    assert [name for name, value in states.items() if value] == [
        f'mic_model_state{{{key},state="ready"}}'
    ]


def test_the_loop_and_the_program_itself() -> None:
    found = scrape(views_of.good())
    rest = {
        key: value
        for key, value in found.items()
        if not key.startswith(("mic_gpu_", "mic_model_", "mic_collect_"))
    }
    assert rest == {
        "mic_gpus_unopened": 0,
        'mic_driver_info{cuda="12.9",driver="575.57.08",nvml="12.575.57.08"}': 1,
        "mic_nvml_up": 1,
        "mic_docker_up": 1,
        "mic_subprocess_up": 1,
        "mic_state_saved": 1,
        "mic_state_damaged": 0,
        "mic_drained": 0,
        "mic_plan_changes": 0,
        "mic_plan_blocked": 0,
        "mic_endpoints_hook_runs_total": 3,
        "mic_endpoints_hook_failures_total": 1,
        "mic_endpoints_hook_last_success_timestamp_seconds": views_of.NOW - 60,
        "mic_reconcile_total": 7,
        "mic_reconcile_errors_total": 1,
        "mic_reconcile_duration_seconds": 0.012,
        "mic_reconcile_last_success_timestamp_seconds": views_of.NOW,
        "mic_config_last_reload_successful": 1,
        "mic_config_waiting": 0,
        "mic_config_last_reload_success_timestamp_seconds": views_of.NOW - 7200,
        f'mic_config_hash_info{{hash="{"f00d" * 16}"}}': 1,
        f'mic_build_info{{revision="{metrics.revision()}",version="0.1.0"}}': 1,
    }
    assert found["mic_collect_duration_seconds"] > 0


def test_a_file_that_waits_is_counted_and_what_it_would_change() -> None:
    found = scrape(views_of.waiting())
    assert (found["mic_config_waiting"], found["mic_config_waiting_changes"]) == (1, 3)
    assert (found["mic_config_last_reload_successful"], found["mic_plan_changes"]) == (1, 0)


def test_claims_are_counted_by_their_state_where_the_file_hands_gpus_over() -> None:
    found = scrape(views_of.claimed())
    assert of("mic_claims", found) == {
        'mic_claims{state="waiting"}': 1,
        'mic_claims{state="starting"}': 0,
        'mic_claims{state="ready"}': 1,
        'mic_claims{state="vanished"}': 1,
        'mic_claims{state="releasing"}': 0,
    }
    assert found[series("mic_gpu_state", {"uuid": b.uuid(2), "state": "fleet"})] == 1
    assert of("mic_claims", scrape(views_of.good())) == {}


def test_a_memory_that_cannot_be_saved_is_told() -> None:
    published = views_of.good()
    assert published.snapshot is not None
    context = replace(published.snapshot.context, amiss={"state": "cannot write memory.json"})
    snapshot = replace(published.snapshot, context=context)
    assert scrape(replace(published, snapshot=snapshot))["mic_state_saved"] == 0


def test_a_failed_look_at_the_gpus_leaves_no_series_of_them_behind() -> None:
    before = views_of.good()
    assert before.snapshot is not None
    inventory = GpuInventory("nvml", error="cannot read GPUs: it hangs")
    blind = replace(
        before.snapshot, observed=replace(before.snapshot.observed, inventory=inventory)
    )
    found = scrape(before, replace(before, snapshot=blind))
    gpu = {name for name in names(found) if name.startswith("mic_gpu")}
    assert gpu == {
        "mic_gpu_memory_release_seconds_bucket",
        "mic_gpu_memory_release_seconds_count",
        "mic_gpu_memory_release_seconds_sum",
    }
    assert found["mic_nvml_up"] == 0
    assert of("mic_model_gpu_memory_bytes", found) == {}


def test_a_gpu_that_is_gone_has_no_series_but_that_it_is_lost() -> None:
    model = b.on("m", 0)
    trouble = b.trouble("GPU 5", "GPU 5 is not there", 5)
    wanted = b.desired(model, unsatisfiable=(trouble,))
    observed = b.observed(b.workload(model), gpus=(views_of.gpu(0),))
    found = scrape(views_of.published(views_of.snapshot(wanted, observed)))
    lost = {key: value for key, value in found.items() if b.uuid(5) in key}
    assert {key: value for key, value in lost.items() if value} == {
        f'mic_gpu_state{{state="lost",uuid="{b.uuid(5)}"}}': 1,
        f'mic_model_info{{backend="",gpu_uuids="{b.uuid(5)}",mic_instance="GPU 5",model="none",'
        'unit=""}': 1,
    }
    assert found[f'mic_gpu_healthy{{uuid="{b.uuid(5)}"}}'] == 0


def test_what_is_not_known_is_left_out() -> None:
    bare = views_of.gpu(
        0,
        memory=None,
        processes=None,
        power_draw=None,
        power_limit=None,
        utilization=None,
        temperature=None,
        telemetry=None,
    )
    found = scrape(views_of.published(views_of.snapshot(b.desired(), b.observed(gpus=(bare,)))))
    assert {name for name in names(found) if name.startswith("mic_gpu_")} == {
        "mic_gpu_info",
        "mic_gpu_state",
        "mic_gpu_healthy",
        "mic_gpu_memory_release_seconds_bucket",
        "mic_gpu_memory_release_seconds_count",
        "mic_gpu_memory_release_seconds_sum",
    }


def test_before_the_first_round_there_is_the_program_alone() -> None:
    found = scrape(views_of.published(None, loop=LoopState()))
    assert not any(name.startswith(("mic_model", "mic_nvml")) for name in names(found))
    assert found["mic_reconcile_total"] == 0
    assert "mic_reconcile_last_success_timestamp_seconds" not in found


@pytest.mark.parametrize(("source", "known"), [("nvml", True), ("simulated", False)])
def test_nvml_is_up_or_down_only_where_it_is_asked(source: str, known: bool) -> None:
    observed = replace(b.observed(), inventory=GpuInventory(source))  # type: ignore[arg-type]
    found = scrape(views_of.published(views_of.snapshot(b.desired(), observed)))
    assert ("mic_nvml_up" in found) is known


def test_an_engine_that_is_switched_off_is_neither_up_nor_down() -> None:
    runtimes = (RuntimeView("docker", off="MIC_DOCKER_HOST is none"), RuntimeView("systemd"))
    observed = replace(b.observed(), runtimes=runtimes)
    found = scrape(views_of.published(views_of.snapshot(b.desired(), observed)))
    assert "mic_docker_up" not in found
    assert found["mic_systemd_up"] == 1
    assert scrape(views_of.bad(engine_gone=True))["mic_docker_up"] == 0


def test_holders_by_whose_they_are() -> None:
    found = scrape(views_of.bad())
    holders = {key: value for key, value in of("mic_gpu_holders", found).items() if value}
    assert holders == {
        f'mic_gpu_holders{{owner="managed",uuid="{b.uuid(1)}"}}': 1,
        f'mic_gpu_holders{{owner="orphan",uuid="{b.uuid(2)}"}}': 1,
        f'mic_gpu_holders{{owner="foreign",uuid="{b.uuid(3)}"}}': 1,
    }
    # Who holds GPU 4 cannot be read.
    assert not any(b.uuid(4) in key for key in of("mic_gpu_holders", found))


def test_an_mps_server_counts_with_the_instance_that_it_serves() -> None:
    owner = Owner(OwnerKind.UNIT, "nvidia-mps.service", b.on("m", 0).id)
    gpu = b.gpu(0, processes=(b.process(7, owner=owner),))
    seen = views_of.snapshot(b.desired(b.on("m", 0)), b.observed(gpus=[gpu]))
    found = scrape(views_of.published(seen))
    assert {key: value for key, value in of("mic_gpu_holders", found).items() if value} == {
        f'mic_gpu_holders{{owner="managed",uuid="{b.uuid(0)}"}}': 1
    }
    assert len(of("mic_model_gpu_memory_bytes", found)) == 1


def test_memory_that_one_process_does_not_tell_makes_the_sum_unknown() -> None:
    model = b.on("m", 0)
    silent = replace(views_of.holder(8, 1, model.id), used_memory=None)
    gpu = views_of.gpu(0, processes=(views_of.holder(7, 1, model.id), silent))
    observed = b.observed(b.workload(model), gpus=(gpu,))
    found = scrape(views_of.published(views_of.snapshot(b.desired(model), observed)))
    assert of("mic_model_gpu_memory_bytes", found) == {}


def test_an_unprobed_instance_is_neither_ready_nor_not() -> None:
    model = b.on("m", 0, probes=b.Probes())
    observed = b.observed(b.workload(model))
    found = scrape(views_of.published(views_of.snapshot(b.desired(model), observed)))
    assert of("mic_model_ready", found) == {}
    assert list(of("mic_model_as_desired", found).values()) == [1]


def test_a_rejected_file_shows() -> None:
    found = scrape(views_of.bad())
    assert found["mic_config_last_reload_successful"] == 0
    assert found["mic_config_last_reload_success_timestamp_seconds"] == views_of.NOW - 7200


def test_releases_are_a_histogram() -> None:
    seen = Durations()
    for seconds in (0.05, 0.1, 0.3, 999.0):
        seen = seen.with_one(seconds)
    found = scrape(views_of.good(loop=LoopState(releases=seen)))
    buckets = of("mic_gpu_memory_release_seconds_bucket", found)
    assert [int(value) for value in buckets.values()] == [2, 2, 3, 3, 3, 3, 3, 3, 3, 4]
    assert list(buckets)[-1] == 'mic_gpu_memory_release_seconds_bucket{le="+Inf"}'
    assert found["mic_gpu_memory_release_seconds_count"] == 4
    assert found["mic_gpu_memory_release_seconds_sum"] == pytest.approx(999.45)


def test_xids_are_counted_per_gpu() -> None:
    record = XidRecord(b.uuid(0), 79, 2, views_of.NOW - 5, XidSeverity.CRITICAL, None)
    nameless = replace(record, uuid=None)
    found = scrape(views_of.good(xids=(nameless, record)))
    labels = f'{{uuid="{b.uuid(0)}",xid="79"}}'
    assert of("mic_gpu_xid_errors_total", found) == {f"mic_gpu_xid_errors_total{labels}": 2}
    assert found[f"mic_gpu_xid_last_timestamp_seconds{labels}"] == views_of.NOW - 5


def test_no_label_is_one_that_prometheus_gives_itself() -> None:
    text = Site(views_of.bad())("/metrics").text
    labels = {
        label for family in parse_text(text) for sample in family.samples for label in sample.labels
    }
    assert not labels & {"instance", "job", "service", "pid"}
    assert "_created" not in text


def test_both_formats_are_spoken_and_nothing_of_the_header_comes_back() -> None:
    site = Site(views_of.bad())
    plain = site("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    opened = site("/metrics", headers={"Accept": accept})
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = list(parse_openmetrics(opened.text))
    assert {family.name for family in families} >= {"mic_gpu_info", "mic_model_restarts"}
    strange = site("/metrics", headers={"Accept": "application/openmetrics-text;version=evil"})
    assert "evil" not in str(strange.headers)
    assert strange.headers["content-type"] == opened.headers["content-type"]


def test_labels_are_escaped() -> None:
    model = b.on("m", 0)
    gpu = views_of.gpu(0)
    odd = replace(gpu, name='a"b\\c\nd')
    observed = b.observed(b.workload(model), gpus=(odd,))
    found = scrape(views_of.published(views_of.snapshot(b.desired(model), observed)))
    assert any('name="a"b\\c\nd"' in key for key in of("mic_gpu_info", found))


def test_sixteen_gpus_are_scraped_within_10_ms() -> None:
    """A first scrape after a round; those that follow are sent as they are.

    The best of many, since neighbours on this machine can only make it slower.
    """
    models = [b.on("m", index) for index in range(16)]
    gpus = tuple(
        views_of.gpu(index, 18.2, processes=(views_of.holder(4000 + index, 18.2, model.id),))
        for index, model in enumerate(models)
    )
    work = [b.workload(model, ports={"http": 20000 + index}) for index, model in enumerate(models)]
    found = views_of.snapshot(b.desired(*models), b.observed(*work, gpus=gpus))
    best, tries = float("inf"), 0
    while best >= 0.010 and tries < 300:
        views = views_of.views(views_of.published(found))
        began = time.perf_counter()
        made = metrics.render(views, "")
        best, tries = min(best, time.perf_counter() - began), tries + 1
        assert made.body.count(b"mic_gpu_info{") == 16
    assert best < 0.010
