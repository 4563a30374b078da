"""Claims as a daemon has them: who is connected, what each is told, and what of them is desired.

Who decides is pure: desired/claims.py gives GPUs, plan/claims.py says how each fares. A claim is
held by an open connection; where that ends without a word, its holder has vanished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from mic_supervisor.clocks import Clock
from mic_supervisor.config.document import FLEET, Config
from mic_supervisor.config.names import composed
from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.params import read
from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.converge.tasks import blocking
from mic_supervisor.desired import FileDesired
from mic_supervisor.desired.claims import (
    ORIGIN,
    RECONNECT,
    Claims,
    Ground,
    Running,
    ask,
    end,
    follow,
    gone,
    refusal,
    vanish,
)
from mic_supervisor.errors import MicError, Unserviceable
from mic_supervisor.model import Claim, DesiredState, Ending, GpuInventory, RuntimeView
from mic_supervisor.plan.assess import Assessment, is_alive
from mic_supervisor.plan.claims import Standing, fared, standing, unseen
from mic_supervisor.plan.words import called
from mic_supervisor.text import one_line

Emit = Callable[[Event], None]
Method = Callable[[Mapping[str, Any], Emit], Awaitable[Any]]

_RELEASED = Ending("released", "its claim was released")
_WATCH = 0.5  # seconds between two rounds while something that a claim had is taken away
_BACK = "the holder of its claim is back"
_LONGEST = 200  # characters of what a holder calls itself


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a holder says: see Claim."""

    model: str = ""
    token: str = ""
    gpus: Annotated[int, Field(ge=1)] = 1
    instance: str = ""
    holder: str = ""
    waited: float = 0.0  # seconds since it asked first, perhaps another daemon


