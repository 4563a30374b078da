"""The routes: which path answers with which view."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from email.utils import formatdate, parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mic_supervisor import __version__
from mic_supervisor.http import documents, metrics, page
from mic_supervisor.http.access import wants_html
from mic_supervisor.http.documents import LivenessStatus
from mic_supervisor.http.openapi import Served, describe
from mic_supervisor.http.readonly import UNGUARDED, ReadOnly, command_for, refusal
from mic_supervisor.http.views import JSON, Answer, Views, encode
from mic_supervisor.views.endpoints import EndpointsDocument
from mic_supervisor.views.plan import PlanDocument
from mic_supervisor.views.status import StatusDocument

if TYPE_CHECKING:
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.http.access import Access
    from mic_supervisor.http.published import Published

_UNREAD = {503: "nothing was read yet"}
Handler = Callable[..., Awaitable[Response]]


def asgi(views: Views, access: Access) -> ReadOnly:
    """All that is served, guarded."""
    return ReadOnly(build(views, guarded=access.token is not None), access)


def build(views: Views, *, guarded: bool) -> Starlette:
    """The application. Who may ask is decided in readonly.py, before anything else is looked at."""
    served = paths(views)

    @cache  # seldom asked, and schemas take memory: made for who asks first
    def description() -> bytes:
        return encode(describe(served, UNGUARDED if guarded else None))

    async def openapi(_request: Request) -> Response:
        return Response(description(), media_type=JSON)

    app = Starlette(
        routes=[*(Route(one.path, one.handler) for one in served), Route("/openapi.json", openapi)],
        exception_handlers={HTTPException: _problem},
    )
    app.router.redirect_slashes = False  # to whatever host the request names
    return app


def paths(views: Views) -> list[Served]:
    """All that is served of a machine. Handlers run on the server's loop and wait for nothing."""

    def document(name: str, make: Callable[[Published, Snapshot], Any]) -> Handler:
        def made_from(published: Published) -> Any:
            assert published.snapshot is not None  # asked before
            return make(published, published.snapshot)

        async def answer(request: Request) -> Response:
            if views.current().snapshot is None:
                raise HTTPException(503, "the first round is not done yet", {"Retry-After": "1"})
            return _reply(request, views.json(name, made_from))

        return answer

    async def root(request: Request) -> Response:
        if wants_html(request.headers.get("accept")):
            return _reply(request, page.serve(views), **page.headers(), Vary="Accept")
        message = f"mic-supervisor {__version__} runs; see /api/v1/status"
        made = views.json("root", lambda _published: documents.Root("ok", message))
        return _reply(request, made, Vary="Accept")

    gpus_document = document("gpus", lambda _, snapshot: documents.gpus(snapshot))
    running = document("running", lambda _, snapshot: documents.running(snapshot))

    async def gpus(request: Request) -> Response:
        snapshot = views.current().snapshot
        if snapshot is not None:
            trouble = snapshot.observed.inventory.unreadable
            if trouble is not None:
                raise HTTPException(501, trouble)
        return await gpus_document(request)

    async def running_one(request: Request) -> Response:
        model_name = request.path_params["model_name"]
        published = views.current()
        snapshot = published.snapshot
        if snapshot is None:
            return await running(request)
        chosen = [row for row in documents.running(snapshot) if row.model_name == model_name]
        if not chosen:
            known = model_name in published.config.models
            why = "it does not run" if known else "the file has no model of this name"
            raise HTTPException(404, f"cannot show {model_name}: {why}")
        # Names come from the client, so these are not kept.
        return _reply(request, views.once(chosen))

    async def supported(request: Request) -> Response:
        return _reply(request, views.json("supported", lambda seen: dict(seen.config.models)))

    async def command(request: Request) -> Response:
        return _reply(request, views.once(refusal(request.url.path)))

    async def healthz(_request: Request) -> Response:
        stalled, down = views.stalled(), views.down()
        state: LivenessStatus = "ok" if down is None else "broken"
        if stalled is not None:
            state = "starting" if views.current().snapshot is None else "stalled"
        detail = "; ".join(text for text in (stalled, down) if text is not None) or None
        body = documents.Liveness(state, detail, round(views.age(), 3))
        return _live(body, 200 if detail is None else 503)

    async def readyz(_request: Request) -> Response:
        body = documents.readiness(views.current(), views.stalled())
        return _live(body, 200 if body["status"] == "ready" else 503)

    async def metrics_text(request: Request) -> Response:
        made = metrics.render(views, request.headers.get("accept", ""))
        headers = {"Cache-Control": "no-store", "Vary": "Accept"}
        return Response(made.body, media_type=made.media, headers=headers)

    models = list[documents.RunningModel]
    return [
        Served("/", root, "The page for a browser, else that the daemon is there", documents.Root),
        Served(
            "/api/v1/status",
            document("status", documents.served_status),
            "Desired against actual",
            StatusDocument,
            _UNREAD,
        ),
        Served(
            "/api/v1/plan",
            document("plan", documents.served_plan),
            "What is still out of sync, and why",
            PlanDocument,
            _UNREAD,
        ),
        Served(
            "/api/v1/gpus",
            gpus,
            "Memory, power and holders of each GPU",
            list[documents.GpuUse],
            {501: "there is no NVML", **_UNREAD},
        ),
        Served("/api/v1/models/status", running, "What runs, and where", models, _UNREAD),
        Served(
            "/api/v1/models/status/{model_name}",
            running_one,
            "Where one model runs",
            models,
            {404: "it does not run", **_UNREAD},
        ),
        Served(
            "/api/v1/models/supported", supported, "The backend of what may run", dict[str, str]
        ),
        *(
            Served(path, command, f"The command for it: {command_for(path)}", documents.Refusal)
            for path in ("/api/v1/models/start", "/api/v1/models/stop")
        ),
        Served("/api/v1/processes/{pid}", command, "The command that ends it", documents.Refusal),
        Served(
            "/api/v1/endpoints",
            document("endpoints", documents.served_endpoints),
            "Who serves each model",
            EndpointsDocument,
            _UNREAD,
        ),
        Served(
            "/api/v1/sd",
            document("sd", lambda _, snapshot: documents.discovery(snapshot)),
            "Prometheus HTTP service discovery",
            list[documents.Target],
            _UNREAD,
        ),
        Served(
            "/healthz",
            healthz,
            "Whether the daemon lives",
            documents.Liveness,
            {503: documents.Liveness},
        ),
        Served(
            "/readyz",
            readyz,
            "Whether every instance is as the file says",
            documents.Readiness,
            {503: documents.Readiness},
        ),
        Served("/metrics", metrics_text, "Metrics for Prometheus"),
    ]


async def _problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # what this handler is registered for
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


def _reply(request: Request, made: Answer, **headers: str) -> Response:
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


def _live(document: Any, status: int) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(encode(document), status, headers, media_type=JSON)


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
