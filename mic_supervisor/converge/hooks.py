"""Runs the operator's hooks: who serves, for those who forward requests, and each change of phase.

`on_endpoints_change` has one run at a time, always with what is true when it begins: what changes
meanwhile is one more run. `on_transition` has one for each change, in order, one at a time, beside
the loop, which waits for none of them. One of those that fails is reported and not tried again: the
next change is what matters then.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from typing import Literal

from mic_supervisor.clocks import later
from mic_supervisor.converge.events import Event
from mic_supervisor.converge.tasks import blocking
from mic_supervisor.errors import MicError
from mic_supervisor.host import programs
from mic_supervisor.model import Hook
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.text import quoted
from mic_supervisor.views.endpoints import Endpoints, document, serving

_FIRST_DELAY = 5.0  # seconds before a hook that failed is run again, doubling to the last
_LAST_DELAY = 300.0
_OUTPUT = 2000  # bytes of its output that are quoted
_MOST = 1000  # changes that wait for their turn
_AT_THE_END = 5.0  # seconds for those that are left when a command has done its work


@dataclass(frozen=True, slots=True)
class HookState:
    """How the hook fared since the program started. Times are steady until `in_wall`."""

    runs: int = 0
    failures: int = 0
    in_a_row: int = 0  # failures since the last success
    last_success_at: float | None = None
    error: str | None = None  # of the last run
    retry_at: float | None = None

    def in_wall(self, offset: float) -> HookState:
        """For people: with the clocks' offset added to every time."""
        return replace(
            self,
            last_success_at=later(self.last_success_at, offset),
            retry_at=later(self.retry_at, offset),
        )


class Publisher:
    """Keeps what the hook was last told in step with what serves. For the event loop's thread.

    `published` is what the last successful run was told; None: no hook ever succeeded. `emit` gets
    a sentence for the log and whether it is a failure.
    """

    def __init__(
        self,
        pool: Executor,
        clock: Callable[[], float],
        emit: Callable[[str, bool], None],
        host: str,
        published: Endpoints | None,
    ) -> None:
        self.published = published
        self.state = HookState()
        self._pool = pool
        self._clock = clock
        self._emit = emit
        self._host = host
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[bool] | None = None
        self._hook: Hook | None = None
        self._rows: tuple[InstanceStatus, ...] = ()
        self._withdrawn: set[str] = set()
        self._drained = False

    @property
    def endpoints(self) -> Endpoints:
        """Who serves now, but for what is about to be stopped."""
        gone = {row.id for row in self._rows} if self._drained else self._withdrawn
        return serving(self._rows, gone, self.published or {})

    def follow(
        self, hook: Hook | None, rows: tuple[InstanceStatus, ...], *, drained: bool = False
    ) -> None:
        """What is true now, once a round. Starts a run where one is due, and waits for none.

        On a host that is `drained` everything is about to be stopped, or has been.
        """
        self._drained = drained
        if hook != self._hook:
            self._hook = hook
            self.state = replace(self.state, error=None, retry_at=None, in_a_row=0)
        self._rows = rows
        under_way = self._task is not None and not self._task.done()
        retry_at = self.state.retry_at
        waits = retry_at is not None and retry_at > self._clock()
        if hook is None or under_way or waits or self.endpoints == self.published:
            return
        self._task = asyncio.create_task(self._publish())

    def known(self, hook: Hook | None) -> dict[str, frozenset[str]] | None:
        """The instances that were published, by model. None where nobody can be waited for."""
        if hook is None or self.state.error is not None or self.published is None:
            return None
        return {model: frozenset(instances) for model, instances in self.published.items()}

    async def withdraw(self, instance: str) -> bool:
        """Have nobody sent there any more, until `restore`. False: the hook failed.

        A hook that fails stops nothing that somebody asked for.
        """
        self._withdrawn.add(instance)
        hook, published = self._hook, self.published or {}
        if hook is None or not any(instance in found for found in published.values()):
            return True
        done = await self._publish()
        await asyncio.sleep(hook.settle)
        return done

    def restore(self, instances: Iterable[str]) -> None:
        """What was withdrawn has been stopped, or will not be."""
        self._withdrawn.difference_update(instances)

    async def finish(self) -> None:
        """Wait until what is true has been told, or could not be."""
        if self._task is not None:
            await asyncio.wait({self._task})
        if self.state.error is None:
            await self._publish()

    async def _publish(self) -> bool:
        """Have the hook told of what is true when its turn comes; False: it failed."""
        async with self._turn:
            hook, wanted = self._hook, self.endpoints
            if hook is None or wanted == self.published:
                return True
            self.state = replace(self.state, runs=self.state.runs + 1)
            try:
                await blocking(self._pool, run, hook, document(wanted, self._host, self._rows))
            except MicError as error:
                self._failed(error)
                return False
            self.published = wanted
            self.state = replace(
                self.state, last_success_at=self._clock(), error=None, retry_at=None, in_a_row=0
            )
            ready = ", ".join(f"{model} {len(found)}" for model, found in wanted.items())
            self._emit(f"on_endpoints_change got: {ready or 'no models'}", False)
            return True

    def _failed(self, error: MicError) -> None:
        state = self.state
        delay = min(_FIRST_DELAY * 2.0 ** min(state.in_a_row, 6), _LAST_DELAY)
        self.state = replace(
            state,
            failures=state.failures + 1,
            in_a_row=state.in_a_row + 1,
            error=error.message,
            retry_at=self._clock() + delay,
        )
        self._emit(error.message, True)


