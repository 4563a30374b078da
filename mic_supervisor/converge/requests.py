"""Requests of our own to a server: those that warm it up, and the one that shows that it hangs.

A server that hangs often answers its health check all the same. So a counter is read that moves
with its work. While it moves nothing is asked. Where it stands still the server is idle, or it
hangs, and one request decides which: a request stands in the users' queue, and two would be worse.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

from mic_supervisor.converge.http_calls import Answer, NoAnswer
from mic_supervisor.converge.tasks import log_exception
from mic_supervisor.model import HttpCall, Progress, WarmUp

T = TypeVar("T", Progress, WarmUp)

Verdict = tuple[bool | None, str]
"""(passed, in a few words why not). None: the prober itself could not tell."""

Send = Callable[[HttpCall], Awaitable[Answer]]
"""Sends a call to the server. Raises NoAnswer."""

_LABELS = r'(?:\{(?:[^"}\n]|"(?:\\.|[^"\\\n])*")*\})?'


@dataclass(slots=True)
class _Counter:
    """One counter, as it was read. `verdict` None: it could not be read yet."""

    value: float | None
    since: float  # when it last moved, or a request was answered or given up: steady
    verdict: Verdict | None = None


class Requests:
    """What is asked of one workload beside the looks at it, which a request may outlast.

    Never are two requests on their way at a time.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._counters: dict[Progress, _Counter] = {}
        self._task: asyncio.Task[None] | None = None
        self._purpose: Progress | WarmUp | None = None
        self._outcomes: dict[Progress | WarmUp, Verdict] = {}  # of requests, until the next look
        self._answered = 0  # of those that warm it up
        self._cold: Verdict = (False, "")  # what came of the last one that was not answered

    def progress(
        self, what: Progress, value: float | None, fault: str, now: float
    ) -> Verdict | None:
        """Whether it gets anything done; None: that is not known yet.

        `value` is that of the counter now. Where there is none, `fault` may say why. `now` is
        steady.
        """
        known = self._counters.get(what)
        if known is None:
            # One that does not exist before it counts something has stood still since the start.
            since = now - what.within if value is None else now
            known = self._counters[what] = _Counter(value, since, _fine(value))
        elif value is not None and value != known.value:
            known.value, known.since, known.verdict = value, now, _fine(value)
            self._end(what)
            self._outcomes.pop(what, None)
        elif (decided := self._outcomes.pop(what, None)) is not None:
            known.since, known.verdict = now, decided
            if decided[0] is True:
                fault = fault or f"GET {what.path} shows no {what.metric}, although {decided[1]}"
                known.verdict = _fine(value) or (None, fault)
        elif now - known.since >= what.within:
            self._begin(what, self._decide)
        return known.verdict

    def warm_up(self, what: WarmUp) -> Verdict:
        """Whether it is warm. A request that is not answered is sent again with a later look."""
        self._cold = self._outcomes.pop(what, self._cold)
        if self._answered >= what.count:
            return True, "it is warm"
        self._begin(what, self._warm)
        ok, why = self._cold
        done = f"warming up: {self._answered} of {what.count} requests answered"
        return ok, f"{done}; {why}" if why else done

    def close(self) -> None:
        """Give up what is on its way."""
        self._end(self._purpose)

    async def _decide(self, what: Progress) -> Verdict:
        call = _called(what.request)
        still = f"{what.metric} has not moved for {what.within:g} s, and {call}"
        try:
            answer = await self._send(what.request)
        except NoAnswer as error:
            return None if error.own else False, f"it hangs: {still}: {error}"
        if answer.ok:
            return True, f"{call} answers {answer.status}"
        if answer.status >= 500:
            return False, f"{still} answers {answer.status}"
        # It comes from in front of what may hang, and says nothing of it.
        return None, f"{still} answers {answer.status}: give `progress` a request that it accepts"

    async def _warm(self, what: WarmUp) -> Verdict:
        call = _called(what.request)
        while self._answered < what.count:
            try:
                answer = await self._send(what.request)
            except NoAnswer as error:
                return None if error.own else False, f"{call}: {error}"
            if not answer.ok:
                return False, f"{call} answers {answer.status}"
            self._answered, self._cold = self._answered + 1, (False, "")
        return True, ""

    def _begin(self, purpose: T, ask: Callable[[T], Awaitable[Verdict]]) -> None:
        """Unless another request is on its way."""
        if self._task is not None and not self._task.done():
            return

        async def note() -> None:
            self._outcomes[purpose] = await ask(purpose)

        self._task, self._purpose = asyncio.create_task(note()), purpose
        self._task.add_done_callback(log_exception)

    def _end(self, purpose: Progress | WarmUp | None) -> None:
        if self._task is not None and self._purpose == purpose:
            self._task.cancel()


def counted(text: str, metric: str) -> float | None:
    """The sum of a counter over all its labels, in Prometheus' text format; None: it is not there.

    Source: prometheus.io, "Exposition formats": name, labels, value and perhaps a time.
    """
    found = re.findall(rf"^{re.escape(metric)}{_LABELS}[ \t]+(\S+)", text, re.MULTILINE)
    try:
        value = sum(map(float, found))
    except ValueError:
        return None
    return value if found and isfinite(value) else None


def _fine(value: float | None) -> Verdict | None:
    return None if value is None else (True, "it makes progress")


def _called(request: HttpCall) -> str:
    return f"{request.method} {request.path}"
