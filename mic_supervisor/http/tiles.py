"""One tile per GPU: what is on it, how it fares, and what it measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mic_supervisor.http.markup import Markup, at, for_how_long, join, tag
from mic_supervisor.http.sparkline import sparkline
from mic_supervisor.http.verdict import Level, level_of
from mic_supervisor.model import OwnerKind
from mic_supervisor.plan.render import gpu_names
from mic_supervisor.records import dataclass

if TYPE_CHECKING:
    from mic_supervisor.http.redact import Scrubber
    from mic_supervisor.http.samples import Sample
    from mic_supervisor.model import Gpu, GpuProcess, UnopenedGpu
    from mic_supervisor.plan.status import InstanceStatus
    from mic_supervisor.views.status import StatusGpu

_GIB = 1 << 30
_MOST_HOLDERS = 8

# What a GPU without an instance is, in a word and in a sentence.
_STATES: Mapping[str, tuple[Level | None, str, str]] = {
    "idle": (None, "not in the file", "The file does not list it; it is left alone."),
    "unmanaged": (None, "not in the file", "Others use it; it is left alone."),
    "kept_empty": (Level.GOOD, "kept empty", "The file keeps it empty, and it is."),
    "foreign": (Level.BAD, "kept empty", "The file keeps it empty, and a stranger is on it."),
    "unhealthy": (Level.BAD, "unhealthy", "The driver says that it needs help."),
    "lost": (Level.BAD, "not there", "The file names it, and the driver does not know it."),
    "unknown": (Level.UNKNOWN, "unknown", "It cannot be read who is on it."),
    "managed": (Level.BUSY, "waiting", "Nothing runs on it yet."),
}
_WORST_FIRST = (Level.UNKNOWN, Level.BAD, Level.BUSY, Level.GOOD)
_ICONS = {Level.GOOD: "✓", Level.BUSY: "…", Level.BAD: "!", Level.UNKNOWN: "?"}


@dataclass(frozen=True, slots=True)
class Context:
    """What every tile needs to know."""

    now: float
    indices: Mapping[str, int]
    scrubber: Scrubber


def icon(level: Level | None) -> Markup:
    """A sign, not a colour alone; the words beside it say the same."""
    name = level.name.lower() if level is not None else "none"
    sign = _ICONS[level] if level is not None else "–"
    return tag("span", sign, class_=f"icon {name}", aria_hidden="true")


def tile(
    state: StatusGpu,
    gpu: Gpu | None,
    rows: Iterable[InstanceStatus],
    samples: tuple[Sample, ...],
    context: Context,
) -> Markup:
    """`state` is the GPU's row of `status --json`; `gpu` None: it is not there."""
    rows = tuple(rows)
    uuid = state.uuid
    title = f"GPU {state.index}" if state.index is not None else "GPU"
    name = f"gpu-{uuid}"
    if rows:
        levels = {level_of(row) for row in rows}
        level: Level | None = next(item for item in _WORST_FIRST if item in levels)
        parts = [_instance(row, uuid, context) for row in rows]
    else:
        level, word, sentence = _STATES[state.state]
        parts = [
            tag("p", icon(level), tag("span", word, class_="word"), class_="phase"),
            tag("p", sentence, class_="reason"),
        ]
    if state.state == "lost" and rows:
        parts.append(tag("p", _STATES["lost"][2], class_="reason"))
    models = ", ".join(dict.fromkeys(row.model for row in rows))
    return tag(
        "li",
        tag(
            "h3",
            tag("span", title, class_="gpu"),
            tag("span", models, class_="model") if models else None,
            id=f"{name}-title",
        ),
        *parts,
        _facts(gpu, samples, context) if gpu is not None else None,
        tag(
            "p",
            gpu.name if gpu is not None else None,
            " · " if gpu is not None else None,
            tag("span", uuid, class_="uuid"),
            class_="id",
        ),
        id=name,
        class_=f"tile {level.name.lower() if level is not None else 'none'}",
        aria_labelledby=f"{name}-title",
    )


def unopened_tile(gpu: UnopenedGpu) -> Markup:
    """A GPU that the driver counts and does not open: it has not even a UUID."""
    name = f"unopened-{gpu.index}"
    return tag(
        "li",
        tag("h3", tag("span", f"GPU {gpu.index}", class_="gpu"), id=f"{name}-title"),
        tag("p", icon(Level.BAD), tag("span", "does not answer", class_="word"), class_="phase"),
        tag("p", gpu.error, class_="reason"),
        id=name,
        class_="tile bad",
        aria_labelledby=f"{name}-title",
    )


