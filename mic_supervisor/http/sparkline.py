"""A line of the last measurements, small enough for a tile."""

from __future__ import annotations

from collections.abc import Sequence

from mic_supervisor.http.markup import Markup, duration, tag

WIDTH, HEIGHT = 120, 24
_PAD = 2


def sparkline(
    values: Sequence[tuple[float, float | None]], top: float, label: str, unit: str
) -> Markup | None:
    """`values` are (time, value), oldest first; None is a gap. `top` is the upper end of the scale.

    A reader of the screen hears the range. None with fewer than two values: that is no history.
    """
    known = [value for _, value in values if value is not None]
    if len(known) < 2 or top <= 0:
        return None
    first, last = values[0][0], values[-1][0]
    span = max(last - first, 1.0)
    lines: list[str] = []
    run: list[str] = []
    for moment, value in values:
        if value is None:
            lines, run = _ended(lines, run)
            continue
        x = (moment - first) / span * WIDTH
        y = HEIGHT - _PAD - min(value / top, 1.0) * (HEIGHT - 2 * _PAD)
        run.append(f"{x:.1f} {y:.1f}")
    lines, _ = _ended(lines, run)
    described = (
        f"{label} over the last {duration(last - first)}: "
        f"{min(known):.0f} to {max(known):.0f} {unit}, now {known[-1]:.0f} {unit}"
    )
    return tag(
        "svg",
        tag("path", d=" ".join(lines)),
        class_="spark",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=described,
    )


def _ended(lines: list[str], run: list[str]) -> tuple[list[str], list[str]]:
    """A single point is a line of no length, which a round cap makes visible."""
    if run:
        lines = [*lines, "M" + " L".join(run if len(run) > 1 else [*run, *run])]
    return lines, []
