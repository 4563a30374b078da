"""The page at `/`: is everything as it should be, and if not, what and since when.

`page.html.j2` is the page; this prepares what it shows. It is complete as it is sent. The script
fetches it again and swaps what changed; without one the browser reloads it. Nothing comes from
another host, and nothing inline runs but what is hashed.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mic_supervisor.clocks import local
from mic_supervisor.config.names import shown_id
from mic_supervisor.converge.events import Event
from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.http.access import Scrubber
from mic_supervisor.http.documents import Published
from mic_supervisor.http.verdict import Level, Verdict, level_of, overall_verdict
from mic_supervisor.http.views import Answer, Sample, Views
from mic_supervisor.model import Gpu, OwnerKind
from mic_supervisor.plan.status import InstanceStatus, by_model
from mic_supervisor.plan.words import beside, gpu_names
from mic_supervisor.views.plan import reason
from mic_supervisor.views.status import ClaimEntry, GpuState, Holder, StatusGpu, claims, gpu_rows

if TYPE_CHECKING:
    from jinja2 import Template

MEDIA = "text/html; charset=utf-8"
_EVENTS = 12
_MOST_HOLDERS = 8
_RELOAD = "10"  # seconds, where there is no script
_GIB = 1 << 30
_WIDTH, _HEIGHT, _PAD = 120, 24, 2  # of a sparkline

_COLOURS = {
    Level.GOOD: "#1a7f4b",
    Level.BUSY: "#8a6100",
    Level.BAD: "#b3261e",
    Level.UNKNOWN: "#5b6470",
}
_SIGNS = {Level.GOOD: "✓", Level.BUSY: "…", Level.BAD: "!", Level.UNKNOWN: "?", None: "–"}

# What a GPU without an instance is, in a word and in a sentence.
_STATES: dict[GpuState, tuple[Level | None, str, str]] = {
    "idle": (None, "not in the file", "The file does not list it; it is left alone."),
    "unmanaged": (None, "not in the file", "Others use it; it is left alone."),
    "kept_empty": (Level.GOOD, "kept empty", "The file keeps it empty, and it is."),
    "fleet": (Level.GOOD, "handed over", "The file hands it over, and nobody claims it."),
    "foreign": (
        Level.BAD,
        "kept empty",
        "The file keeps it empty, and a foreign process is on it.",
    ),
    "unhealthy": (Level.BAD, "unhealthy", "The driver says that it needs help."),
    "lost": (Level.BAD, "not there", "The file names it, and the driver does not know it."),
    "unknown": (Level.UNKNOWN, "unknown", "Its holders cannot be read."),
    "managed": (Level.BUSY, "waiting", "Nothing runs on it yet."),
}


def serve(views: Views) -> Answer:
    """The page, made once per round, and once more when the loop stalls."""
    stalled = views.stalled()

    def make(published: Published) -> tuple[bytes, bytes]:
        verdict = overall_verdict(published, stalled, views.firsts)
        body = render(published, verdict, views).encode("utf-8", errors="replace")
        return body, body

    return views.answer("page" if stalled is None else "page, stalled", MEDIA, make)


def headers() -> dict[str, str]:
    """What keeps the page to itself, whatever a name or a reason in it holds."""
    policy = (
        "default-src 'none'",
        f"script-src {_hash('page.js')}",
        f"style-src {_hash('page.css')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {"Content-Security-Policy": "; ".join(policy)}


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@cache
def _hash(name: str) -> str:
    digest = hashlib.sha256(_asset(name).encode()).digest()
    return f"'sha256-{b64encode(digest).decode()}'"


@cache
def _template() -> Template:
    import jinja2  # nobody may ever ask for the page

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "clock": clock,
        "css": lambda level: "none" if level is None else level.name.lower(),
        "duration": duration,
        "favicon": _favicon,
        "full": lambda moment: local(moment).strftime("%Y-%m-%d %H:%M:%S %Z"),
        "called": lambda item: shown_id(item.instance, item.model or ""),
        "beside": lambda text, phase: beside(phase, text),
        "gib": lambda count, digits=1: f"{count / _GIB:.{digits}f}",
        "gpus": gpu_names,
        "iso": lambda moment: local(moment).isoformat(timespec="seconds"),
        "level": level_of,
        "number": lambda value: f"{value:.0f}",
        "reason": reason,
        "who": _who,
        "whose": _whose,
        "words": lambda phase: phase.replace("_", " "),
    }
    return environment.from_string(_asset("page.html.j2"))


def render(published: Published, verdict: Verdict, views: Views) -> str:
    snapshot = published.snapshot
    scrubber = published.scrubber
    shown: dict[str, Any] = {
        "host": published.host,
        "version": published.version,
        "config": published.config,
        "snapshot": snapshot,
        "now": views.now(),
        "verdict": verdict,
        "counts": None,
        "events": [_shown(event, scrubber) for event in published.history[:_EVENTS]],
        "bad": Level.BAD,
        "signs": _SIGNS,
        "most_holders": _MOST_HOLDERS,
        "reload": _RELOAD,
        "css": _asset("page.css"),
        "js": _asset("page.js"),
        "scrub": scrubber.text,
    }
    if snapshot is not None:
        shown["indices"] = snapshot.indices
        shown["waiting"] = snapshot.waiting()
        shown["tiles"] = [*_tiles(snapshot, views)]
        shown["queue"] = [one for one in claims(snapshot) if not one.gpus]
        shown["no_gpus"] = snapshot.observed.inventory.unreadable
        if verdict.level is Level.GOOD and snapshot.statuses:
            shown["counts"] = _counts(snapshot)
    return _template().render(shown)


def _counts(snapshot: Snapshot) -> str:
    unprobed = sum(row.phase.value == "unprobed" for row in snapshot.statuses)
    ready = len(snapshot.statuses) - unprobed
    parts = [f"{ready} ready"] if ready else []
    parts += [f"{unprobed} running without a probe"] if unprobed else []
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Sparkline:
    """A line of the last measurements. `path` is drawn in a box of `box`; `label` is read out."""

    path: str
    label: str
    box: str = f"0 0 {_WIDTH} {_HEIGHT}"


@dataclass(frozen=True, slots=True)
class Tile:
    """One GPU. `rows` are on it; `word` and `sentence` say what it is. `gpu` None: not there."""

    id: str
    title: str
    level: Level | None
    word: str | None
    sentence: str | None
    uuid: str | None = None
    rows: Sequence[InstanceStatus] = ()
    models: str = ""
    gpu: Gpu | None = None
    memory: Sparkline | None = None
    power: Sparkline | None = None
    load: str = ""
    holders: list[Holder] | None = None
    claim: ClaimEntry | None = None


def _tiles(snapshot: Snapshot, views: Views) -> Iterator[Tile]:
    inventory = snapshot.observed.inventory
    there = {gpu.uuid: gpu for gpu in inventory.gpus}
    claimed = {gpu.uuid: claim for claim in claims(snapshot) for gpu in claim.gpus}
    for state in gpu_rows(snapshot.desired, snapshot.observed):
        uuid = state.uuid
        gpu, rows, samples = there.get(uuid), _on(uuid, snapshot), views.samples.of(uuid)
        level, word, sentence = _STATES[state.state]
        yield Tile(
            id=f"gpu-{uuid}",
            title=_title(state),
            level=max(map(level_of, rows)) if rows else level,
            word=None if rows else word,
            sentence=sentence if not rows or state.state == "lost" else None,
            uuid=uuid,
            rows=rows,
            models=", ".join(dict.fromkeys(row.model for row in rows)),
            gpu=gpu,
            memory=_memory(samples),
            power=_power(gpu, samples) if gpu is not None else None,
            load=_load(gpu) if gpu is not None else "",
            holders=state.holders,
            claim=claimed.get(uuid),
        )
    for unopened in inventory.unopened:  # the driver counts it, and it has not even a UUID
        name, title = f"unopened-{unopened.index}", f"GPU {unopened.index}"
        yield Tile(name, title, Level.BAD, "does not answer", unopened.error_line)


def _who(claim: ClaimEntry) -> str:
    """ "alice (task 3)"; somebody, where no holder came back yet."""
    note = f" ({claim.holder})" if claim.holder else ""
    return f"{claim.by}{note}" if claim.by else "somebody"


def _title(state: StatusGpu) -> str:
    if state.parent is not None:
        return f"MIG slice {state.uuid[4:12]}"
    return "GPU" if state.index is None else f"GPU {state.index}"


def _on(uuid: str, snapshot: Snapshot) -> list[InstanceStatus]:
    """What is on a GPU: of a server of several models those there, or itself, if none is."""
    rows = [row for row in snapshot.statuses if uuid in row.gpus]
    return [one for row in rows for one in [o for o in by_model(row) if uuid in o.gpus] or [row]]


def _memory(samples: Sequence[Sample]) -> Sparkline | None:
    history = [(item.at, None if item.memory is None else 100 * item.memory) for item in samples]
    return sparkline(history, 100, "Memory", "%")


def _power(gpu: Gpu, samples: Sequence[Sample]) -> Sparkline | None:
    known = [item.power for item in samples if item.power is not None]
    top = gpu.power_limit or max(known, default=0.0)
    return sparkline([(item.at, item.power) for item in samples], top, "Power", "W")


def sparkline(
    values: Sequence[tuple[float, float | None]], top: float, label: str, unit: str
) -> Sparkline | None:
    """`values` are (time, value), oldest first; None is a gap. `top` is the upper end of the scale.

    None with fewer than two values: that is no history.
    """
    known = [value for _, value in values if value is not None]
    if len(known) < 2 or top <= 0:
        return None
    first, last = values[0][0], values[-1][0]
    runs: list[list[str]] = [[]]
    for moment, value in values:
        if value is None:
            runs.append([])
            continue
        x = (moment - first) / max(last - first, 1.0) * _WIDTH
        y = _HEIGHT - _PAD - min(value / top, 1.0) * (_HEIGHT - 2 * _PAD)
        runs[-1].append(f"{x:.1f} {y:.1f}")
    # A single point is a line of no length, which a round cap makes visible.
    path = " ".join("M" + " L".join(run if len(run) > 1 else run * 2) for run in runs if run)
    described = (
        f"{label} over the last {duration(last - first)}: "
        f"{min(known):.0f} to {max(known):.0f} {unit}, now {known[-1]:.0f} {unit}"
    )
    return Sparkline(path, described)


def _load(gpu: Gpu) -> str:
    parts = [] if gpu.utilization is None else [f"{100 * gpu.utilization:.0f} %"]
    parts += [] if gpu.temperature is None else [f"{gpu.temperature:.0f} °C"]
    parts += ["the driver knows none of a slice"] if gpu.parent is not None else []
    return ", ".join(parts)


def _whose(holder: Holder) -> str:
    ref = holder.ref or ""
    if holder.instance is not None:
        return "ours"
    return {
        OwnerKind.MANAGED: "ours",
        OwnerKind.CONTAINER: f"not ours: container {ref[:12]}",
        OwnerKind.UNIT: f"not ours: {ref}",
        OwnerKind.ORPHAN: "nobody's",
        OwnerKind.UNKNOWN: "whose is unknown",
    }[holder.owner]


def _shown(event: Event, scrubber: Scrubber) -> dict[str, Any]:
    """An event of the history, and what happened in a line."""
    if event.kind == "phase":
        what = f"{event.was} to {event.phase}" if event.was else f"{event.phase}"
        what = what.replace("_", " ")
    elif event.kind in ("config", "adopt", "pause", "claim", "order"):
        what = ""
    else:
        verb = {"begin": "begins"}.get(event.kind, event.kind)
        what = f"{event.phase} {verb}"
    text = scrubber.text(beside(event.phase or "", event.text))
    return {
        "at": event.at,
        "instance": shown_id(event.instance, event.model),
        "text": ": ".join(part for part in (what, text) if part),
        "failed": event.kind == "failed",
    }


def _favicon(level: Level) -> str:
    dot = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>"
        f"<circle cx='8' cy='8' r='7' fill='{_COLOURS[level]}'/></svg>"
    )
    return f"data:image/svg+xml,{quote(dot)}"


def clock(moment: float, now: float) -> str:
    """ "12:04:10", with the day where that is not today's."""
    when = local(moment)
    return when.strftime("%H:%M:%S" if when.date() == local(now).date() else "%Y-%m-%d %H:%M")


def duration(seconds: float) -> str:
    """ "42 s", "12 min", "3 h", "5 d": the largest unit only."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"