def _instance(row: InstanceStatus, uuid: str, context: Context) -> Markup:
    level = level_of(row)
    others = [item for item in row.gpus if item != uuid]
    facts: list[tuple[str, str]] = []
    if row.next_retry is not None:
        facts.append(("Next try", at(row.next_retry, context.now)))
    if row.restarts:
        facts.append(("Restarts", str(row.restarts)))
    if others:
        facts.append(("Together with", gpu_names(others, context.indices)))
    facts += [
        ("Endpoint" if name == "http" else name.capitalize(), tag("code", url))
        for name, url in row.endpoints.items()
    ]
    return join(
        tag(
            "p",
            icon(level),
            tag("span", row.phase.value.replace("_", " "), class_="word"),
            " ",
            for_how_long(row.since, context.now) if row.since is not None else None,
            class_="phase",
        ),
        tag("p", context.scrubber.text(row.reason), class_="reason")
        if row.reason and not row.settled_well
        else None,
        _list(facts),
    )


def _list(facts: list[tuple[str, str]]) -> Markup | None:
    if not facts:
        return None
    pairs = (tag("div", tag("dt", name), tag("dd", value)) for name, value in facts)
    return tag("dl", *pairs, class_="facts")


def _facts(gpu: Gpu, samples: tuple[Sample, ...], context: Context) -> Markup:
    rows = [
        tag("div", tag("dt", name), tag("dd", *values))
        for name, values in (
            ("Memory", _memory(gpu, samples)),
            ("Power", _power(gpu, samples)),
            ("Load", _load(gpu)),
            ("Holders", (_holders(gpu, context),)),
        )
        if values
    ]
    return tag("dl", *rows, class_="facts measured")


def _memory(gpu: Gpu, samples: tuple[Sample, ...]) -> tuple[str | None, ...]:
    memory = gpu.memory
    if memory is None:
        return ()
    total = memory.total / _GIB
    if memory.used is None:
        return (f"{total:.0f} GiB, use not measured",)
    used = memory.used / _GIB
    history = [(item.at, None if item.memory is None else 100 * item.memory) for item in samples]
    return (
        tag("span", f"{used:.1f} of {total:.1f} GiB", class_="value"),
        sparkline(history, 100, "Memory", "%"),
        tag(
            "meter",
            min="0",
            max=f"{total:.1f}",
            value=f"{used:.1f}",
            aria_label=f"Memory of GPU {gpu.index}",
        ),
    )


def _power(gpu: Gpu, samples: tuple[Sample, ...]) -> tuple[str | None, ...]:
    if gpu.power_draw is None:
        return ()
    limit = f" of {gpu.power_limit:.0f}" if gpu.power_limit else ""
    known = [item.power for item in samples if item.power is not None]
    top = gpu.power_limit or max(known, default=gpu.power_draw)
    history = [(item.at, item.power) for item in samples]
    return (
        tag("span", f"{gpu.power_draw:.0f}{limit} W", class_="value"),
        sparkline(history, top, "Power", "W"),
    )


def _load(gpu: Gpu) -> tuple[str, ...]:
    parts = []
    if gpu.utilization is not None:
        parts.append(f"{100 * gpu.utilization:.0f} %")
    if gpu.temperature is not None:
        parts.append(f"{gpu.temperature:.0f} °C")
    return (", ".join(parts),) if parts else ()


def _holders(gpu: Gpu, context: Context) -> str:
    if gpu.processes is None:
        return "cannot be read"
    if not gpu.processes:
        return "nobody"
    shown = [tag("li", *_holder(item, context)) for item in gpu.processes[:_MOST_HOLDERS]]
    if len(gpu.processes) > _MOST_HOLDERS:
        shown.append(tag("li", f"and {len(gpu.processes) - _MOST_HOLDERS} more"))
    return tag("ul", *shown, class_="holders")


def _holder(process: GpuProcess, context: Context) -> tuple[str, ...]:
    used = "" if process.used_memory is None else f", {process.used_memory / _GIB:.1f} GiB"
    owner = process.owner
    kind = owner.kind if owner is not None else OwnerKind.UNKNOWN
    ref = owner.ref if owner is not None and owner.ref else ""
    whose = {
        OwnerKind.MANAGED: "ours",
        OwnerKind.CONTAINER: f"not ours: container {ref[:12]}",
        OwnerKind.UNIT: f"not ours: {ref}",
        OwnerKind.ORPHAN: "nobody's",
        OwnerKind.UNKNOWN: "whose is unknown",
    }[kind]
    name = context.scrubber.text(process.name or "unnamed")
    return (f"{name} ({process.pid}){used}, ", tag("span", whose, class_=kind.value))
