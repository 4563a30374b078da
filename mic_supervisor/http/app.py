"""The routes: which path answers with which view."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from email.utils import formatdate, parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request, Response

from mic_supervisor import __version__
from mic_supervisor.http import documents, metrics, page, schemas
from mic_supervisor.http.accept import wants_html
from mic_supervisor.http.readonly import UNGUARDED, ReadOnly, command_for, refusal
from mic_supervisor.http.views import JSON, Answer, Views

if TYPE_CHECKING:
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.http.access import Access
    from mic_supervisor.http.published import Published
    from mic_supervisor.http.readonly import App

_HTML = "text/html; charset=utf-8"
_TEXT = "text/plain"
Handler = Callable[..., Awaitable[Any]]


def asgi(views: Views, access: Access) -> App:
    """All that is served, guarded."""
    app: Any = build(views, guarded=access.token is not None)
    return ReadOnly(app, access)


def build(views: Views, *, guarded: bool) -> FastAPI:
    """The application. Handlers run on the server's own loop and wait for nothing."""
    app = FastAPI(
        title="mic-supervisor",
        version=__version__,
        description="What runs on the GPUs of this machine. Read-only: commands change things.",
        docs_url=None,  # its page would load scripts from other hosts
        redoc_url=None,
    )

    def document(
        make: Callable[[Published, Snapshot], Any], name: str
    ) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            if views.current().snapshot is None:
                raise HTTPException(503, "the first round is not done yet", {"Retry-After": "1"})
            made = views.json(name, lambda published: make(published, _snapshot(published)))
            return reply(request, made)

        return answer

    def reply(request: Request, made: Answer, **headers: str) -> Response:
        """200, or 304 where the client has it already (RFC 9110, section 13)."""
        headers = {
            "ETag": made.etag,
            "Last-Modified": formatdate(made.modified, usegmt=True),
            "Cache-Control": "no-cache",
            **headers,
        }
        if _fresh(request, made):
            return Response(status_code=304, headers=headers)
        return Response(made.body, media_type=made.media, headers=headers)

    async def root(request: Request) -> Response:
        if wants_html(request.headers.get("accept")):
            shown = page.serve(views)
            return reply(request, shown, **page.headers(), Vary="Accept")
        message = f"mic-supervisor {__version__} runs; see /api/v1/status"
        made = views.json("root", lambda _published: {"status": "ok", "message": message})
        return reply(request, made, Vary="Accept")

    status_document = document(documents.served_status, "status")
    plan_document = document(documents.served_plan, "plan")
    running_document = document(lambda _, snapshot: documents.running(snapshot), "running")
    endpoints_document = document(documents.served_endpoints, "endpoints")
    discovery_document = document(lambda _, snapshot: documents.discovery(snapshot), "sd")
    gpus_document = document(lambda _, snapshot: documents.gpus(snapshot), "gpus")

    async def status(request: Request) -> Response:
        return status_document(request)

    async def plan(request: Request) -> Response:
        return plan_document(request)

    async def endpoints(request: Request) -> Response:
        return endpoints_document(request)

    async def sd(request: Request) -> Response:
        return discovery_document(request)

    async def gpus(request: Request) -> Response:
        snapshot = views.current().snapshot
        if snapshot is not None:
            trouble = documents.why_no_gpus(snapshot.observed.inventory)
            if trouble is not None:
                raise HTTPException(501, trouble)
        return gpus_document(request)

    async def running(request: Request) -> Response:
        return running_document(request)

    async def running_one(request: Request, model_name: str) -> Response:
        published = views.current()
        snapshot = published.snapshot
        if snapshot is None:
            return running_document(request)
        chosen = [row for row in documents.running(snapshot) if row["model_name"] == model_name]
        if not chosen:
            known = model_name in published.config.models
            why = "it does not run" if known else "the file has no model of this name"
            raise HTTPException(404, f"cannot show {model_name}: {why}")
        # Names come from the client, so these are not kept.
        return reply(request, views.once(chosen))

    async def supported(request: Request) -> Response:
        return reply(request, views.json("supported", lambda seen: dict(seen.config.models)))

    async def command(request: Request) -> Response:
        return reply(request, views.once(refusal(request.url.path)))

    async def command_of(request: Request, pid: str) -> Response:
        return reply(request, views.once(refusal(f"/api/v1/processes/{pid}")))

    async def healthz() -> Response:
        stalled, down = views.stalled(), views.down()
        state = "ok" if down is None else "broken"
        if stalled is not None:
            state = "starting" if views.current().snapshot is None else "stalled"
        detail = "; ".join(text for text in (stalled, down) if text is not None) or None
        body = {"status": state, "detail": detail, "age": round(views.age(), 3)}
        return _live(body, 200 if detail is None else 503)

    async def readyz() -> Response:
        body = documents.readiness(views.current(), views.stalled())
        return _live(body, 200 if body["status"] == "ready" else 503)

    async def metrics_text(request: Request) -> Response:
        made = metrics.render(views, request.headers.get("accept", ""))
        headers = {"Cache-Control": "no-store", "Vary": "Accept"}
        return Response(made.body, media_type=made.media, headers=headers)

    add = _Adder(app)
    html = {_HTML.partition(";")[0]: {"schema": {"type": "string"}}}
    add("/", root, "The page for a browser, else that the daemon is there", schemas.Root, also=html)
    unread = {503: "nothing was read yet"}
    add("/api/v1/status", status, "Desired against actual", schemas.Status, unread)
    add("/api/v1/plan", plan, "What is still out of sync, and why", schemas.Plan, unread)
    add(
        "/api/v1/gpus",
        gpus,
        "Memory, power and holders of each GPU",
        schemas.Gpus,
        {501: "there is no NVML", **unread},
    )
    add("/api/v1/models/status", running, "What runs, and where", schemas.RunningModels, unread)
    add(
        "/api/v1/models/status/{model_name}",
        running_one,
        "Where one model runs",
        schemas.RunningModels,
        {404: "it does not run", **unread},
    )
    add("/api/v1/models/supported", supported, "What may run", schemas.SupportedModels)
    for path in ("/api/v1/models/start", "/api/v1/models/stop"):
        add(path, command, f"The command for it: {command_for(path)}", schemas.Refusal)
    add("/api/v1/processes/{pid}", command_of, "The command that ends it", schemas.Refusal)
    add("/api/v1/endpoints", endpoints, "Who serves each model", schemas.ServedBy, unread)
    add("/api/v1/sd", sd, "Prometheus HTTP service discovery", schemas.Targets, unread)
    add("/healthz", healthz, "Whether the daemon lives", schemas.Liveness, {503: schemas.Liveness})
    add(
        "/readyz",
        readyz,
        "Whether every instance is as the file says",
        schemas.Readiness,
        {503: schemas.Readiness},
    )
    add("/metrics", metrics_text, "Metrics for Prometheus", None)
    if guarded:
        _declare_token(app)
    return app


