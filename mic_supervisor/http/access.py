"""Who may ask: loopback, holders of a token, or everybody when that is said to be meant.

And whether it is a browser that wants a page, or a program that wants a document.
"""

from __future__ import annotations

import hmac
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.config.settings import Settings

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1: what a header can carry
_SHORTEST = 16
_PAGE = ("text/html", "application/xhtml+xml")
_DOCUMENT = ("application/json", "application/*")
_MAKE = "make one with: openssl rand -hex 32"


@dataclass(frozen=True, slots=True)
class Access:
    """`token` None: whoever reaches the address may read."""

    token: bytes | None = field(default=None, repr=False)

    def admits(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header is good enough."""
        if self.token is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        # A comparison that stops at the first difference would tell how much of a guess is right.
        return scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(errors="replace"), self.token
        )


def access_of(settings: Settings) -> Access:
    """What the settings allow. Raises MicError where they would open the machine unasked."""
    if settings.http_token_file is not None:
        return Access(_read(settings.http_token_file))
    if not settings.listen.is_loopback and not settings.http_open:
        raise MicError(
            f"cannot serve HTTP on {settings.listen}: "
            "other machines reach that address, and no token is asked of them",
            hint="set MIC_HTTP_TOKEN_FILE to a file that holds one, or MIC_HTTP_OPEN=true "
            "if everybody may read; 127.0.0.1 behind a reverse proxy needs neither",
        )
    return Access()


def _read(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise MicError(
            f"cannot read the token in {path}: {(error.strerror or str(error)).lower()}",
            hint=f"{_MAKE} > {path}; chmod 600 {path}",
        ) from error
    except UnicodeDecodeError as error:
        raise MicError(f"cannot use the token in {path}: it is not text", hint=_MAKE) from error
    if mode & stat.S_IROTH:
        raise MicError(
            f"cannot use the token in {path}: everybody on this machine may read it",
            hint=f"chmod 600 {path}, and make a new one",
        )
    if not _TOKEN.fullmatch(text) or len(text) < _SHORTEST:
        raise MicError(
            f"cannot use the token in {path}: it must be one word of {_SHORTEST} characters or "
            "more, of letters, digits and -._~+/",
            hint=_MAKE,
        )
    return text.encode()


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