class ClaimDesk:
    """The claims of a converger. All methods belong to the thread of the event loop.

    `grace` is how long what runs for a claim outlasts its holder, in seconds. None: there is no
    daemon, so that nobody can hold anything; what runs for claims is found, and left as it is.
    """

    def __init__(
        self,
        desired: FileDesired,
        grace: float | None,
        events: Events,
        clock: Clock,
        wake: Callable[[], None],
    ) -> None:
        self.claims: Claims = ()
        # Has the file as it is now followed, if it changed.
        self.read_file: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._desired = desired
        self._grace = grace
        self._events = events
        self._clock = clock
        self._wake = wake
        self._connections: dict[str, asyncio.Queue[Event | Ending]] = {}  # by token
        self._releases: dict[str, asyncio.Event] = {}  # set when nothing is left, by token
        self._reported: dict[str, Standing] = {}  # to who is connected, by token
        self._returning: set[str] = set()  # tokens: nothing was reported yet to who came back
        self._timer: asyncio.TimerHandle | None = None

    def methods(self, by: str | None) -> dict[str, Method]:
        """What holders ask for on the socket, as this user."""

        async def claim(params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
            ending = await self._hold(self._asked(params, by or ""), emit)
            if ending.kind in ("released", "vanished"):
                return {"ended": ending.kind}
            kind = Unserviceable if ending.kind == "refused" else MicError
            raise kind(ending.text, hint=ending.hint)

        async def release(params: Mapping[str, Any], _emit: Emit) -> dict[str, Any]:
            await self._release(self._asked(params, by or ""))
            return {"ended": "released"}

        return {"claim": claim, "release": release}

    # --- holders --------------------------------------------------------------------------------

    def _asked(self, params: Mapping[str, Any], by: str) -> Claim:
        """What somebody asks for. Raises Unserviceable where it makes no sense."""
        asked = read(_Asked, params)
        if not asked.model or not asked.token:
            raise Unserviceable("cannot claim: a claim has a model and a token")
        now = self._clock.steady()
        return Claim(
            token=asked.token[:_LONGEST],
            model=composed(asked.model[:_LONGEST]),
            size=asked.gpus,
            asked_at=now - min(max(asked.waited, 0.0), now),
            by=by,
            holder=one_line(asked.holder, _LONGEST),
            instance=asked.instance or None,
        )

    async def _hold(self, claim: Claim, emit: Emit) -> Ending:
        """Until the claim is over. Whoever is cut off here has vanished."""
        if self._refusal(claim) is not None and self.read_file is not None:
            # A refusal is for good, and the file may have been written just now. The holder may go
            # meanwhile; what was begun is finished.
            await asyncio.shield(self.read_file())
        token, known = claim.token, self._of(claim.token)
        if known is not None and (known.model, known.size) != (claim.model, claim.size):
            raise Unserviceable(f"cannot claim {claim.model}: its token is of another claim")
        if (why := self._refusal(claim)) is not None:
            return why
        if (former := self._connections.get(token)) is not None:
            text = "cannot hold the claim: another connection holds it now"
            former.put_nowait(Ending("failed", text))
        said = self._connections[token] = asyncio.Queue[Event | Ending]()
        self._reported.pop(token, None)
        if claim.instance is not None:
            self._returning.add(token)
        if known is None and claim.instance is None:
            self._emit("order", claim, f"claim {_wanted(claim)}")
        self._change(ask(self.claims, claim))
        try:
            while True:
                one = await said.get()
                if isinstance(one, Ending):
                    return one
                emit(one)
        finally:
            if self._connections.get(token) is said:
                del self._connections[token]
                self._change(vanish(self.claims, token, self._clock.steady()))

    def _refusal(self, claim: Claim) -> Ending | None:
        """Why nobody can ever have this; None: it can be had, or is had already."""
        config, waiting = self._desired.config, self._desired.waiting
        if not config.hash or claim.instance is not None or self._of(claim.token) is not None:
            return None
        if waiting is not None and _refused(claim, waiting) is None:
            return None
        return _refused(claim, config)

    async def _release(self, claim: Claim) -> None:
        """Returns when nothing is left of what it had. One that nobody knows has nothing."""
        known = self._of(claim.token)
        if known is None and claim.instance is None:
            return
        self._emit("order", known or claim, f"release its claim of {_wanted(claim)}")
        if known is None:
            self._change(ask(self.claims, replace(claim, ending=_RELEASED)))
        else:
            self._change(end(self.claims, claim.token, _RELEASED))
        await self._releases.setdefault(claim.token, asyncio.Event()).wait()

    def _of(self, token: str) -> Claim | None:
        return next((claim for claim in self.claims if claim.token == token), None)

    # --- rounds ---------------------------------------------------------------------------------

    async def add(
        self,
        state: DesiredState,
        inventory: GpuInventory,
        views: Iterable[RuntimeView],
        paused: Collection[str],
        pool: Executor,
        *,
        confirmed: bool,
    ) -> DesiredState:
        """What the file asks for, and what claims do: to be called in each round.

        `paused` are GPUs. It compiles in `pool`, where nothing waits for what somebody asks on the
        socket.
        """
        running = _running(views)
        concerned = state.fleet or self.claims or any(one.origin == ORIGIN for one in running or ())
        if state.down or not state.config_hash or not concerned:
            return state
        ground = Ground(
            entries=state.fleet,
            models=state.claimable,
            named=_named(state),
            running=running,
            coming=() if state.waiting is None else state.waiting.fleet,
            coming_models=() if state.waiting is None else state.waiting.claimable,
            now=self._clock.steady(),
            grace=float("inf") if self._grace is None else self._grace,
            confirmed=confirmed,
            avoided={
                *paused,
                *(gpu.uuid for gpu in inventory.gpus if gpu.trouble or gpu.processes),
            },
        )
        self._change(follow(self.claims, ground, ended=self._grace is None))
        with_claims = self._desired.with_claims
        state = await blocking(pool, with_claims, state, self.claims, inventory)
        return replace(state, claim_grace=self._grace)

    def on_snapshot(self, seen: Snapshot) -> None:
        """To be called with every snapshot, after those who answer questions from it."""
        if self._grace is None:
            return
        claims, over = fared(self.claims, seen, seen.busy)
        self._change(claims)
        for claim in [one for one in claims if one.token in over]:
            assert claim.ending is not None  # else it would not be over
            if (said := self._connections.pop(claim.token, None)) is not None:
                said.put_nowait(claim.ending)
            if (left := self._releases.pop(claim.token, None)) is not None:
                left.set()
        self._change(gone(claims, over))
        rows = {row.id: row for row in seen.statuses}
        unasked = {item.instance.id for item in seen.assessments if _is_unasked(item)}
        for claim in self.claims:
            said = self._connections.get(claim.token)
            now = standing(self.claims, claim, rows, seen.desired)
            if said is None or self._reported.get(claim.token) == now:
                continue
            told = claim.token in self._reported or claim.token in self._returning
            if told and claim.ending is None and claim.gpus is not None and unseen(claim, seen):
                continue
            # To who came back, what was last said stays said until more is known.
            if claim.token in self._returning and (
                (claim.gpus is None and claim.instance is not None)
                or (now.state == "starting" and claim.instance in unasked)
            ):
                continue
            self._returning.discard(claim.token)
            self._reported[claim.token] = now
            said.put_nowait(self._event("claim", claim, _words(now), phase=now.state))
        known = {claim.token for claim in self.claims}
        self._returning &= known
        self._reported = {token: now for token, now in self._reported.items() if token in known}
        self._set_timer()

    def _set_timer(self) -> None:
        """Have the next round come when time alone will have changed something."""
        now = self._clock.steady()
        waits: list[float] = []
        for claim in self.claims:
            if claim.ending is not None:
                waits.append(_WATCH)
            elif claim.vanished_at is not None:
                after = (RECONNECT, self._grace) if claim.found else (self._grace,)
                waits += [claim.vanished_at + one - now for one in after if one is not None]
        if self._timer is not None:
            self._timer.cancel()
        due = [wait for wait in waits if wait > 0]
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(due) + 0.01, self._wake) if due else None

    def _change(self, claims: Claims) -> None:
        """Take these over, say what is new about them, and have a round for it."""
        before = {claim.token: claim for claim in self.claims}
        if claims == self.claims:
            return
        known = {claim.token for claim in claims}
        left = {claim.gpus: claim for claim in self.claims if claim.token not in known}
        self.claims = claims
        self._wake()
        if self._grace is None:
            return
        for claim in claims:
            for text in _changes(before.get(claim.token), claim, left, self._grace):
                self._emit("claim", claim, text)

    def _emit(self, kind: Any, claim: Claim, text: str) -> None:
        by = claim.by or None if kind == "order" else None
        self._events.emit(self._event(kind, claim, text, by=by))

    def _event(self, kind: Any, claim: Claim, text: str, **more: Any) -> Event:
        about = claim.instance or claim.model, text, claim.model, claim.gpus or ()
        return Event(kind, self._clock.wall(), *about, **more)


