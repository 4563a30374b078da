"""The routes: which path answers with which view, and what is answered before there is a view.

Nothing can be changed over HTTP: every other method is told which command does it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from email.utils import formatdate, parsedate_to_datetime
from functools import cache
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mic_supervisor import __version__
from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.http import documents, metrics, page
from mic_supervisor.http.access import Access
from mic_supervisor.http.documents import LivenessStatus, Problem, Published, Refusal
from mic_supervisor.http.openapi import Served, describe
from mic_supervisor.http.views import JSON, Answer, Views, encode
from mic_supervisor.views.endpoints import EndpointsDocument
from mic_supervisor.views.endpoints import document as document_of
from mic_supervisor.views.plan import PlanDocument
from mic_supervisor.views.status import StatusDocument

_UNREAD = {503: "nothing was read yet"}
Handler = Callable[..., Awaitable[Response]]

ALLOWED = ("GET", "HEAD")
UNGUARDED = frozenset({"/healthz"})  # says nothing but whether the loop lives

# What the former service did over HTTP, and the command that does it now.
COMMANDS = (
    (re.compile(r"/api/v1/models/start/?"), "mic-supervisor start MODEL --gpu N"),
    (re.compile(r"/api/v1/models/stop/?"), "mic-supervisor stop MODEL --gpu N"),
    (re.compile(r"/api/v1/processes/(?P<pid>[0-9]{1,10})/?"), "mic-supervisor kill {pid}"),
    (re.compile(r"/api/v1/processes(/.*)?"), "mic-supervisor kill PID"),
)
OTHERWISE = "mic-supervisor apply"
_LONGEST_NAME = 255  # characters of a name that is refused

HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))

# For a browser that wants a page, and a program that wants a document.
_DOCUMENT = ("application/json", "application/*")
_PAGE = ("text/html", "application/xhtml+xml")


def asgi(views: Views, access: Access) -> ReadOnly:
    """All that is served, guarded."""
    return ReadOnly(build(views, guarded=access.token is not None), access)


def build(views: Views, *, guarded: bool) -> Starlette:
    """The application. Who may ask is decided by ReadOnly, before anything else is looked at."""
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
        published = views.current()
        if published.snapshot is not None:
            unreadable = published.snapshot.observed.inventory.unreadable
            if unreadable is not None:
                raise HTTPException(501, published.scrubber.text(unreadable))
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
            document(
                "endpoints",
                lambda one, latest: document_of(latest.endpoints, one.host, latest.statuses),
            ),
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


# --- what is refused before it is looked at -----------------------------------------------------


def command_for(path: str) -> str | None:
    """The command line that does what a request to this path once did, None where none did."""
    for pattern, command in COMMANDS:
        match = pattern.fullmatch(path)
        if match is not None:
            return command.format(**match.groupdict())
    return None


def refusal(path: str) -> Refusal:
    command = command_for(path)
    if command is None:
        return Refusal(
            f"this interface only reads: edit gpus.yaml and run `{OTHERWISE}`", OTHERWISE
        )
    return Refusal(f"this interface only reads: run `{command}`", command)


class ReadOnly:
    """Answers what is not allowed before it reaches the application; reads no body for it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        path, headers = scope["path"], Headers(scope=scope)
        document: Problem | Refusal
        extra: dict[str, str] = {}
        if path not in UNGUARDED and not self._access.answers_to(headers.get("host")):
            name = headers["host"][:_LONGEST_NAME]
            document = Problem(f"{name} is no name of this machine: add it to MIC_HTTP_HOSTS")
            status = 421
        elif path not in UNGUARDED and not self._access.admits(headers.get("authorization")):
            document = Problem("send the token of MIC_HTTP_TOKEN_FILE as a bearer token")
            status, extra = 401, {"WWW-Authenticate": 'Bearer realm="mic-supervisor"'}
        elif scope["method"] not in ALLOWED:
            document = refusal(path)
            status, extra = 405, {"Allow": ", ".join(ALLOWED)}
        else:
            await self._app(scope, receive, send_with_headers)
            return
        answer = JSONResponse(asdict(document), status, {"Cache-Control": "no-store", **extra})
        await answer(scope, receive, send_with_headers)


# --- a page or a document -----------------------------------------------------------------------


def wants_html(accept: str | None) -> bool:
    """Only who names HTML gets it, and only if it is not liked less than JSON.

    `*/*` is what curl, requests and the clients of the former service send: they get JSON.
    """
    weights: dict[str, float] = {}
    for part in (accept or "").split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights[media] = _weight(parameters)
    html = max((weights[media] for media in _PAGE if media in weights), default=0.0)
    document = max((weights[media] for media in _DOCUMENT if media in weights), default=0.0)
    return html > 0 and html >= document


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
