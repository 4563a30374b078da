"""HTML from Python, with everything escaped that does not say that it is markup."""

from __future__ import annotations

from datetime import datetime
from html import escape

VOID = frozenset({"meta", "link", "br"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | None  # None leaves nothing behind


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Markup:
    """One element. Plain text is escaped, Markup is not; `class_` is `class`, `a_b` is `a-b`.

    An attribute that is None or False is left out, True stands without a value.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(child)
            for child in children
            if child is not None
        )
    )


def for_how_long(since: float, now: float) -> Markup:
    """ "for 12 min", with the moment itself for machines; the page's script keeps it right."""
    return tag(
        "time",
        f"for {duration(now - since)}",
        datetime=_iso(since),
        title=_full(since),
        data_since=f"{since:.0f}",
    )


def at(moment: float, now: float) -> Markup:
    """ "12:04:10", with the day where that is not today's."""
    local, today = _local(moment), _local(now)
    text = local.strftime("%H:%M:%S" if local.date() == today.date() else "%Y-%m-%d %H:%M")
    return tag("time", text, datetime=_iso(moment), title=_full(moment))


def duration(seconds: float) -> str:
    """ "42 s", "12 min", "3 h", "5 d": the largest unit only."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def _local(moment: float) -> datetime:
    return datetime.fromtimestamp(moment).astimezone()


def _iso(moment: float) -> str:
    return _local(moment).isoformat(timespec="seconds")


def _full(moment: float) -> str:
    return _local(moment).strftime("%Y-%m-%d %H:%M:%S %Z")
