"""docs/http.md against what is served."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from mic_supervisor.gpu.events import XidRecord, XidSeverity
from mic_supervisor.http import app, connections, page
from mic_supervisor.http.access import HIDDEN
from mic_supervisor.http.views import stall_limit
from mic_supervisor.model import RuntimeView
from tests.unit.http import views_of
from tests.unit.http.ask import Site
from tests.unit.plan import builders as b

TEXT = (Path(__file__).parents[3] / "docs" / "http.md").read_text()
ROWS = re.findall(r"^\| `(mic_\w+)` \|([^|]*)\|", TEXT, re.MULTILINE)


def served() -> dict[str, set[str]]:
    """Metric to labels, as Prometheus names them, of every series that there can be."""
    xid = XidRecord(b.uuid(0), 79, 1, views_of.NOW, XidSeverity.CRITICAL, None)
    on_systemd = views_of.good(xids=(xid,))
    assert on_systemd.snapshot is not None
    runtimes = (RuntimeView("docker"), RuntimeView("systemd"))
    observed = replace(on_systemd.snapshot.observed, runtimes=runtimes)
    on_systemd = replace(on_systemd, snapshot=replace(on_systemd.snapshot, observed=observed))
    found: dict[str, set[str]] = {}
    for published in (views_of.bad(), views_of.waiting(), views_of.claimed(), on_systemd):
        for family in text_string_to_metric_families(Site(published)("/metrics").text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            for sample in family.samples:
                found.setdefault(name, set()).update(set(sample.labels) - {"le"})
    return found


def test_every_metric_is_listed_with_its_labels_and_no_other() -> None:
    listed = {}
    for name, labels in ROWS:
        text = labels.replace("…", "model, backend, mic_instance")
        listed[name] = {label.strip() for label in text.split(",")} - {""}
    assert len(listed) == len(ROWS)
    assert listed == served()


def test_every_path_that_it_names_is_served() -> None:
    paths = Site(views_of.good())("/openapi.json").json()["paths"]
    named = set(re.findall(r"`(/[a-z][\w/{}.]*)`", TEXT)) - {"/openapi.json"}
    assert named <= set(paths)


def test_the_numbers_are_those_of_the_program() -> None:
    assert f"At most {connections.MAX_CONNECTIONS} connections" in TEXT
    assert f"a header {connections.MAX_HEADER // 1024} KiB" in TEXT
    assert stall_limit(10.0) == 3 * 10 + 30
    assert f"reloads every {page._RELOAD} s" in TEXT.replace("\n", " ")
    assert f"asks every {3000 // 1000} s" in TEXT.replace("\n", " ")
    assert "var PERIOD = 3000;" in page._asset("page.js")
    assert HIDDEN in TEXT


def test_the_refusal_reads_as_it_is_shown() -> None:
    answer = Site(views_of.good())("/api/v1/processes/4121", "DELETE")
    assert json.dumps(answer.json(), indent=2) in TEXT
    for verb in ("start", "stop"):
        command = app.command_for(f"/api/v1/models/{verb}")
        assert command is not None and command in TEXT