@dataclass(frozen=True, slots=True)
class Transition:
    """What the hook gets on its standard input. `at` is since the epoch, `seconds` how long the
    phase before took; None: it is not known. `dropped` counts the changes before this one that the
    hook was too slow for.
    """

    version: Literal[1]
    host: str
    at: float
    instance: str
    model: str
    gpus: tuple[str, ...]  # UUIDs
    phase: str | None
    was: str | None
    seconds: float | None
    reason: str | None
    dropped: int = 0


class Transitions:
    """For the event loop's thread. `hook` is the one of the file; None: there is none.

    `emit` gets a sentence for the log and whether it is a failure.
    """

    def __init__(self, pool: Executor, emit: Callable[[str, bool], None], host: str) -> None:
        self.hook: Hook | None = None
        self._pool = pool
        self._emit = emit
        self._host = host
        self._waiting: deque[Transition] = deque()
        self._dropped = 0  # since the last run
        self._failed = ""  # how the last run did
        self._task: asyncio.Task[None] | None = None

    def listen(self, event: Event) -> None:
        """Have the hook told, if this is a change of phase. When too many wait, the oldest goes."""
        if self.hook is None or event.kind != "phase":
            return
        if len(self._waiting) == _MOST:
            self._waiting.popleft()
            self._dropped += 1
        about = (event.instance, event.model, event.gpus, event.phase, event.was, event.seconds)
        self._waiting.append(Transition(1, self._host, event.at, *about, event.text or None))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def finish(self) -> None:
        """Let it be told of what waits, for a few seconds; say what it then was not."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_AT_THE_END)
        self.end()

    def end(self) -> None:
        """A run that is under way goes on. What waits is not told to anybody any more."""
        if self._waiting:
            self._emit(f"on_transition was not told of the last {len(self._waiting)} changes", True)
        self._waiting.clear()

    async def _run(self) -> None:
        while self._waiting:
            change, dropped = self._waiting.popleft(), self._dropped
            self._dropped = 0
            if self.hook is None:
                continue  # the file has none any more
            if dropped:
                self._emit(f"on_transition is too slow: it was not told of {dropped} changes", True)
            document = asdict(replace(change, dropped=dropped))
            try:
                await blocking(self._pool, run, self.hook, document)
            except MicError as error:
                if error.message != self._failed:
                    self._emit(error.message, True)
                self._failed = error.message
            else:
                if self._failed:
                    self._emit("on_transition works again", False)
                self._failed = ""


def run(hook: Hook, payload: Mapping[str, object]) -> None:
    """Run the hook to its end, with a JSON document on its standard input. Raises MicError.

    It gets PATH, HOME, LANG and the supervisor's own MIC_ variables, so that
    `mic-supervisor export` means the same there. Past its time it is killed with everything that it
    started and that stayed in its session.
    """
    program = hook.command[0]
    own = {key: value for key, value in os.environ.items() if key == "PATH" or key[:4] == "MIC_"}
    env = {**programs.plain_environment(programs.home()), **own}
    document = json.dumps(payload, ensure_ascii=False).encode(errors="backslashreplace")
    try:
        done = programs.run(
            hook.command, hook.timeout, given=document, env=env, most=_OUTPUT, last=True
        )
    except OSError as error:
        raise MicError(
            f"cannot run {hook.name}, {program}: {error.strerror}",
            hint="it must be there, and executable, for the supervisor's user",
        ) from error
    if done.code is None:
        how = f"took longer than {hook.timeout:g} s and was killed"
    elif done.code < 0:
        how = f"was killed by signal {-done.code}"
    elif done.code > 0:
        how = f"exits with {done.code}"
    else:
        return
    lines = done.output.decode(errors="replace").strip().splitlines()
    said = f": {quoted(lines[-1], 300)}" if lines else ""
    raise MicError(f"{hook.name}, {program}, {how}{said}")
