"""/openapi.json: what it says is served, and that the documents have the shapes it gives them.

Generated requests against a running server are in tests/integration/test_http_schema.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from mic_supervisor.http import schemas
from mic_supervisor.http.published import Published
from tests.unit.http import views_of
from tests.unit.http.ask import Site


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/", schemas.Root),
        ("/api/v1/status", schemas.Status),
        ("/api/v1/plan", schemas.Plan),
        ("/api/v1/gpus", schemas.Gpus),
        ("/api/v1/models/status", schemas.RunningModels),
        ("/api/v1/models/supported", schemas.SupportedModels),
        ("/api/v1/sd", schemas.Targets),
        ("/healthz", schemas.Liveness),
        ("/readyz", schemas.Readiness),
    ],
)
@pytest.mark.parametrize("published", [views_of.good(), views_of.bad()], ids=["good", "bad"])
def test_documents_have_the_shape_that_is_described(
    path: str, shape: type[BaseModel], published: Published
) -> None:
    """Served documents may say more than the shapes do; each member that they name is there."""
    document: Any = Site(published)(path).json()
    read = shape.model_validate(document, strict=True).model_dump(mode="json")
    assert read == document


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
