"""All that can be asked of a converger, and all that it can be told to do.

The daemon serves one session on its socket. Where no daemon runs, a command has a session of its
own, in its own process: the same methods, and so the same answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mic_supervisor import __version__
from mic_supervisor.config.document import NONE, WAY_OUT, composed
from mic_supervisor.config.names import is_called, shown_id
from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.logs import log_of
from mic_supervisor.converge.loop import Converger
from mic_supervisor.converge.snapshot import ConfigState, Reloaded, Snapshot
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.host import host_name
from mic_supervisor.plan.actions import Change
from mic_supervisor.plan.assess import Selection
from mic_supervisor.plan.health import ON_ITS_WAY, Phase
from mic_supervisor.plan.memory import instance_of, memory_key
from mic_supervisor.plan.selection import Names, free_of_pauses, select, to_resume
from mic_supervisor.plan.status import InstanceStatus, chosen_rows, converged
from mic_supervisor.runtimes import Runtime
from mic_supervisor.text import one_line
from mic_supervisor.views import endpoints
from mic_supervisor.views.apply import Failure, apply_document
from mic_supervisor.views.plan import plan_document, to_text
from mic_supervisor.views.status import instances, pauses, status_document

_DOWN = frozenset({Phase.BACKOFF, Phase.BLOCKED, Phase.STUCK_STOPPING})
_LONGEST_REASON = 500  # characters of why somebody paused something

Emit = Callable[[Event], None]
Method = Callable[[Mapping[str, Any], Emit], Awaitable[Any]]

QUESTIONS = frozenset({"ping", "status", "plan", "endpoints", "history", "logs"})
"""Methods that change nothing. They need no lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The methods by name. Questions are answered from the last snapshot.

    `config` tells which configuration runs, `current` the hash of what the file says now, if that
    is known. `reload` reads the file: with the word of a person behind it, or because a command has
    just written the document of this hash. `runtimes` are those whose logs are read. `own`: the
    converger is this command's own, which acts only when and as far as it is told to; a daemon's
    follows the whole file all the time.
    """

    scope: str
    path: Path
    converger: Converger
    events: Events
    snapshots: Snapshots
    config: Callable[[], ConfigState]
    history: Callable[[], Iterable[Event]]
    reload: Callable[[bool, str], Awaitable[Reloaded]]
    current: Callable[[], str | None] = lambda: None
    runtimes: Mapping[str, Runtime] = field(default_factory=dict)
    own: bool = False

    def methods(self) -> dict[str, Method]:
        return {
            "ping": self._ping,
            "status": self._status,
            "plan": self._plan,
            "endpoints": self._endpoints,
            "reload": self._asked_to_reload,
            "apply": self._apply,
            "edited": self._edited,
            "restart": self._restart,
            "retry": self._retry,
            "pause": self._pause,
            "resume": self._resume,
            "history": self._past,
            "logs": self._logs,
        }

    # --- questions ------------------------------------------------------------------------------

    async def _ping(self, _params: Mapping[str, Any], _emit: Emit) -> dict[str, Any]:
        return {"version": __version__, "scope": self.scope}

    async def _status(self, _params: Mapping[str, Any], _emit: Emit) -> dict[str, Any]:
        snapshot = await self.snapshots.first()
        in_use = self.config().in_use
        return asdict(status_document(snapshot, in_use, host_name(), daemon=not self.own))

    async def _endpoints(self, _params: Mapping[str, Any], _emit: Emit) -> dict[str, Any]:
        snapshot = await self.snapshots.first()
        return endpoints.document(snapshot.endpoints, host_name())

    async def _plan(self, params: Mapping[str, Any], _emit: Emit) -> dict[str, Any] | None:
        """What is still out of sync, or what a file would change that waits for a person's word.

        Nothing is read again for it. None: that would not be about the file at `path`, as it is
        now.
        """
        path = params.get("path")
        if not self.own and path is not None and Path(path).resolve() != self.path.resolve():
            return None
        current = None if self.own else await asyncio.to_thread(self.current)
        snapshot = await self.snapshots.first()
        if not self.own and current != snapshot.desired.config_hash:
            waiting = snapshot.waiting()
            if waiting is None or waiting.desired.config_hash != current:
                return None
            snapshot = waiting
        targets = self._targets(params, snapshot, "plan")
        plan, busy = snapshot.plan, snapshot.busy
        if targets is not None:
            plan = snapshot.limited(targets)
            busy &= _ids(targets, snapshot)
        return {
            "document": asdict(
                plan_document(plan, host=host_name(), config_hash=snapshot.desired.config_hash)
            ),
            "text": to_text(
                plan, snapshot.indices, {row.id: row.model for row in snapshot.statuses}
            ),
            "empty": plan.empty and not busy,
            "busy": sorted(
                shown_id(row.id, row.model) for row in snapshot.statuses if row.id in busy
            ),
        }

    async def _past(self, params: Mapping[str, Any], _emit: Emit) -> list[dict[str, Any]]:
        name = params.get("name")
        return [
            asdict(event)
            for event in reversed([*self.history()])
            if name is None or is_called(str(name), event.instance, [event.model])
        ]

    async def _logs(self, params: Mapping[str, Any], _emit: Emit) -> dict[str, Any]:
        """The end of a log, as it was written: for who may ask a daemon and not look himself."""
        snapshot = await self.snapshots.first()
        servers = {model: row.id for row in snapshot.statuses for model in row.inside}
        log = log_of(str(params.get("name", "")), snapshot.observed, servers.get)
        asked = params.get("lines")
        tail = asked if isinstance(asked, int) else None
        read = partial(log.last, tail=tail, previous=bool(params.get("previous")))
        lines, cut = await asyncio.to_thread(read, self.runtimes)
        return {"lines": lines, "cut": cut, "server": log.server}

    # --- orders ---------------------------------------------------------------------------------

    async def _asked_to_reload(self, _params: Mapping[str, Any], _emit: Emit) -> dict[str, Any]:
        return await self._read_file(confirm=True)

    async def _read_file(self, *, confirm: bool, written: str = "") -> dict[str, Any]:
        # Whoever asked may be gone already; what was begun is finished.
        outcome = await asyncio.shield(asyncio.ensure_future(self.reload(confirm, written)))
        if outcome.error is not None:
            raise ConfigError(
                "the configuration has errors",
                outline=outcome.error,
                hint=f"generation {outcome.generation} keeps running",
            )
        if outcome.unconfirmed is not None:
            raise MicError(f"cannot follow the file: {outcome.unconfirmed}", hint=WAY_OUT)
        return {
            "changed": outcome.changed,
            "generation": outcome.generation,
            "confirmed": outcome.confirmed,
        }

    async def _apply(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """Reload, try everything again, and wait until there is nothing left to wait for.

        With targets it waits for those alone, and neither confirms nor forgives anything else. A
        daemon converges the rest all the same: it knows of no half of a file.
        """
        self._check_path(params)
        with self._listening(emit) as errors:
            await self._read_file(confirm=not params.get("targets"))
            if params.get("rebind"):
                self.converger.rebind()
            targets, only = await self._chosen(params, "apply")
            self.converger.forgive(only)
            self._begin(targets)
            self._emit_changes_under_way(emit, only)
            snapshot = await self.snapshots.converged(targets)
        left_out = () if targets is None else snapshot.limited(targets).left_out
        if not self.own:  # of what else is due, a daemon leaves only removals
            left_out = tuple(change for change in left_out if change.kind == "remove")
        return _outcome(snapshot, errors, targets, left_out)

    async def _edited(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """As apply, after one entry was edited: no removal is confirmed, nothing is forgiven.

        What a loss of the memory keeps as it is on the entry's GPUs goes on. `hash` is of the
        document that the edit made.
        """
        self._check_path(params)
        with self._listening(emit) as errors:
            await self._read_file(confirm=False, written=str(params.get("hash", "")))
            targets, only = await self._chosen(params, "follow the file on")
            self.converger.explain(only or ())
            self._begin(targets)
            snapshot = await self.snapshots.converged(targets)
        left_out = () if targets is None or not self.own else snapshot.limited(targets).left_out
        return _outcome(snapshot, errors, targets, left_out)

    async def _restart(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        return await self._again(params, emit, "restart")

    async def _retry(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        return await self._again(params, emit, "retry")

    async def _again(
        self, params: Mapping[str, Any], emit: Emit, action: Literal["restart", "retry"]
    ) -> dict[str, Any]:
        """The outcome, what of it had failed before, and for which instances something is done."""
        names = await self._named(str(params.get("name", "")), action)
        instances = {instance_of(name) for name in names}
        begun: set[str] = set()

        def note(event: Event) -> None:
            if event.kind == "begin" and event.instance in instances:
                begun.add(event.instance)
            emit(event)

        with self._listening(note) as errors:
            if self.own:  # it follows the file as it is now; a daemon already does
                await self._read_file(confirm=False)
            failed = self.converger.forgive(names)
            if action == "restart":
                self.converger.force(names)
            self._begin(None)
            self._emit_changes_under_way(note, instances)
            snapshot = await self.snapshots.converged()
        document = _outcome(snapshot, errors) | {"named": names}
        return document | {"failed_before": sorted(failed), "begun": sorted(begun)}

    async def _pause(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """Returns when nothing is done any more for what is paused."""
        snapshot = await self.snapshots.first()
        names = [str(name) for name in params.get("names", ())]
        chosen = select(names, self._names(snapshot), f"pause {' '.join(names)}")
        reason = params.get("reason")
        with self._listening(emit):
            self.converger.pause(chosen, one_line(str(reason), _LONGEST_REASON) if reason else None)
            snapshot = await self.snapshots.seen(
                lambda seen: not seen.busy & {row.id for row in _concerned(chosen, seen)}
            )
        indices = snapshot.indices
        return {
            "paused": [asdict(one) for one in pauses(snapshot.memory.paused, indices)],
            "named": chosen.called(indices),
            "instances": [asdict(row) for row in instances(_concerned(chosen, snapshot), indices)],
        }

    async def _resume(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """Returns when what is not paused any more has nothing left to wait for.

        A command of its own starts nothing for it: the next apply does.
        """
        snapshot = await self.snapshots.first()
        names = [str(name) for name in params.get("names", ())]
        chosen = to_resume(names, self._names(snapshot), self.converger.memory.paused)
        with self._listening(emit) as errors:
            self.converger.resume(chosen)
            if not self.own:
                snapshot = await self.snapshots.converged(chosen)
        ids = {row.id for row in _concerned(chosen, snapshot)}
        document = _outcome(snapshot, errors)
        rows = [row for row in document["instances"] if row["id"] in ids]
        return document | {"instances": rows, "resumed": chosen.called(snapshot.indices)}

    # --- what several have in common ------------------------------------------------------------

    def _begin(self, targets: Selection | None) -> None:
        """Have a converger of one's own act, on these alone."""
        if self.own:
            self.converger.act(targets)

    async def _chosen(
        self, params: Mapping[str, Any], action: str
    ) -> tuple[Selection | None, set[str] | None]:
        """The targets, and the ids of their instances; None, None: everything."""
        if not params.get("targets"):
            return None, None
        snapshot = await self.snapshots.next()
        targets = self._targets(params, snapshot, action)
        assert targets is not None  # there are some
        return targets, _ids(targets, snapshot)

    def _emit_changes_under_way(self, emit: Emit, only: Collection[str] | None = None) -> None:
        """The watcher is often faster than the command: what it began is waited for as well."""
        snapshot = self.converger.snapshot
        if self.own or snapshot is None:
            return
        for row in snapshot.statuses:
            if row.phase in ON_ITS_WAY and (only is None or row.id in only):
                about = (row.id, row.reason or "under way already", row.model, row.gpus)
                emit(Event("begin", time.time(), *about, phase=row.phase.value))

    def _check_path(self, params: Mapping[str, Any]) -> None:
        path = Path(str(params.get("path", self.path)))
        if path.resolve() != self.path.resolve():
            raise MicError(
                f"cannot apply {path}: the daemon runs {self.path}",
                hint="edit that file; `mic-supervisor plan FILE` compares another one",
            )

    def _names(self, snapshot: Snapshot) -> Names:
        """What there is to be named: in the file, running, or paused."""
        paused = snapshot.memory.paused
        models = {*self.config().models, *paused.models}
        models |= {row.model for row in snapshot.statuses if row.model != NONE}
        instances = {row.id: (row.model, row.gpus) for row in snapshot.statuses if row.gpus}
        return Names.of(
            snapshot.desired, models, snapshot.observed.inventory, paused.gpus, instances
        )

    def _targets(
        self, params: Mapping[str, Any], snapshot: Snapshot, action: str
    ) -> Selection | None:
        names = [str(name) for name in params.get("targets", ())]
        return (
            select(names, self._names(snapshot), f"{action} {' '.join(names)}") if names else None
        )

    async def _named(self, name: str, action: str) -> list[str]:
        """The instances of a name, but for those that are paused; all paused is an error. Of a
        model in a server of several, `memory_key`.
        """
        snapshot = await self.snapshots.first()
        rows, model = snapshot.statuses, composed(name)
        found = [row for row in rows if is_called(name, row.id, [row.model])]
        inside = [] if found else [row for row in rows if model in row.inside]
        if not found and not inside:
            with suppress(MicError):  # it is no GPU either: that is said below
                found = _concerned(select([name], self._names(snapshot), action), snapshot)
        if not found and not inside:
            known = ", ".join(
                one for row in rows for one in (shown_id(row.id, row.model), *row.inside)
            )
            raise MicError(
                f"cannot {action} {name}: there is no instance {name!r}",
                hint=f"there is {known}" if known else None,
            )
        concerned = [(row.id, row.model, row.gpus) for row in found or inside]
        about = snapshot.memory.paused, f"{action} {name}", snapshot.indices, snapshot.at
        free = free_of_pauses(concerned, *about)
        if not inside:
            return free
        for row in inside:
            if row.phase in _DOWN:
                raise MicError(
                    f"cannot {action} {name}: its server, {row.id}, is not up: {row.reason}",
                    hint=f"mic-supervisor retry {row.id}",
                )
        return free_of_pauses([(memory_key(row.id, model), model, ()) for row in inside], *about)

    @contextmanager
    def _listening(self, emit: Emit) -> Iterator[dict[str, Failure]]:
        """Pass events on meanwhile, and keep the last failure of each instance."""
        errors: dict[str, Failure] = {}

        def listen(event: Event) -> None:
            if event.kind == "failed":
                errors[event.instance] = Failure(event.instance, event.text, event.hint)
            emit(event)

        self.events.listeners.append(listen)
        try:
            yield errors
        finally:
            self.events.listeners.remove(listen)


