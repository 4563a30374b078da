"""Whether a client is a browser that wants a page, or a program that wants a document."""

from __future__ import annotations

_PAGE = ("text/html", "application/xhtml+xml")
_DOCUMENT = ("application/json", "application/*")


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
