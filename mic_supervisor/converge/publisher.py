"""Tells who forwards requests which instances serve, by running the operator's hook.

One run at a time, always with what is true when it begins: what changes meanwhile is one more run.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from mic_supervisor.clocks import later
from mic_supervisor.converge.tasks import blocking
from mic_supervisor.errors import MicError
from mic_supervisor.host import programs
from mic_supervisor.model import EndpointsHook
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.text import quoted
from mic_supervisor.views.endpoints import Endpoints, document, serving

_FIRST_DELAY = 5.0  # seconds before a hook that failed is run again, doubling to the last
_LAST_DELAY = 300.0
_OUTPUT = 2000  # bytes of its output that are quoted


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
        self._hook: EndpointsHook | None = None
        self._rows: tuple[InstanceStatus, ...] = ()
        self._withdrawn: set[str] = set()

    @property
    def endpoints(self) -> Endpoints:
        """Who serves now, but for what is about to be stopped."""
        return serving(self._rows, self._withdrawn, self.published or {})

    def follow(self, hook: EndpointsHook | None, rows: tuple[InstanceStatus, ...]) -> None:
        """What is true now, once a round. Starts a run where one is due, and waits for none."""
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

    def known(self, hook: EndpointsHook | None) -> dict[str, frozenset[str]] | None:
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
                await blocking(self._pool, run, hook, document(wanted, self._host))
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


def run(hook: EndpointsHook, payload: Mapping[str, object]) -> None:
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
            f"cannot run on_endpoints_change, {program}: {error.strerror}",
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
    raise MicError(f"on_endpoints_change, {program}, {how}{said}")