def _snapshot(published: Published) -> Snapshot:
    assert published.snapshot is not None  # asked before
    return published.snapshot


def _live(body: dict[str, Any], status: int) -> Response:
    return Response(
        json.dumps(body, ensure_ascii=False).encode("utf-8", errors="replace"),
        status_code=status,
        media_type=JSON,
        headers={"Cache-Control": "no-store"},
    )


def _fresh(request: Request, made: Answer) -> bool:
    given = request.headers.get("if-none-match")
    if given is not None:
        tags = [tag.strip() for tag in given.split(",")]
        return "*" in tags or any(tag.removeprefix("W/") == made.etag[2:] for tag in tags)
    since = request.headers.get("if-modified-since")
    if since is None:
        return False
    try:
        return int(made.modified) == parsedate_to_datetime(since).timestamp()
    except (ValueError, OverflowError):
        return False  # RFC 9110, 13.1.3: an invalid date is ignored


class _Adder:
    """Registers a path for GET and for HEAD, and describes both truly."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def __call__(
        self,
        path: str,
        handler: Handler,
        summary: str,
        model: Any,
        errors: dict[int, Any] | None = None,
        also: dict[str, Any] | None = None,
    ) -> None:
        ok: dict[str, Any] = {"description": summary}
        if model is None:
            ok["content"] = {_TEXT: {"schema": {"type": "string"}}}
        else:
            ok["model"] = model
        if also is not None:
            ok["content"] = also
        conditional = path not in ("/healthz", "/readyz", "/metrics")
        responses: dict[int | str, dict[str, Any]] = {200: ok}
        if conditional:
            responses[304] = {"description": "The client has it already"}
        for code, what in (errors or {}).items():
            described = isinstance(what, str)
            responses[code] = {
                "description": what if described else "It is not",
                "model": schemas.Problem if described else what,
            }
        name = re.sub(r"\W+", "_", path).strip("_") or "root"
        bare = {
            code: {"description": response["description"]} for code, response in responses.items()
        }
        for method, shown in (("GET", responses), ("HEAD", bare)):
            self._app.add_api_route(
                path,
                handler,
                methods=[method],
                summary=summary,
                operation_id=f"{method.lower()}_{name}",
                responses=shown,
                response_class=Response,
                response_model=None,
            )


def _declare_token(app: FastAPI) -> None:
    """Say in the description that a bearer token is asked for, and where not."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {
            "token": {"type": "http", "scheme": "bearer"}
        }
        for path, item in document["paths"].items():
            for operation in item.values():
                operation["security"] = [] if path in UNGUARDED else [{"token": []}]
                if path not in UNGUARDED:
                    operation["responses"]["401"] = {"description": "The token is missing or wrong"}
        return document

    app.openapi = described  # type: ignore[method-assign]
