"""Servers that hang, and some that only look like it; and what is asked of one before it is ready.

The one that hangs answers /health and its metrics, takes requests, and never finishes one.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.daemon_world import DaemonWorld, daemon_world, identity
from tests.integration.job_world import world
from tests.support.commands import SERVE
from tests.support.mic import Mic
from tests.support.triton import infer_request
from tests.support.waiting import http, until

FOREVER = 3600
WITHIN = 5.0  # seconds; whoever is slow here takes a fifth of it


def model(*more: str) -> str:
    keys = [
        "backend: process",
        f"command: {SERVE}",
        "stop_timeout: 2s",
        *more,
    ]
    return f"{{{', '.join(keys)}}}"


def progress(path: str = "/infer", within: str = f"{WITHIN:g}s") -> str:
    return (
        f"progress: {{metric: demo_requests_total, within: {within}, "
        f"request: {{path: '{path}', body: {{inputs: a}}}}}}"
    )


def answered(url: str) -> int:
    found = re.search(
        r"^demo_requests_total\{.*\} (\d+)", http(f"{url}/metrics").text, re.MULTILINE
    )
    assert found is not None
    return int(found[1])


def hang(url: str) -> None:
    assert http(f"{url}/infer?delay={FOREVER}", "PUT", "").status == 200


@contextmanager
def users(url: str) -> Iterator[None]:
    """They ask without a pause."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            http(f"{url}/infer", "POST", {})

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for one in threads:
        one.start()
    try:
        yield
    finally:
        over.set()
        for one in threads:
            one.join()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path, None, gpus=5) as found:
        yield found


def test_only_one_that_hangs_is_reported_and_it_is_restarted_only_where_asked(
    made: DaemonWorld,
) -> None:
    everything = f"probe: {{http: /health, period: 500ms, {progress()}}}"
    slow = f"probe: {{http: /health, period: 500ms, {progress('/infer?delay=1')}}}"
    live = f"probe: {{startup: {{http: /health}}, liveness: {{period: 500ms, {progress()}}}}}"
    names = {"idle": everything, "slow": slow, "busy": everything, "told": everything, "ends": live}
    made.write(dict(enumerate(names)), **{name: model(probe) for name, probe in names.items()})
    daemon = made.mic.run()
    ids = {name: identity(name, index) for index, name in enumerate(names)}
    made.converged(*ids.values(), timeout=60)

    def rows() -> dict[str, Any]:
        found = made.rows()
        return {name: found[instance] for name, instance in ids.items()}

    before = rows()
    urls = {name: row["endpoints"]["http"] for name, row in before.items()}
    with users(urls["busy"]):
        for name in ("told", "ends"):
            hang(urls[name])
            assert http(f"{urls[name]}/health").status == 200

        until(lambda: rows()["told"]["phase"] == "degraded", "the report", timeout=90)
        told = rows()["told"]
        assert (told["health"], told["serving"]) == ("degraded", False)
        assert told["reason"] == (
            "it hangs: demo_requests_total has not moved for 5 s, and POST /infer: "
            "no answer within 5 s"
        )
        until(lambda: rows()["ends"]["restarts"] == 1, "the restart", timeout=90)
        until(lambda: rows()["ends"]["phase"] == "ready", "the new one", timeout=60)
        for name in ("idle", "slow"):
            since = answered(urls[name])
            moves = partial(lambda url, at: answered(url) > at, urls[name], since)
            until(moves, f"a request to {name}", timeout=90)
        time.sleep(WITHIN)
    now = rows()
    for name in ("idle", "slow", "busy", "told"):
        assert (now[name]["pid"], now[name]["restarts"]) == (before[name]["pid"], 0), name
    assert now["ends"]["pid"] != before["ends"]["pid"]
    assert now["told"]["phase"] == "degraded"
    degraded = [e for e in made.history("phase") if e["phase"] == "degraded"]
    assert {e["instance"] for e in degraded} <= {ids["told"], ids["ends"]}, degraded
    assert any(e["text"] == told["reason"] for e in degraded)
    (restarted,) = [e for e in made.history("begin") if e["phase"] == "restart"]
    assert restarted["instance"] == ids["ends"]
    assert "not alive: it hangs: demo_requests_total" in restarted["text"]

    # The page and the metrics say it, too.
    metrics = http(f"{made.mic.url}/metrics").text
    assert re.search(rf'^mic_model_state\{{[^}}]*{ids["told"]}[^}}]*"degraded"\}} 1', metrics, re.M)
    assert "it hangs: demo_requests_total" in http(f"{made.mic.url}/api/v1/status").text

    # It is well again as soon as it answers.
    assert http(f"{urls['told']}/infer", "DELETE").status == 200
    with users(urls["told"]):
        until(lambda: rows()["told"]["phase"] == "ready", "the end of it", timeout=60)
    assert "Traceback" not in daemon.text()


def test_a_counter_that_the_server_does_not_have_is_said(mic: Mic) -> None:
    probe = progress().replace("demo_requests_total", "no_such_total")
    mic.write(
        f"version: 1\nmodels: {{qa: {model(f'probe: {{period: 500ms, {probe}}}')}}}\n"
        "gpus: {0: qa}\n"
    )
    mic.run()

    def reason() -> str:
        (row,) = mic.status()["instances"]
        return row["reason"] or ""

    said = "health unknown: GET /metrics shows no no_such_total, although POST /infer answers 200"
    until(lambda: reason() == said, "the reason", timeout=60)