def _outcome(
    snapshot: Snapshot,
    errors: Mapping[str, Failure],
    targets: Selection | None = None,
    left_out: Iterable[Change] = (),
) -> dict[str, Any]:
    """The document of `apply`, and of all that converge as it does."""
    return asdict(apply_document(snapshot, errors.values(), host_name(), targets, left_out))


def _ids(targets: Selection, snapshot: Snapshot) -> set[str]:
    """Of the instances by which it is told how the chosen fare."""
    return {row.id for row in chosen_rows(targets, snapshot.desired, snapshot.statuses)}


def _concerned(chosen: Selection, snapshot: Snapshot) -> list[InstanceStatus]:
    """The rows of everything that a pause of these holds, named by the file or not."""
    return [
        row for row in snapshot.statuses if row.model in chosen.models or chosen.gpus & {*row.gpus}
    ]


# --- waiting for the loop to have nothing left to do --------------------------------------------


class Snapshots:
    """Lets many wait, each for a round that began after it had asked."""

    def __init__(self, converger: Converger, clock: Callable[[], float]) -> None:
        self._converger = converger
        self._clock = clock
        self._waiting: list[Callable[[Snapshot], None]] = []
        self._last: Snapshot | None = None

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """To be called with every snapshot."""
        self._last = snapshot
        for emit in [*self._waiting]:
            emit(snapshot)

    async def first(self) -> Snapshot:
        """The last snapshot, once there is one."""
        return self._last or await self._wait(lambda _snapshot: True)

    async def next(self) -> Snapshot:
        """The first snapshot of a round that begins from now on."""
        return await self.seen(lambda _snapshot: True)

    async def converged(self, targets: Selection | None = None) -> Snapshot:
        """The first snapshot of a round from now on that leaves nothing to wait for.

        With `targets` it is about those alone.
        """
        began = self._clock()
        return await self.seen(lambda snapshot: all_converged(snapshot, began, targets))

    async def seen(self, enough: Callable[[Snapshot], bool]) -> Snapshot:
        """The first snapshot of a round from now on that is enough."""
        after = self._converger.rounds_begun
        return await self._wait(lambda snapshot: snapshot.round > after and enough(snapshot))

    async def _wait(self, enough: Callable[[Snapshot], bool]) -> Snapshot:
        found: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()

        def emit(snapshot: Snapshot) -> None:
            if not found.done() and enough(snapshot):
                found.set_result(snapshot)

        self._waiting.append(emit)
        self._converger.wake()
        try:
            return await found
        finally:
            self._waiting.remove(emit)


def all_converged(snapshot: Snapshot, began: float, targets: Selection | None = None) -> bool:
    """Whether an apply that began then has nothing left to wait for."""
    only = None if targets is None else _ids(targets, snapshot)
    if snapshot.busy if only is None else snapshot.busy & only:
        return False
    return converged(
        snapshot.desired,
        snapshot.plan,
        snapshot.statuses,
        snapshot.memory,
        began=began,
        now=snapshot.now,
        only=only,
    )
