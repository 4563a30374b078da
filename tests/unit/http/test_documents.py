"""The shapes that the clients of the former service read, field by field, and the newer ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.http import documents
from mic_supervisor.http.documents import Published
from mic_supervisor.http.views import encode
from mic_supervisor.model import Gpu, GpuInventory, GpuMemory, RunState
from mic_supervisor.plan.memory import Drained
from tests.unit.http import views_of
from tests.unit.plan import builders as b


def only(*gpus: Gpu) -> Published:
    return views_of.published(views_of.snapshot(b.desired(), b.observed(gpus=gpus)))


def plain(document: object) -> Any:
    """As a client reads it."""
    return json.loads(encode(document))


def gpus(published: Published) -> Any:
    assert published.snapshot is not None
    return plain(documents.gpus(published.snapshot))


def running(snapshot: Snapshot | None) -> Any:
    assert snapshot is not None
    return plain(documents.running(snapshot))


def discovery(snapshot: Snapshot | None) -> Any:
    assert snapshot is not None
    return plain(documents.discovery(snapshot))


def test_a_gpu_in_percent_watts_and_mib() -> None:
    found = gpus(views_of.good())
    assert found[0] == {
        "id": 0,
        "memory_usage": 22.75,
        "power_draw": 71.3,
        "processes": [
            {
                "pid": 4121,
                "name": "python",
                "gpu_memory_usage": 18636,
                "owner": "managed",
                "instance": "MAM-aaaaaaaa",
            }
        ],
        "uuid": b.uuid(0),
        "name": "NVIDIA H200",
        "memory_used": 18636,
        "memory_total": 81920,
        "power_limit": 700.0,
        "utilization": 37.0,
        "temperature": 36.0,
        "state": "managed",
        "instance": "MAM-aaaaaaaa",
        "parent": None,
    }
    assert [gpu["id"] for gpu in found] == [0, 1, 2, 3, 4]
    assert [gpu["state"] for gpu in found[3:]] == ["kept_empty", "idle"]


def test_unknown_is_null_and_never_zero() -> None:
    bare = Gpu(uuid=b.uuid(0), index=0, name="Simulated GPU", processes=None)
    assert gpus(only(bare)) == [
        {
            "id": 0,
            "memory_usage": None,
            "power_draw": None,
            "processes": None,
            "uuid": b.uuid(0),
            "name": "Simulated GPU",
            "memory_used": None,
            "memory_total": None,
            "power_limit": None,
            "utilization": None,
            "temperature": None,
            "state": "unknown",
            "instance": None,
            "parent": None,
        }
    ]


def test_memory_that_is_not_measured_or_not_there() -> None:
    for memory, usage in (
        (GpuMemory(24 << 30, None, None), None),
        (GpuMemory(0, 0, 0), None),
        (GpuMemory(24 << 30, 0, 24 << 30), 0.0),
    ):
        (gpu,) = gpus(only(views_of.gpu(0, memory=memory)))
        assert gpu["memory_usage"] == usage


def test_a_process_that_does_not_tell_its_memory_or_name() -> None:
    process = replace(views_of.holder(7, 1), used_memory=None, name=None, owner=None)
    (gpu,) = gpus(only(views_of.gpu(0, processes=(process,))))
    assert gpu["processes"] == [
        {"pid": 7, "name": None, "gpu_memory_usage": None, "owner": "unknown", "instance": None}
    ]


def test_one_entry_per_running_model_and_gpu() -> None:
    found = running(views_of.good().snapshot)
    legacy = [(row["model_name"], row["model_type"], row["gpu_id"]) for row in found]
    assert legacy == [("MAM", "triton", 0), ("qwen", "vllm", 1), ("qwen", "vllm", 2)]
    assert found[0] == {
        "model_name": "MAM",
        "model_type": "triton",
        "gpu_id": 0,
        "gpu_uuid": b.uuid(0),
        "instance": "MAM-aaaaaaaa",
        "phase": "ready",
        "endpoint": "http://127.0.0.1:20000",
    }


def test_what_does_not_run_is_not_listed_and_what_starts_is() -> None:
    found = running(views_of.bad().snapshot)
    assert [(row["model_name"], row["phase"]) for row in found] == [("slow", "starting")]


def test_a_shared_server_is_listed_once_per_model_and_gpu() -> None:
    server = b.on(
        "server",
        0,
        1,
        backend="server",
        shared=True,
        placements=(b.placement("A", 0), b.placement("B", 1)),
    )
    observed = b.observed(b.workload(server))
    found = running(views_of.snapshot(b.desired(server), observed))
    assert [(row["model_name"], row["gpu_id"]) for row in found] == [("A", 0), ("B", 1)]


def test_a_gpu_that_dropped_off_has_no_index() -> None:
    model = b.on("m", 0)
    observed = b.observed(b.workload(model), gpus=())
    (row,) = running(views_of.snapshot(b.desired(model), observed))
    assert (row["gpu_id"], row["gpu_uuid"]) == (None, b.uuid(0))


def test_discovery_names_metrics_endpoints_and_nothing_that_collides() -> None:
    (target,) = discovery(views_of.good().snapshot)
    assert target == {
        "targets": ["127.0.0.1:20002"],
        "labels": {
            "__scheme__": "http",
            "__metrics_path__": "/metrics",
            "mic_model": "MAM",
            "mic_backend": "triton",
            "mic_instance": "MAM-aaaaaaaa",
            "mic_gpu_uuids": b.uuid(0),
        },
    }


def test_what_has_ended_is_not_discovered() -> None:
    model = b.on("m", 0, workload=b.container(ports=views_of.PORTS))
    ended = b.workload(model, RunState.EXITED, ports={"http": 20000, "metrics": 20001})
    assert discovery(views_of.snapshot(b.desired(model), b.observed(ended))) == []


def test_readiness_names_what_is_missing() -> None:
    assert documents.readiness(views_of.good(), None) == {
        "status": "ready",
        "reason": None,
        "waiting": [],
    }
    found = documents.readiness(views_of.bad(), None)
    assert found["status"] == "not ready"
    assert found["waiting"][1] == {
        "instance": "MAM-aaaaaaaa",
        "phase": "backoff",
        "reason": "backoff: it exited with 1",
    }
    stalled = documents.readiness(views_of.good(), "the loop has not finished a round for 75 s")
    assert (stalled["status"], stalled["waiting"]) == ("not ready", [])


def test_why_there_are_no_gpus() -> None:
    assert GpuInventory("nvml", error="cannot read GPUs: x").unreadable == "cannot read GPUs: x"
    assert GpuInventory("none").unreadable == "cannot read GPUs: MIC_GPU_SOURCE is none"
    assert GpuInventory("simulated").unreadable is None


def test_the_status_shows_no_line_of_the_file_and_the_socket_does() -> None:
    published = views_of.bad()
    assert published.snapshot is not None
    served = documents.served_status(published, published.snapshot)
    assert "API_KEY: 12345678" not in str(served)
    assert "gpus.yaml:12:5: error" in served["config"]["error"]


def test_the_status_says_what_a_file_that_waits_would_change_and_no_secret_of_it() -> None:
    published = views_of.waiting()
    assert published.snapshot is not None
    served = documents.served_status(published, published.snapshot)
    assert served["config"]["unconfirmed"] == views_of.WAITS
    due = {one["model"]: one["action"] for one in served["waiting"]["actions"]}
    assert due == {"MAM": "replace", "embed": "create", "qwen": "remove"}
    assert views_of.SECRET not in str(served)
    assert views_of.SECRET not in published.scrubber.text(f"it said {views_of.SECRET}")
    good = views_of.good()
    assert good.snapshot is not None
    assert documents.served_status(good, good.snapshot)["waiting"] is None


def test_metrics_on_the_port_of_the_model_itself_are_discovered() -> None:
    model = b.on("m", 0, metrics_path="/metrics", workload=b.container(listen="::1"))
    observed = b.observed(b.workload(model, ports={"http": 20000}))
    (target,) = discovery(views_of.snapshot(b.desired(model), observed))
    assert target["targets"] == ["[::1]:20000"]
    assert target["labels"]["__metrics_path__"] == "/metrics"


def test_a_host_that_is_drained_is_not_ready_and_says_why() -> None:
    published = views_of.good()
    assert published.snapshot is not None
    order = Drained(since=views_of.NOW, reason="a new riser")
    memory = replace(published.snapshot.memory, drained=order)
    drained = replace(published, snapshot=replace(published.snapshot, memory=memory))
    found = documents.readiness(drained, None)
    assert found["status"] == "not ready"
    assert re.fullmatch(
        r"the host is drained since \d\d:\d\d:\d\d \(a new riser\)", found["reason"]
    )
    assert documents.served_status(drained, drained.snapshot)["drained"] == {  # type: ignore[arg-type]
        "since": views_of.NOW,
        "reason": "a new riser",
        "until_reboot": False,
    }
