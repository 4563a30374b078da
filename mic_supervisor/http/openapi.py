"""/openapi.json (OpenAPI 3.1), made of the paths that are served and of their documents' types."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from mic_supervisor import __version__
from mic_supervisor.http.documents import Problem

_DESCRIPTION = "What runs on the GPUs of this machine. Read-only: commands change things."
_UNCACHED = ("/healthz", "/readyz", "/metrics")  # always sent whole, so never a 304
_TEXT = {"schema": {"type": "string"}}


@dataclass(frozen=True, slots=True)
class Served:
    """One path, for GET and HEAD.

    `shape` is the type of its document; without one it is text. `errors` are the other answers by
    their status: a sentence, with a Problem as the document, or the type of the document.
    """

    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    shape: Any = None
    errors: Mapping[int, Any] = field(default_factory=dict)


def describe(served: Collection[Served], unguarded: Collection[str] | None) -> dict[str, Any]:
    """The document. `unguarded` are the paths without a token; None: nothing asks for one."""
    shapes = _shapes(served)
    paths = {
        one.path: {method: _operation(one, method, shapes, unguarded) for method in ("get", "head")}
        for one in served
    }
    components: dict[str, Any] = {"schemas": shapes.definitions}
    if unguarded is not None:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    info = {"title": "mic-supervisor", "version": __version__, "description": _DESCRIPTION}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


@dataclass(frozen=True, slots=True)
class _Shapes:
    """JSON schemas by the path and the status that they are the answer of."""

    schemas: Mapping[tuple[str, int], Any]
    definitions: Mapping[str, Any]

    def content(self, path: str, status: int) -> dict[str, Any]:
        return {"application/json": {"schema": self.schemas[path, status]}}


def _shapes(served: Collection[Served]) -> _Shapes:
    answers = {(one.path, 200): one.shape for one in served if one.shape is not None}
    answers |= {
        (one.path, status): Problem if isinstance(shape, str) else shape
        for one in served
        for status, shape in one.errors.items()
    }
    schemas, document = TypeAdapter.json_schemas(
        [(key, "serialization", TypeAdapter(shape)) for key, shape in answers.items()],
        ref_template="#/components/schemas/{model}",
    )
    return _Shapes({key: schema for (key, _), schema in schemas.items()}, document["$defs"])


def _operation(
    one: Served, method: str, shapes: _Shapes, unguarded: Collection[str] | None
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": one.summary}}
    if method == "get":
        json = {} if one.shape is None else shapes.content(one.path, 200)
        text = {} if one.path != "/" else {"text/html": _TEXT}
        responses["200"]["content"] = {**json, **text} or {"text/plain": _TEXT}
    for status, shape in one.errors.items():
        answer = responses[str(status)] = {
            "description": shape if isinstance(shape, str) else "It is not"
        }
        if method == "get":
            answer["content"] = shapes.content(one.path, status)
    if one.path not in _UNCACHED:
        responses["304"] = {"description": "The client has it already"}
    name = re.sub(r"\W+", "_", one.path).strip("_") or "root"
    operation = {
        "operationId": f"{method}_{name}",
        "summary": one.summary,
        "parameters": [
            {"name": key, "in": "path", "required": True, "schema": {"type": "string"}}
            for key in re.findall(r"\{(\w+)\}", one.path)
        ],
        "responses": responses,
    }
    if unguarded is not None:
        operation["security"] = [] if one.path in unguarded else [{"token": []}]
        if one.path not in unguarded:
            responses["401"] = {"description": "The token is missing or wrong"}
    return operation