def test_it_is_ready_once_it_has_answered_as_often_as_it_is_asked(mic: Mic) -> None:
    def write(*more: str) -> None:
        probe = "probe: {http: /health, period: 200ms}"
        mic.write(f"version: 1\nmodels: {{qa: {model(probe, *more)}}}\ngpus: {{0: qa}}\n")

    def row() -> dict[str, Any]:
        (found,) = mic.status()["instances"]
        return dict(found)

    warm_up = "warm_up: {path: '/infer?delay=0.5', body: {inputs: a}, count: 4}"
    write(warm_up)
    mic("apply", rc=0)
    url, pid = row()["endpoints"]["http"], row()["pid"]
    assert answered(url) == 4

    # A supervisor that takes it over does not ask again, and no command does.
    daemon = mic.run()
    until(lambda: row()["phase"] == "ready", "the adoption")
    assert mic("plan", rc=0).stdout == "No changes.\n"
    daemon.stop()
    mic.run()
    until(lambda: row()["phase"] == "ready", "the adoption")
    assert (answered(url), row()["pid"]) == (4, pid)

    # Nor does one that runs when the key comes into the file, or changes.
    write(warm_up.replace("count: 4", "count: 6"))
    mic("reload", "--wait", rc=0)
    time.sleep(1.0)
    assert (answered(url), row()["pid"], row()["phase"]) == (4, pid, "ready")

    # A new start is: the server counts from nothing.
    mic("restart", "qa", rc=0, timeout=90)
    assert row()["pid"] != pid
    assert answered(row()["endpoints"]["http"]) == 6


def test_a_start_has_failed_where_it_is_not_warmed_up_in_time(mic: Mic) -> None:
    probe = "probe: {http: /health, period: 200ms}"
    warm_up = "warm_up: {path: /nothing, body: {inputs: a}}"
    text = model(probe, warm_up, "start_timeout: 4s", "rollout: {rollback: false}")
    mic.write(f"version: 1\nmodels: {{qa: {text}}}\ngpus: {{0: qa}}\n")
    mic.run()

    def row() -> dict[str, Any]:
        (found,) = mic.status()["instances"]
        return dict(found)

    why = "warming up: 0 of 1 requests answered; POST /nothing answers 404"
    until(lambda: row()["phase"] == "starting" and row()["reason"] == why, "the request")
    until(lambda: row()["restarts"] > 0, "the next try", timeout=60)

    def events() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = mic("history", "--json", rc=0).json()["events"]
        return found

    # The first start may have failed before the server listened.
    late = f"not up within 4 s: {why}"
    until(lambda: any(late in f"{e}" for e in events()), "its failure", timeout=60)
    assert not any(e.get("phase") == "ready" for e in events())


# --- Triton -------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.triton
def test_a_real_triton_is_warmed_up_and_seen_to_hang(
    engine: Any, triton_image: str, tmp_path: Path
) -> None:
    assert triton_image
    with world(tmp_path, engine, gpus=1) as triton:
        directory = triton.repository.model("MAM")
        program, hangs = directory / "1" / "model.py", directory / "1" / "hangs"
        waits = (
            "        import os\n"
            "        while os.path.exists(os.path.join(os.path.dirname(__file__), 'hangs')):\n"
            "            time.sleep(0.1)\n"
        )
        text = program.read_text()
        program.write_text(text.replace("        answers = []\n", f"{waits}        answers = []\n"))
        request = f"path: /v2/models/MAM/infer, body: {json.dumps(infer_request(1.0))}"
        counter = f"metric: nv_inference_request_success, within: 4s, request: {{{request}}}"
        keys = (
            f"backend: triton, warm_up: {{{request}, count: 5}}, stop_timeout: 5s, "
            f"probe: {{KIND: {{period: 500ms, progress: {{{counter}}}}}}}"
        )

        def row() -> dict[str, Any]:
            (found,) = triton.mic.status()["instances"]
            return dict(found)

        def inferences() -> int:
            shown = http(row()["endpoints"]["metrics"]).text
            found = re.search(r"^nv_inference_request_success\{.*\} (\d+)", shown, re.MULTILINE)
            return int(found[1]) if found is not None else 0

        triton.write({0: "MAM"}, MAM=f"{{{keys.replace('KIND', 'readiness')}}}")
        triton.mic.run()
        until(lambda: row()["phase"] == "ready", "its start", timeout=120)
        assert inferences() >= 5
        until(lambda: inferences() >= 7, "what it is asked while it is idle", timeout=60)
        assert row()["phase"] == "ready"

        hangs.touch()
        url, container = row()["endpoints"]["http"], row()["container_id"]
        until(lambda: row()["phase"] == "degraded", "the report", timeout=60)
        assert row()["reason"] == (
            "it hangs: nv_inference_request_success has not moved for 4 s, and "
            "POST /v2/models/MAM/infer: no answer within 4 s"
        )
        assert http(f"{url}/v2/health/ready").status == 200
        assert http(f"{url}/v2/models/MAM/ready").status == 200
        assert row()["container_id"] == container and row()["restarts"] == 0

        # Somebody asks for more: the same probe, under liveness, and nothing is replaced for that.
        triton.write({0: "MAM"}, MAM=f"{{{keys.replace('KIND', 'liveness')}}}")
        until(lambda: row()["restarts"] == 1, "the restart", timeout=60)
        hangs.unlink()
        until(lambda: row()["phase"] == "ready", "its next start", timeout=120)
        assert row()["container_id"] == container
