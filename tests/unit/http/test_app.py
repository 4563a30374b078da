"""Paths, methods, status codes and caching, asked of the application itself."""

from __future__ import annotations

from dataclasses import replace
from email.utils import formatdate, parsedate_to_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.http.access import Access
from mic_supervisor.http.app import command_for, paths, wants_html
from mic_supervisor.model import GpuInventory, UnopenedGpu
from mic_supervisor.plan.words import Code, because
from mic_supervisor.text import quoted
from tests.unit.http import views_of
from tests.unit.http.ask import Site
from tests.unit.plan import builders as b

DOCUMENTS = (
    "/",
    "/api/v1/status",
    "/api/v1/plan",
    "/api/v1/gpus",
    "/api/v1/models/status",
    "/api/v1/models/status/MAM",
    "/api/v1/models/supported",
    "/api/v1/sd",
    "/api/v1/models/start",
)


@pytest.fixture
def good() -> Site:
    return Site(views_of.good())


def test_a_client_of_the_former_service_gets_the_greeting(good: Site) -> None:
    answer = good("/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document["status"] == "ok"
    assert isinstance(document["message"], str)


def test_a_browser_gets_the_page_at_the_same_address(good: Site) -> None:
    answer = good("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["vary"] == "Accept"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.text.startswith("<!doctype html>")
    assert good("/").headers["vary"] == "Accept"


def test_what_runs_by_name(good: Site) -> None:
    assert [row["gpu_id"] for row in good("/api/v1/models/status/qwen").json()] == [1, 2]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("whisper", "cannot show whisper: it does not run"),
        ("nope", "cannot show nope: the file has no model of this name"),
        ("%E6%A8%A1%E5%9E%8B", "cannot show 模型: the file has no model of this name"),
    ],
)
def test_what_does_not_run_is_not_found(good: Site, name: str, why: str) -> None:
    answer = good(f"/api/v1/models/status/{name}")
    assert (answer.status, answer.json()) == (404, {"detail": why})


def test_a_name_in_any_script_is_found() -> None:
    model = b.on("模型", 0)
    published = views_of.published(
        views_of.snapshot(b.desired(model), b.observed(b.workload(model)))
    )
    answer = Site(published)("/api/v1/models/status/%E6%A8%A1%E5%9E%8B")
    assert [row["model_name"] for row in answer.json()] == ["模型"]
    assert "模型".encode() in answer.body


def test_what_may_run_is_a_map_of_name_to_backend(good: Site) -> None:
    assert good("/api/v1/models/supported").json() == {
        "MAM": "triton",
        "qwen": "vllm",
        "whisper": "process",
    }


@pytest.mark.parametrize(
    ("inventory", "detail"),
    [
        (GpuInventory("none"), "cannot read GPUs: MIC_GPU_SOURCE is none"),
        (GpuInventory("nvml", error="cannot read GPUs: x", hint="y"), "cannot read GPUs: x; y"),
    ],
)
def test_without_nvml_gpus_are_not_implemented(inventory: GpuInventory, detail: str) -> None:
    observed = replace(b.observed(), inventory=inventory)
    site = Site(views_of.published(views_of.snapshot(b.desired(), observed)))
    answer = site("/api/v1/gpus")
    assert (answer.status, answer.json()) == (501, {"detail": detail})
    assert site("/api/v1/status").status == 200


def test_before_the_first_round_nothing_is_made_up() -> None:
    site = Site(views_of.published(None))
    for path in DOCUMENTS:
        answer = site(path)
        if path in ("/", "/api/v1/models/supported", "/api/v1/models/start"):
            assert answer.status == 200, path
        else:
            assert (answer.status, answer.headers["retry-after"]) == (503, "1"), path
    assert (site("/healthz").status, site("/readyz").status) == (503, 503)
    assert site("/healthz").json()["status"] == "starting"
    assert site("/metrics").status == 200
    assert "Observing the machine" in site("/", headers={"Accept": "text/html"}).text


def test_a_document_of_after_the_clock_was_set_back_is_no_old_one(good: Site) -> None:
    first = good("/api/v1/status")
    modified = first.headers["last-modified"]
    assert good("/api/v1/status", headers={"If-Modified-Since": modified}).status == 304
    hour_ahead = formatdate(parsedate_to_datetime(modified).timestamp() + 3600, usegmt=True)
    assert good("/api/v1/status", headers={"If-Modified-Since": hour_ahead}).status == 200


