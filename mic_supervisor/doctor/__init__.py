"""Looks over a machine and says what to fix. Changes nothing.

Each check is on its own: one that hangs or fails is one line, and the others go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mic_supervisor.errors import MicError

BOUND = 15.0  # seconds for all checks together; they run side by side

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: "fail  docker: cannot reach …". `fix` is one imperative sentence."""

    level: Level
    subject: str
    text: str
    fix: str | None = None


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warn(subject: str, text: str, fix: str | None = None) -> Finding:
    return Finding("warn", subject, text, fix)


def fail(subject: str, text: str, fix: str | None = None) -> Finding:
    return Finding("fail", subject, text, fix)


@dataclass(frozen=True, slots=True)
class Check:
    """`look` may block, raise and hang."""

    subject: str
    look: Callable[[], Iterable[Finding]]


def examine(checks: Sequence[Check], bound: float = BOUND) -> list[Finding]:
    """The findings of all checks, in the checks' order, after at most `bound` seconds."""
    found: list[list[Finding] | None] = [None] * len(checks)

    def run(place: int, check: Check) -> None:
        try:
            findings = list(check.look())
        except MicError as error:
            findings = [fail(check.subject, error.message, error.hint)]
        # A check looks at a machine of which anything may be broken: what it did not expect is a
        # finding, and must not hide those of the others.
        except Exception as error:  # noqa: BLE001
            findings = [fail(check.subject, f"cannot be checked: {type(error).__name__}: {error}")]
        found[place] = findings

    threads = [
        threading.Thread(target=run, args=item, name=item[1].subject, daemon=True)
        for item in enumerate(checks)
    ]
    deadline = time.monotonic() + bound
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    results: list[Finding] = []
    for check, findings in zip(checks, found, strict=True):
        late = [fail(check.subject, f"cannot be checked: no answer within {bound:g} s")]
        results += late if findings is None else findings
    return results