def _refused(claim: Claim, config: Config) -> Ending | None:
    """Why that file never gives this; None: it does."""
    sizes = [len(entry.keys) for entry in config.entries if entry.fleet]
    return refusal(claim.model, claim.size, config.models, config.claimable, sizes)


def _is_unasked(item: Assessment) -> bool:
    """Whether a supervisor that has just come cannot know yet how it is."""
    warming = item.instance.warm_up is not None and item.health.warm_up is None
    return item.runs and (item.serving is None or warming)


def _named(state: DesiredState) -> set[str]:
    """The GPUs that the file says anything of."""
    named = {uuid for item in state.instances for uuid in item.gpus}
    named |= {uuid for item in state.unsatisfiable for uuid in item.gpus}
    named |= {uuid for entry in state.fleet for uuid in entry.gpus}
    named |= {uuid for uuid, value in state.aside if value == FLEET}
    return named | {*state.kept_empty}


def _running(views: Iterable[RuntimeView]) -> tuple[Running, ...] | None:
    """What is there of ours; None: that cannot be known."""
    found: list[Running] = []
    for view in views:
        if view.error is not None and view.last is None:
            return None
        for one in view.workloads if view.error is None else view.last or ():
            has = one.identity
            found.append(Running(has.instance, has.model, has.gpus, has.origin, is_alive(one)))
    return tuple(found)


def _wanted(claim: Claim) -> str:
    text = claim.model if claim.size == 1 else f"{claim.model} on {claim.size} GPUs"
    return f"{text} ({claim.holder})" if claim.holder else text


def _words(now: Standing) -> str:
    if now.state == "waiting":
        return f"waits for {now.reason}"
    return ": ".join(part for part in (now.phase or now.state, now.reason) if part)


def _changes(
    before: Claim | None, now: Claim, left: Mapping[tuple[str, ...] | None, Claim], grace: float
) -> Iterator[str]:
    """What happened to a claim, for the log and the history. `left` are those that are gone, by the
    GPUs that they had."""
    if now.ending is not None and (before is None or before.ending is None):
        yield f"the claim ends: {now.ending.text}"
    elif now.gpus is None:
        if before is not None and before.gpus is not None:
            waits = "the file took its GPUs back; the claim waits again"
            yield waits if now.ending is None else "its GPUs are free again"
    elif before is None:
        yield f"it runs for a claim whose holder is not back yet, and stays for {grace:g} s"
    elif before.gpus is None:
        other = left.get(now.gpus)
        if other is None:
            yield f"claimed by {called(now)}"
        else:
            yield _BACK if other.found else f"taken over by {called(now)}, as it runs"
    elif now.vanished_at is not None and before.vanished_at is None:
        yield f"the holder of its claim vanished; it stays for {grace:g} s"
    elif now.vanished_at is None and before.vanished_at is not None:
        yield _BACK
