"""/openapi.json: what it says is served, and that the documents have the shapes it gives them.

Generated requests against a running server are in tests/integration/test_http_schema.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from mic_supervisor.http import documents
from mic_supervisor.http.documents import Published
from mic_supervisor.views.endpoints import EndpointsDocument
from mic_supervisor.views.plan import PlanDocument
from mic_supervisor.views.status import StatusDocument
from tests.unit.http import views_of
from tests.unit.http.ask import Site


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/", documents.Root),
        ("/api/v1/status", StatusDocument),
        ("/api/v1/plan", PlanDocument),
        ("/api/v1/gpus", list[documents.GpuUse]),
        ("/api/v1/models/status", list[documents.RunningModel]),
        ("/api/v1/models/supported", dict[str, str]),
        ("/api/v1/endpoints", EndpointsDocument),
        ("/api/v1/sd", list[documents.Target]),
        ("/healthz", documents.Liveness),
        ("/readyz", documents.Readiness),
    ],
)
@pytest.mark.parametrize("published", [views_of.good(), views_of.bad()], ids=["good", "bad"])
def test_documents_hold_what_their_shape_says_and_nothing_else(
    path: str, shape: Any, published: Published
) -> None:
    """Data classes do not check what they are given, and redacting works on plain documents."""
    told = Site(published)(path)
    adapter = TypeAdapter(shape)
    read = adapter.dump_python(adapter.validate_json(told.body, strict=True), mode="json")
    assert read == told.json()


def test_every_path_that_is_served_is_described() -> None:
    paths = Site(views_of.good())("/openapi.json").json()["paths"]
    assert sorted(paths) == [
        "/",
        "/api/v1/endpoints",
        "/api/v1/gpus",
        "/api/v1/models/start",
        "/api/v1/models/status",
        "/api/v1/models/status/{model_name}",
        "/api/v1/models/stop",
        "/api/v1/models/supported",
        "/api/v1/plan",
        "/api/v1/processes/{pid}",
        "/api/v1/sd",
        "/api/v1/status",
        "/healthz",
        "/metrics",
        "/readyz",
    ]
    assert {tuple(sorted(item)) for item in paths.values()} == {("get", "head")}
