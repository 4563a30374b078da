"""The page at `/`: is everything as it should be, and if not, what and since when.

It is complete as it is sent. The script fetches it again and swaps what changed; without one the
browser reloads it. Nothing comes from another host, and nothing inline runs but what is hashed.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mic_supervisor.http import documents
from mic_supervisor.http.markup import Markup, at, for_how_long, join, tag
from mic_supervisor.http.redact import Scrubber, config_error
from mic_supervisor.http.tiles import Context, icon, tile, unopened_tile
from mic_supervisor.http.verdict import Level, Problem, Verdict, judge
from mic_supervisor.plan.render import gpu_names, reason
from mic_supervisor.plan.status import InstanceStatus, by_model
from mic_supervisor.views.status import gpu_rows

if TYPE_CHECKING:
    from mic_supervisor.converge.events import Event
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.http.published import Published
    from mic_supervisor.http.views import Answer, Views

MEDIA = "text/html; charset=utf-8"
_EVENTS = 12
_RELOAD = "10"  # seconds, where there is no script
_COLOURS = {
    Level.GOOD: "#1a7f4b",
    Level.BUSY: "#8a6100",
    Level.BAD: "#b3261e",
    Level.UNKNOWN: "#5b6470",
}


def serve(views: Views) -> Answer:
    """The page, made once per round, and once more when the loop stalls."""
    stalled = views.stalled()

    def make(published: Published) -> tuple[bytes, bytes]:
        verdict = judge(published, stalled, views.firsts)
        body = render(published, verdict, views).encode("utf-8", errors="replace")
        return body, body

    return views.answer("page" if stalled is None else "page, stalled", MEDIA, make)


@cache
def _asset(name: str) -> Markup:
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))


@cache
def headers() -> dict[str, str]:
    """What keeps the page to itself, whatever a name or a reason in it holds."""
    return {
        "Content-Security-Policy": "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash('page.js')}",
                f"style-src {_hash('page.css')}",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        )
    }


def _hash(name: str) -> str:
    digest = hashlib.sha256(_asset(name).encode()).digest()
    return f"'sha256-{b64encode(digest).decode()}'"


def render(published: Published, verdict: Verdict, views: Views) -> str:
    snapshot, now = published.snapshot, views.now()
    scrubber = Scrubber(snapshot.desired if snapshot is not None else None)
    indices = {gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus} if snapshot else {}
    context = Context(now, indices, scrubber)
    main = [_verdict(verdict, context, snapshot)]
    if snapshot is not None:
        main += [_gpus(snapshot, views, context), _plan(snapshot, context)]
    main += [_configuration(published, context), _history(published, context)]
    return "<!doctype html>\n" + tag(
        "html",
        _head(published, verdict),
        tag(
            "body",
            tag(
                "header",
                tag("h1", published.host),
                tag("p", "models on GPUs, kept by mic-supervisor"),
            ),
            tag("p", "", id="lost", role="alert", hidden=True),
            tag("main", *main, id="main"),
            _footer(published, snapshot, context),
            tag("p", "", id="said", class_="unseen", role="status", aria_live="polite"),
            tag("script", _asset("page.js")),
        ),
        lang="en",
        data_now=f"{now:.0f}",
    )


def _head(published: Published, verdict: Verdict) -> Markup:
    colour = _COLOURS[verdict.level]
    dot = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>"
        f"<circle cx='8' cy='8' r='7' fill='{colour}'/></svg>"
    )
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="robots", content="noindex"),
        tag("title", f"{verdict.sentence} · {published.host}"),
        tag("link", rel="icon", href=f"data:image/svg+xml,{quote(dot)}", id="favicon"),
        tag("noscript", tag("meta", http_equiv="refresh", content=_RELOAD)),
        tag("style", _asset("page.css")),
    )


def _verdict(verdict: Verdict, context: Context, snapshot: Snapshot | None) -> Markup:
    below = None
    if snapshot is not None and verdict.level is Level.GOOD and snapshot.statuses:
        unprobed = sum(row.phase.value == "unprobed" for row in snapshot.statuses)
        ready = len(snapshot.statuses) - unprobed
        text = f"{ready} ready" if ready else ""
        if unprobed:
            text = f"{text}, " if text else ""
            text += f"{unprobed} running without a probe"
        below = tag("p", text)
    return tag(
        "section",
        tag("h2", icon(verdict.level), tag("span", verdict.sentence), id="verdict-title"),
        below,
        tag("ul", *(_problem(item, context) for item in verdict.problems), class_="problems")
        if verdict.problems
        else None,
        id="verdict",
        class_=f"verdict {verdict.level.name.lower()}",
        aria_labelledby="verdict-title",
    )


def _problem(problem: Problem, context: Context) -> Markup:
    times: list[str] = []
    if problem.since is not None:
        times.append(for_how_long(problem.since, context.now))
    if problem.next_try is not None:
        times.append(join("next try at ", at(problem.next_try, context.now)))
    return tag(
        "li",
        icon(problem.level),
        tag(
            "div",
            tag("p", tag("strong", problem.subject), " ", problem.text),
            tag("p", *_spaced(times, " · "), class_="times") if times else None,
            tag("p", problem.hint, class_="hint") if problem.hint else None,
        ),
    )


def _spaced(items: list[str], between: str) -> list[str]:
    return [part for item in items for part in (between, item)][1:]


def _gpus(snapshot: Snapshot, views: Views, context: Context) -> Markup:
    there = {gpu.uuid: gpu for gpu in snapshot.observed.inventory.gpus}
    tiles = [
        tile(
            state,
            there.get(state.uuid),
            _on(state.uuid, snapshot),
            views.samples.of(state.uuid),
            context,
        )
        for state in gpu_rows(snapshot.desired, snapshot.observed)
    ]
    tiles += [unopened_tile(gpu) for gpu in snapshot.observed.inventory.unopened]
    nothing = documents.why_no_gpus(snapshot.observed.inventory) or "This machine has no GPU."
    return tag(
        "section",
        tag("h2", "GPUs", id="gpus-title"),
        tag("ul", *tiles, class_="tiles") if tiles else tag("p", nothing),
        id="gpus",
        aria_labelledby="gpus-title",
    )


def _on(uuid: str, snapshot: Snapshot) -> list[InstanceStatus]:
    """What is on a GPU: of a server of several models those there, or itself, if none is."""
    rows = [row for row in snapshot.statuses if uuid in row.gpus]
    return [one for row in rows for one in [o for o in by_model(row) if uuid in o.gpus] or [row]]


def _plan(snapshot: Snapshot, context: Context) -> Markup:
    plan = snapshot.plan
    due = [change for change in plan.changes if change.kind != "adopt"]
    items = [
        tag(
            "li",
            tag("strong", f"{change.kind} {change.instance}"),
            f" ({gpu_names(change.gpus, context.indices)}): ",
            context.scrubber.text(change.cause),
            f"; waits for {context.scrubber.text(change.waits)}" if change.waits else None,
        )
        for change in due
    ]
    items += [
        tag(
            "li",
            tag("strong", f"blocked {item.instance}"),
            f": {context.scrubber.text(reason(item))}",
        )
        for item in plan.blocked
    ]
    notes = [tag("li", context.scrubber.text(text)) for text in plan.warnings]
    return tag(
        "section",
        tag("h2", "Pending changes", id="plan-title"),
        tag("ul", *items) if items else tag("p", "None: what runs is what the file says."),
        tag("h3", "Notes") if notes else None,
        tag("ul", *notes) if notes else None,
        id="plan",
        aria_labelledby="plan-title",
    )


def _configuration(published: Published, context: Context) -> Markup:
    config = published.config
    loaded = at(config.loaded_at, context.now) if config.loaded_at is not None else None
    facts: list[tuple[str, str]] = [("File", tag("code", config.path))]
    if config.generation:
        facts.append(("Running", join(f"generation {config.generation}, loaded at ", loaded)))
        facts.append(("Hash", tag("code", config.hash[:12])))
    else:
        facts.append(("Running", "no configuration was accepted yet"))
    error = None
    if config.error is not None:
        since = for_how_long(config.error_at, context.now) if config.error_at is not None else None
        error = tag(
            "div",
            tag("p", icon(Level.BAD), "The file has errors and is not used ", since),
            # A box that scrolls has to be reachable by keyboard.
            tag("pre", config_error(config.error), tabindex="0", aria_label="Errors of the file"),
            class_="error",
        )
    return tag(
        "section",
        tag("h2", "Configuration", id="config-title"),
        error,
        tag(
            "dl",
            *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts),
            class_="facts",
        ),
        id="config",
        aria_labelledby="config-title",
    )


def _history(published: Published, context: Context) -> Markup:
    events = [_event(event, context) for event in published.history[:_EVENTS]]
    return tag(
        "section",
        tag("h2", "Last changes", id="history-title"),
        tag("ol", *events, class_="events") if events else tag("p", "None yet."),
        id="history",
        aria_labelledby="history-title",
    )


def _event(event: Event, context: Context) -> Markup:
    if event.kind == "phase":
        what = f"{event.was} to {event.phase}" if event.was else f"{event.phase}"
        what = what.replace("_", " ")
    elif event.kind == "failed":
        what = f"{event.phase} failed"
    elif event.kind in ("config", "adopt", "pause"):
        what = ""
    else:
        what = f"{event.phase} {'begins' if event.kind == 'begin' else event.kind}"
    text = context.scrubber.text(event.text)
    # A rejected file's report shows its lines; the first says enough, and the place is above.
    text = (config_error(text) or "").split("\n", 1)[0] if event.kind == "config" else text
    return tag(
        "li",
        at(event.at, context.now),
        " ",
        tag("strong", event.instance),
        " ",
        what,
        ": " if what and text else None,
        text,
        class_="bad" if event.kind == "failed" else None,
    )


def _footer(published: Published, snapshot: Snapshot | None, context: Context) -> Markup:
    looked = join("As of ", at(snapshot.at, context.now), " · ") if snapshot is not None else None
    links = (
        ("/api/v1/status", "status"),
        ("/api/v1/plan", "plan"),
        ("/metrics", "metrics"),
        ("/openapi.json", "API"),
    )
    return tag(
        "footer",
        tag("p", looked, f"mic-supervisor {published.version}", id="asof"),
        tag(
            "nav",
            *_spaced([tag("a", text, href=path) for path, text in links], " "),
            aria_label="The same for programs",
        ),
    )
