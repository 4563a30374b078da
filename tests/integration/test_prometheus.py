"""A real Prometheus reads the metrics, finds the models, and understands rules and dashboard."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mic_supervisor.config.settings import Address
from mic_supervisor.gpu.events import XidRecord, XidSeverity
from mic_supervisor.http.access import Access
from mic_supervisor.http.documents import Durations, LoopState, Published
from mic_supervisor.http.server import HttpServer
from tests.support.mic import Mic
from tests.support.ports import PortBlock
from tests.support.prometheus import (
    DASHBOARD,
    EXAMPLES,
    Prometheus,
    example,
    filled,
    promtool,
)
from tests.support.waiting import http, until
from tests.unit.http import views_of
from tests.unit.plan import builders as b

# Serves /health on one port and metrics, with labels like a real model server's, on another.
MODEL = """
import sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
TEXT = '# TYPE served_total counter\\nserved_total{model="its own",instance="inner"} 3\\n'
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = (TEXT if self.path == "/metrics" else "ok").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
for port in map(int, sys.argv[1:]):
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever).start()
"""


def test_the_examples_are_valid() -> None:
    promtool("check", "config", EXAMPLES / "prometheus.yml")
    promtool("check", "rules", EXAMPLES / "mic.rules.yml")


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    tests = Path(__file__).with_name("mic.rules.test.yml")
    assert "SUCCESS" in promtool("test", "rules", tests)
    rules = yaml.safe_load((EXAMPLES / "mic.rules.yml").read_text())["groups"][0]["rules"]
    cases = [case for test in yaml.safe_load(tests.read_text())["tests"]
             for case in test["alert_rule_test"]]  # fmt: skip
    for fires in (True, False):
        covered = {case["alertname"] for case in cases if bool(case.get("exp_alerts")) is fires}
        assert covered == {rule["alert"] for rule in rules}


def test_rules_and_dashboard_ask_only_for_what_is_served() -> None:
    text = DASHBOARD.read_text() + (EXAMPLES / "mic.rules.yml").read_text()
    asked = set(re.findall(r"\bmic_[a-z_]+\b", text)) - {"mic_instance"}
    served = set()
    for published in (everything(), views_of.bad(engine_gone=True)):
        server_text = metrics_of(published)
        served |= set(re.findall(r"^(mic_[a-z_]+)", server_text, re.MULTILINE))
    # Only where systemd runs the processes.
    assert asked - served == {"mic_systemd_up"}


def everything() -> Published:
    """The good machine, with a series for everything that there can be."""
    seen = Durations().with_one(0.2).with_one(3.0)
    xid = XidRecord(b.uuid(0), 31, 1, views_of.NOW - 4000, XidSeverity.APP, None)
    return views_of.good(loop=LoopState(9, 1, 0.012, views_of.NOW, seen), xids=(xid,))


def metrics_of(published: Published) -> str:
    from tests.unit.http.ask import Site

    return Site(published)("/metrics").text


# --- a server that shows everything, and a Prometheus that scrapes it ----------------------------


@pytest.fixture(scope="module")
def block() -> Iterator[PortBlock]:
    block = PortBlock()
    yield block
    block.close()


@pytest.fixture(scope="module")
def target(block: PortBlock) -> Iterator[str]:
    port = block.take()
    shown = [everything()]
    server = HttpServer(Address("127.0.0.1", port), Access(), lambda: shown[0], stall_after=3600.0)
    server.start()
    until(lambda: http(f"http://127.0.0.1:{port}/healthz").status == 200, "the server")
    yield f"127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="module")
def scraped(
    target: str, block: PortBlock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), block.take(), example(target))
    until(lambda: server.query("count_over_time(mic_build_info[1m]) > 3"), "a few scrapes")
    yield server
    server.close()


@pytest.mark.parametrize("published", [views_of.good(), views_of.bad(), views_of.published(None)])
def test_promtool_finds_nothing_to_say_about_the_metrics(published: Published) -> None:
    assert promtool("check", "metrics", stdin=metrics_of(published)).strip() == ""


def test_everything_is_scraped_and_nothing_renamed(scraped: Prometheus, target: str) -> None:
    # A scrape that is late by a second leaves a gap.
    until(lambda: [r["value"][1] for r in scraped.query('up{job="mic"}')] == ["1"], "a scrape")
    (ready,) = until(lambda: scraped.query('mic_model_ready{model="MAM"}'), "its series")
    assert ready["metric"] == {
        "__name__": "mic_model_ready",
        "instance": target,
        "job": "mic",
        "model": "MAM",
        "backend": "triton",
        "mic_instance": "MAM-aaaaaaaa",
    }
    assert scraped.query('{job="mic",__name__=~".+",exported_instance!=""}') == []
    assert scraped.query('{job="mic",__name__=~"exported_.+|.*_created"}') == []


def test_every_expression_of_the_dashboard_has_an_answer(scraped: Prometheus) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    assert len(asked) >= 20
    # changes() of the annotation is empty as long as nothing changes: it need only be valid.
    scraped.query(filled(dashboard["annotations"]["list"][0]["expr"]))

    def unanswered() -> list[tuple[str, str]]:
        return [(title, expr) for title, expr in asked if not scraped.query(filled(expr))]

    until(lambda: not unanswered(), "an answer to everything")


def test_the_panels_of_the_dashboard_lie_side_by_side() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        pos = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(pos["x"], pos["x"] + pos["w"])
            for y in range(pos["y"], pos["y"] + pos["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_no_series_of_a_gpu_outlives_it(block: PortBlock, tmp_path: Path) -> None:
    """Staleness markers: Prometheus drops what a scrape no longer has."""
    port = block.take()
    shown = [everything()]
    server = HttpServer(Address("127.0.0.1", port), Access(), lambda: shown[0], stall_after=3600.0)
    server.start()
    until(lambda: http(f"http://127.0.0.1:{port}/healthz").status == 200, "the server")
    prometheus = Prometheus(tmp_path, block.take(), example(f"127.0.0.1:{port}"))
    try:
        until(lambda: len(prometheus.query("mic_gpu_info")) == 5, "five GPUs")
        before = shown[0].snapshot
        assert before is not None
        inventory = replace(before.observed.inventory, gpus=before.observed.inventory.gpus[:4])
        observed = replace(before.observed, inventory=inventory)
        shown[0] = replace(shown[0], snapshot=replace(before, observed=observed))
        until(lambda: len(prometheus.query("mic_gpu_info")) == 4, "one GPU less")
        assert prometheus.query(f'{{uuid="{b.uuid(4)}"}}') == []
    finally:
        prometheus.close()
        server.stop()


# --- the daemon itself ----------------------------------------------------------------------------


def test_prometheus_finds_the_models_of_a_daemon(
    mic: Mic, free_port: Callable[[], int], tmp_path: Path
) -> None:
    """From gpus.yaml to a series of the model's own, joined with what the daemon says of it."""
    program = tmp_path / "model.py"
    program.write_text(MODEL)
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.write(
        f"""
        version: 1
        models:
          speaks:
            backend: process
            command: [{sys.executable}, {program}, "${{port}}", "${{port:metrics}}"]
            ports: {{metrics: {free_port()}}}
            probe: {{http: /health, period: 200ms}}
          silent:
            backend: process
            command: [{sys.executable}, {program}, "${{port}}"]
            probe: {{http: /health, period: 200ms}}
        gpus:
          0: speaks
          1: silent
        """
    )
    mic.run()
    until(lambda: http(f"{mic.url}/readyz").status == 200, "both models")
    promtool("check", "metrics", stdin=http(f"{mic.url}/metrics").text)
    prometheus = Prometheus(tmp_path / "prometheus", free_port(), example(mic.listen))
    try:
        (row,) = until(lambda: prometheus.query("served_total"), "the model's own series")
        assert row["metric"]["mic_instance"] == "speaks-51000000"
        assert row["metric"]["mic_model"] == "speaks"
        assert row["metric"]["model"] == "its own"
        assert row["metric"]["job"] == "mic-models"
        joined = "served_total * on (mic_instance) group_left (gpu_uuids) mic_model_info"
        (row,) = until(lambda: prometheus.query(joined), "both at once")
        assert row["metric"]["gpu_uuids"] == "GPU-51000000-0000-4000-8000-000000000000"
        jobs = sorted(target["labels"]["job"] for target in prometheus.targets())
        assert jobs == ["mic", "mic-models"]
        mic.write("version: 1\nmodels: {}\ngpus: {0: none, 1: none}\n")
        until(
            lambda: [t["labels"]["job"] for t in prometheus.targets()] == ["mic"],
            "the target to go with its model",
        )
    finally:
        prometheus.close()