# --- nothing can be changed ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"])
@pytest.mark.parametrize("path", ["/", "/api/v1/status", "/metrics", "/nowhere"])
def test_every_other_method_is_refused(good: Site, method: str, path: str) -> None:
    answer = good(path, method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert answer.json()["command"] == "mic-supervisor apply"


@pytest.mark.parametrize(
    ("method", "path", "command"),
    [
        ("POST", "/api/v1/models/start", "mic-supervisor start MODEL --gpu N"),
        ("POST", "/api/v1/models/stop", "mic-supervisor stop MODEL --gpu N"),
        ("DELETE", "/api/v1/processes/4121", "mic-supervisor kill 4121"),
        ("DELETE", "/api/v1/processes/x", "mic-supervisor kill PID"),
        ("DELETE", "/api/v1/processes/1;reboot", "mic-supervisor kill PID"),
    ],
)
def test_a_refusal_names_the_command(good: Site, method: str, path: str, command: str) -> None:
    answer = good(path, method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.json() == {
        "detail": f"this interface only reads: run `{command}`",
        "command": command,
    }
    # What Allow promises is true: reading tells the same.
    assert good(path).json() == answer.json()
    assert command_for(path) == command


def test_head_is_get_without_a_look_at_the_body(good: Site) -> None:
    for path in (*DOCUMENTS, "/metrics", "/healthz", "/readyz", "/openapi.json"):
        get, head = good(path), good(path, "HEAD")
        if path == "/openapi.json":
            assert get.status == 200
            continue
        assert head.status == get.status, path
        assert head.headers.get("etag") == get.headers.get("etag"), path


def test_what_is_not_there_is_not_found(good: Site) -> None:
    for path in ("/docs", "/redoc", "/api", "/api/v2/gpus", "/..%2f..%2fetc/passwd"):
        assert good(path).status == 404, path


# --- caching --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS)
def test_who_has_it_already_gets_304(good: Site, path: str) -> None:
    first = good(path)
    for headers in (
        {"If-None-Match": first.headers["etag"]},
        {"If-None-Match": f'"other", {first.headers["etag"]}'},
        {"If-None-Match": "*"},
    ):
        again = good(path, headers=headers)
        assert (again.status, again.body) == (304, b""), headers
        assert again.headers["etag"] == first.headers["etag"]
    assert good(path, headers={"If-None-Match": '"other"'}).status == 200


def test_a_date_does_for_clients_that_know_no_tags(good: Site) -> None:
    first = good("/api/v1/status")
    since = {"If-Modified-Since": first.headers["last-modified"]}
    assert good("/api/v1/status", headers=since).status == 304
    for date in ("Sat, 01 Jan 2000 00:00:00 GMT", "nonsense", "Sat, 99 Jan 99999 00:00:00 GMT"):
        assert good("/api/v1/status", headers={"If-Modified-Since": date}).status == 200
    # RFC 9110, 13.1.3: a tag counts for more than a date.
    assert good("/api/v1/status", headers={**since, "If-None-Match": '"x"'}).status == 200


def test_a_round_that_changed_nothing_keeps_the_tag_and_one_that_did_does_not() -> None:
    before = views_of.good()
    assert before.snapshot is not None
    later = replace(before, snapshot=replace(before.snapshot, now=views_of.NOW + 10))
    same = Site(before)("/api/v1/status").headers["etag"]
    assert Site(before, later)("/api/v1/status").headers["etag"] == same
    assert Site(before, views_of.bad())("/api/v1/status").headers["etag"] != same


def test_the_page_and_the_greeting_have_tags_of_their_own(good: Site) -> None:
    page = good("/", headers={"Accept": "text/html"})
    assert page.headers["etag"] != good("/").headers["etag"]


# --- life -----------------------------------------------------------------------------------------


def test_the_loop_is_alive_until_it_has_been_still_for_too_long() -> None:
    clock = views_of.Clock()
    site = Site(views=views_of.views(views_of.good(), stall_after=60, clock=clock))
    clock.now = 59
    assert site("/healthz").json() == {"status": "ok", "detail": None, "age": 59.0}
    assert site("/readyz").status == 200
    clock.now = 75
    answer = site("/healthz")
    assert answer.status == 503
    assert answer.json() == {
        "status": "stalled",
        "detail": "the loop has not finished a round for 75 s",
        "age": 75.0,
    }
    assert site("/readyz").status == 503
    assert site("/api/v1/status").status == 200  # what was seen last may still be read
    page = site("/", headers={"Accept": "text/html"}).text
    assert "What follows is old: the loop has not finished a round for 75 s" in page


def test_a_part_of_the_daemon_that_is_not_alive_is_told_of() -> None:
    down = {"the file watch": "ZeroDivisionError: a defect", "the Xid watch": "it ended"}
    site = Site(replace(views_of.good(), down=down))
    answer = site("/healthz")
    assert answer.status == 503
    assert (answer.json()["status"], answer.json()["detail"]) == (
        "broken",
        "the file watch is not alive; the Xid watch is not alive",
    )
    page = site("/", headers={"Accept": "text/html"}).text
    assert "2 things are not as they should be" in page
    assert "it is not alive: it ended; it is started again" in page
    clock = views_of.Clock()
    still = replace(views_of.good(), down={"the loop": "it ended"})
    site = Site(views=views_of.views(still, stall_after=60, clock=clock))
    clock.now = 75
    assert site("/healthz").json()["status"] == "stalled"
    assert site("/healthz").json()["detail"].endswith("; the loop is not alive")


@pytest.mark.parametrize("readable", [True, False])
def test_nothing_that_another_program_said_is_in_any_answer(readable: bool) -> None:
    said = f"it says {quoted('canary Y2FuYXJ5')} there"
    published = views_of.bad(engine_gone=True)
    snapshot = published.snapshot
    assert snapshot is not None
    observed, plan = snapshot.observed, snapshot.plan
    inventory = replace(
        observed.inventory,
        gpus=tuple(replace(gpu, trouble=said) for gpu in observed.inventory.gpus),
        unopened=(UnopenedGpu(6, said, said),),
        error=None if readable else said,
        hint=said,
    )
    snapshot = replace(
        snapshot,
        statuses=tuple(replace(row, reason=said) for row in snapshot.statuses),
        plan=replace(
            plan,
            warnings=(said,),
            changes=tuple(replace(one, why=because(Code.ENDED, end=said)) for one in plan.changes),
            blocked=tuple(
                replace(one, why=because(Code.BACKOFF, failure=said, hint=said))
                for one in plan.blocked
            ),
        ),
        observed=replace(
            observed,
            inventory=inventory,
            runtimes=tuple(replace(view, error=said, hint=said) for view in observed.runtimes),
        ),
    )
    history = (views_of.event("failed", "a", phase="start", text=said, hint=said),)
    published = replace(published, snapshot=snapshot, history=history, down={"the loop": said})
    site = Site(published)
    for path in [one.path for one in paths(site.views)]:
        for accept in ("text/html", "application/json", "text/plain"):
            assert "canary" not in site(path, headers={"Accept": accept}).text, path
    assert site("/", headers={"Accept": "text/html"}).text.count("it says (hidden) there") > 5


def test_ready_is_when_every_instance_is(good: Site) -> None:
    assert good("/readyz").status == 200
    answer = Site(views_of.bad())("/readyz")
    assert answer.status == 503
    assert len(answer.json()["waiting"]) == 4


def test_every_answer_carries_the_headers_that_keep_it_to_itself(good: Site) -> None:
    for path, method in (("/", "GET"), ("/", "POST"), ("/nowhere", "GET"), ("/metrics", "HEAD")):
        headers = good(path, method).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_names_that_are_not_unicode_break_no_document() -> None:
    """A process may call itself anything; /proc gives what is no UTF-8 as lone surrogates."""
    holder = views_of.holder(7, 1, name="py\udcff")
    observed = b.observed(gpus=(views_of.gpu(0, processes=(holder,)),))
    published = views_of.published(views_of.snapshot(b.desired(), observed))
    site = Site(published)
    for path in ("/api/v1/gpus", "/metrics"):
        assert site(path).status == 200
    assert "py\N{REPLACEMENT CHARACTER}" in site("/", headers={"Accept": "text/html"}).text


def test_the_description_says_when_a_token_is_asked_for(good: Site) -> None:
    assert "securitySchemes" not in good("/openapi.json").json()["components"]
    token = "0123456789abcdef"
    site = Site(views_of.good(), access=Access(token.encode()))
    described = site("/openapi.json", headers={"Authorization": f"Bearer {token}"}).json()
    assert described["components"]["securitySchemes"] == {
        "token": {"type": "http", "scheme": "bearer"}
    }
    assert described["paths"]["/metrics"]["get"]["security"] == [{"token": []}]
    assert described["paths"]["/healthz"]["get"]["security"] == []


# --- a page or a document -----------------------------------------------------------------------

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (CHROMIUM, True),
        ("text/html", True),
        ("TEXT/HTML; charset=utf-8", True),
        ("application/json;q=0.5, text/html", True),
        (None, False),
        ("", False),
        ("*/*", False),
        ("text/*", False),
        ("application/json", False),
        ("application/json, text/html;q=0.9", False),
        ("text/html;q=0", False),
        ("text/html;q=nonsense", False),
        ("application/json, text/plain, */*", False),
    ],
)
def test_only_who_names_html_gets_the_page(accept: str | None, page: bool) -> None:
    assert wants_html(accept) is page


@given(st.text(alphabet="text/html,;q=.01*application json"))
def test_no_header_is_too_strange(accept: str) -> None:
    assert wants_html(accept) in (True, False)
