"""Looks over a machine and says what to fix. Changes nothing.

Each check is on its own: one that hangs or fails is one line, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Literal

from mic_supervisor.converge.tasks import Threads
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
    """`run` may block, raise and hang."""

    subject: str
    run: Callable[[], Iterable[Finding]]


def examine(checks: Sequence[Check], bound: float = BOUND) -> list[Finding]:
    """The findings of all checks, in the checks' order, after at most `bound` seconds."""
    threads = Threads(len(checks), "doctor")
    looks = [threads.submit(_findings, check) for check in checks]
    done, _ = wait(looks, bound)
    results: list[Finding] = []
    for check, run in zip(checks, looks, strict=True):
        late = fail(check.subject, f"cannot be checked: no answer within {bound:g} s")
        results += run.result() if run in done else [late]
    return results


def _findings(check: Check) -> list[Finding]:
    try:
        return list(check.run())
    except MicError as error:
        return [fail(check.subject, error.message, error.hint)]
    # A check looks at a machine of which anything may be broken, and may run a plug-in's code: what
    # it did not expect is a finding, and must not hide those of the others.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return [fail(check.subject, f"cannot be checked: {type(error).__name__}: {error}")]
