"""All that can be asked of a converger, and all that it can be told to do.

The daemon serves one session on its socket. Where no daemon runs, a command has a session of its
own, in its own process: the same methods, and so the same answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mic_supervisor import __version__
from mic_supervisor.clocks import boot_id
from mic_supervisor.config.document import NONE, WAY_OUT
from mic_supervisor.config.names import composed, is_called, shown_id
from mic_supervisor.converge.claims import ClaimDesk
from mic_supervisor.converge.events import Event, EventKind, Events, Order
from mic_supervisor.converge.logs import last_of_each, logs_of
from mic_supervisor.converge.loop import Converger
from mic_supervisor.converge.newer import look_for_newer
from mic_supervisor.converge.outcome import Noted, Snapshots, ids, outcome, running
from mic_supervisor.converge.params import Params, typed
from mic_supervisor.converge.snapshot import ConfigState, Reloaded, Snapshot
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.host import host_name
from mic_supervisor.plan import ledger
from mic_supervisor.plan.assess import Assessment, Selection
from mic_supervisor.plan.health import ON_ITS_WAY, Phase
from mic_supervisor.plan.memory import Drained, instance_of, memory_key
from mic_supervisor.plan.selection import Names, drained, free_of_pauses, select, to_resume
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.runtimes import Runtime
from mic_supervisor.text import one_line
from mic_supervisor.views import endpoints
from mic_supervisor.views.plan import plan_document, to_text
from mic_supervisor.views.status import instances, pauses, status_document, unreadable

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
    just written the document of this hash. `runtimes` are those whose logs are read. `by` is who
    orders. `own`: the converger is this command's own, which acts only when and as far as it is
    told to; a daemon's follows the whole file all the time.
    """

    scope: str
    path: Path
    converger: Converger
    events: Events
    snapshots: Snapshots
    config: Callable[[], ConfigState]
    history: Callable[[], Iterable[Event]]
    reload: Callable[[bool, str, Order], Awaitable[Reloaded]]
    current: Callable[[], str | None] = lambda: None
    runtimes: Mapping[str, Runtime] = field(default_factory=dict)
    by: str | None = None
    own: bool = False
    claims: ClaimDesk | None = None  # None: nobody can claim anything here

    def methods_for(self, by: str | None) -> dict[str, Method]:
        """The same, for the orders of this user."""
        return replace(self, by=by).methods()

    def methods(self) -> dict[str, Method]:
        own = {
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
            "drain": self._drain,
            "undrain": self._undrain,
            "killed": self._killed,
            "history": self._past,
            "logs": self._logs,
        }
        claims = {} if self.claims is None else self.claims.methods(self.by)
        return {name: typed(method) for name, method in own.items()} | claims

    # --- questions ------------------------------------------------------------------------------

    async def _ping(self, _params: Params, _emit: Emit) -> dict[str, Any]:
        return {"version": __version__, "scope": self.scope}

    async def _status(self, _params: Params, _emit: Emit) -> dict[str, Any]:
        snapshot = await self.snapshots.first()
        in_use = self.config().in_use
        return asdict(status_document(snapshot, in_use, host_name(), daemon=not self.own))

    async def _endpoints(self, _params: Params, _emit: Emit) -> dict[str, Any]:
        snapshot = await self.snapshots.first()
        return endpoints.document(snapshot.endpoints, host_name(), snapshot.statuses)

    async def _plan(self, params: Params, _emit: Emit) -> dict[str, Any] | None:
        """What is still out of sync, or what a file would change that waits for a person's word.

        Nothing is read again for it. None: that would not be about the file at `path`, as it is
        now.
        """
        if not self.own and not self._is_followed(params.path):
            return None
        current = None if self.own else await asyncio.to_thread(self.current)
        snapshot = await self.snapshots.first()
        if not self.own and current != snapshot.desired.config_hash:
            waiting = snapshot.waiting()
            if waiting is None or waiting.desired.config_hash != current:
                return None
            snapshot = waiting
        targets = self._targets(params, snapshot, "plan")
        only, ask = None if targets is None else ids(targets, snapshot), params.pull
        newer = await look_for_newer(snapshot, only, self.runtimes, ask=ask)
        if ask:
            snapshot = snapshot.renewed(newer.pulled, newer.restarts)
        plan, busy = snapshot.plan, snapshot.busy
        if targets is not None:
            plan = snapshot.limited(targets)
            busy &= ids(targets, snapshot)
        plan = replace(plan, warnings=(*plan.warnings, *newer.warnings))
        return {
            "document": asdict(
                plan_document(
                    plan,
                    host=host_name(),
                    config_hash=snapshot.desired.config_hash,
                    profile=snapshot.desired.profile,
                )
            ),
            "text": to_text(
                plan,
                snapshot.indices,
                {row.id: row.model for row in snapshot.statuses},
                snapshot.desired.profile,
            ),
            "empty": plan.empty and not busy,
            "busy": sorted(
                shown_id(row.id, row.model) for row in snapshot.statuses if row.id in busy
            ),
        }

    async def _past(self, params: Params, _emit: Emit) -> list[dict[str, Any]]:
        name = params.name
        return [
            asdict(event)
            for event in reversed([*self.history()])
            if name is None or is_called(name, event.instance, [event.model])
        ]

    async def _logs(self, params: Params, _emit: Emit) -> dict[str, Any]:
        """The end of a log, as it was written: for who may ask a daemon and not look himself."""
        snapshot = await self.snapshots.first()
        servers = {model: row.id for row in snapshot.statuses for model in row.inside}
        logs = logs_of(params.name, snapshot.observed, servers.get)
        read = partial(last_of_each, logs, tail=params.lines, previous=params.previous)
        lines, cut = await asyncio.to_thread(read, self.runtimes)
        return {"lines": lines, "cut": cut, "server": logs[0].server}

    # --- orders ---------------------------------------------------------------------------------

    async def _asked_to_reload(self, params: Params, _emit: Emit) -> dict[str, Any]:
        return await self._read_file(self._order(params, "reload"), confirm=True)

    async def _read_file(self, order: Order, *, confirm: bool, written: str = "") -> dict[str, Any]:
        # Whoever asked may be gone already; what was begun is finished.
        outcome = await asyncio.shield(asyncio.ensure_future(self.reload(confirm, written, order)))
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

    async def _apply(self, params: Params, emit: Emit) -> dict[str, Any]:
        """Reload, try everything again, and wait until there is nothing left to wait for.

        With targets it waits for those alone, and neither confirms nor forgives anything else. A
        daemon converges the rest all the same: it knows of no half of a file.
        """
        self._check_path(params.path)
        order, before = self._order(params, "apply"), await self.snapshots.first()
        with self._listening(emit) as noted:
            await self._read_file(order, confirm=not params.targets)
            if params.rebind:
                self.converger.rebind()
            targets, only = await self._chosen(params, "apply", order, before)
            not_pulled = await self._take_newer(only) if params.pull else frozenset()
            self.converger.forgive(only)
            self._begin(targets)
            self._emit_changes_under_way(noted.emit, only)
            snapshot = await self.snapshots.converged(targets)
        left_out = () if targets is None else snapshot.limited(targets).left_out
        if not self.own:  # of what else is due, a daemon leaves only removals
            left_out = tuple(change for change in left_out if change.kind == "remove")
        return outcome(snapshot, noted, targets, left_out, not_pulled)

    async def _take_newer(self, only: Collection[str] | None) -> frozenset[str]:
        """Have what is newer take the place of what runs; returns whose image cannot be had."""

        def emit(kind: EventKind, item: Assessment, text: str, hint: str | None = None) -> None:
            about = (item.instance.id, text, item.instance.model, item.instance.gpus)
            self.events.emit(Event(kind, time.time(), *about, hint=hint, phase="pull"))

        seen, report = await self.snapshots.next(), partial(emit, "progress")
        newer = await look_for_newer(seen, only, self.runtimes, ask=True, report=report)
        for item, error in newer.failures:
            emit("failed", item, error.message, error.hint)
        self.converger.memory = ledger.pulled(self.converger.memory, newer.pulled)
        self.converger.force(newer.restarts)
        return frozenset(item.instance.id for item, _ in newer.failures)

    async def _edited(self, params: Params, emit: Emit) -> dict[str, Any]:
        """As apply, after one entry was edited: no removal is confirmed, nothing is forgiven.

        What a loss of the memory keeps as it is on the entry's GPUs goes on. `hash` is of the
        document that the edit made.
        """
        self._check_path(params.path)
        order, before = self._order(params, "edit"), await self.snapshots.first()
        with self._listening(emit) as noted:
            await self._read_file(order, confirm=False, written=params.hash)
            targets, only = await self._chosen(params, "follow the file on", order, before)
            self.converger.explain(only or ())
            self._begin(targets)
            snapshot = await self.snapshots.converged(targets)
        left_out = () if targets is None or not self.own else snapshot.limited(targets).left_out
        unknown = unreadable(snapshot.observed, () if targets is None else targets.gpus)
        return outcome(snapshot, noted, targets, left_out) | {"unreadable": unknown}

    async def _restart(self, params: Params, emit: Emit) -> dict[str, Any]:
        return await self._again(params, emit, "restart")

    async def _retry(self, params: Params, emit: Emit) -> dict[str, Any]:
        return await self._again(params, emit, "retry")

    async def _again(
        self, params: Params, emit: Emit, action: Literal["restart", "retry"]
    ) -> dict[str, Any]:
        """The outcome, what of it had failed before, and for which instances something is done."""
        names = await self._named(params, action)
        instances, order = {instance_of(name) for name in names}, self._order(params, action)
        with self._listening(emit) as noted:
            if self.own:  # it follows the file as it is now; a daemon already does
                await self._read_file(order, confirm=False)
            rows = (await self.snapshots.first()).statuses
            self._emit_order(order, [row for row in rows if row.id in instances])
            failed = self.converger.forgive(names)
            if action == "restart":
                self.converger.force(names)
            self._begin(None)
            self._emit_changes_under_way(noted.emit, instances)
            snapshot = await self.snapshots.converged()
        document = outcome(snapshot, noted) | {"named": names}
        begun = sorted(instances & noted.begun.keys())
        return document | {"failed_before": sorted(failed), "begun": begun}

    async def _pause(self, params: Params, emit: Emit) -> dict[str, Any]:
        """Returns when nothing is done any more for what is paused."""
        snapshot = await self.snapshots.first()
        chosen = select(params.names, self._names(snapshot), f"pause {' '.join(params.names)}")
        why = one_line(params.reason, _LONGEST_REASON) if params.reason else None
        with self._listening(emit):
            self.converger.pause(chosen, why, self.by)
            snapshot = await self.snapshots.seen(
                lambda seen: not seen.busy & {row.id for row in _concerned(chosen, seen)}
            )
        indices = snapshot.indices
        return {
            "paused": [asdict(one) for one in pauses(snapshot.memory.paused, indices)],
            "named": chosen.called(indices),
            "instances": [asdict(row) for row in instances(_concerned(chosen, snapshot), indices)],
        }

    async def _resume(self, params: Params, emit: Emit) -> dict[str, Any]:
        """Returns when what is not paused any more has nothing left to wait for.

        A command of its own starts nothing for it: the next apply does.
        """
        snapshot = await self.snapshots.first()
        chosen = to_resume(params.names, self._names(snapshot), self.converger.memory.paused)
        with self._listening(emit) as noted:
            self.converger.resume(chosen, self.by)
            if not self.own:
                # What the file no longer asks for is no target of a plan, and was paused, too.
                snapshot = await self.snapshots.converged(
                    chosen, lambda seen: {row.id for row in _concerned(chosen, seen)}
                )
        ids = {row.id for row in _concerned(chosen, snapshot)}
        document = outcome(snapshot, noted)
        rows = [row for row in document["instances"] if row["id"] in ids]
        return document | {"instances": rows, "resumed": chosen.called(snapshot.indices)}

    async def _drain(self, params: Params, emit: Emit) -> dict[str, Any]:
        """Returns when everything has stopped, or cannot be: the outcome, and what has stopped."""
        before = await self.snapshots.first()
        known = before.memory.drained or Drained(time.time())
        order = Drained(
            known.since,
            one_line(params.reason, _LONGEST_REASON) if params.reason else known.reason,
            boot_id() if params.until_reboot else None,
        )
        if before.memory.paused:
            names = Selection(
                frozenset(before.memory.paused.models), frozenset(before.memory.paused.gpus)
            ).called(before.indices)
            raise MicError(
                f"cannot drain the host: {', '.join(names)} {'is' if len(names) == 1 else 'are'} "
                "paused, and would go on",
                hint="end the pauses first: mic-supervisor resume --all",
            )
        with self._listening(emit) as noted:
            self.converger.drain(order, self.by)
            self._begin(None)
            snapshot = await self.snapshots.converged()
        if snapshot.memory.drained is None:
            raise MicError(
                "cannot drain the host: somebody has undrained it meanwhile",
                hint="see who: mic-supervisor history",
            )
        left = running(snapshot)
        stopped = {one: model for one, model in running(before).items() if one not in left}
        unknown = unreadable(snapshot.observed)
        return outcome(snapshot, noted) | {"stopped": stopped, "left": left, "unreadable": unknown}

    async def _undrain(self, _params: Params, emit: Emit) -> dict[str, Any]:
        """Returns when everything is as the file says. A command of its own starts nothing for it:
        the next apply does.
        """
        snapshot = await self.snapshots.first()
        if snapshot.memory.drained is None:
            raise MicError("cannot undrain the host: it is not drained")
        with self._listening(emit) as noted:
            self.converger.drain(None, self.by)
            if not self.own:
                snapshot = await self.snapshots.converged()
        return outcome(snapshot, noted)

    async def _killed(self, params: Params, _emit: Emit) -> None:
        """A command has ended a process that holds GPUs, and says so: we only keep it."""
        about = (params.pid, params.text, "", params.gpus, "kill")
        self.events.emit(Event("order", time.time(), *about, by=self.by))

    # --- what several have in common ------------------------------------------------------------

    def _order(self, params: Params, method: str) -> Order:
        """A command of an earlier version does not say what was typed."""
        said = method if params.command is None else params.command
        return Order(one_line(said, _LONGEST_REASON), self.by)

    def _emit_order(self, order: Order, rows: Iterable[InstanceStatus]) -> None:
        for row in rows:
            about = (row.id, order.command, row.model, row.gpus)
            self.events.emit(Event("order", time.time(), *about, by=order.by))

    def _begin(self, targets: Selection | None) -> None:
        """Have a converger of one's own act, on these alone."""
        if self.own:
            self.converger.act(targets)

    async def _chosen(
        self, params: Params, action: str, order: Order, before: Snapshot
    ) -> tuple[Selection | None, set[str] | None]:
        """The targets, and the ids of their instances; None, None: everything."""
        if not params.targets:
            return None, None
        snapshot = await self.snapshots.next()
        targets = self._targets(params, snapshot, action)
        assert targets is not None  # there are some
        # What leaves may be gone already: a daemon was told of the file by the watch.
        rows = {row.id: row for seen in (before, snapshot) for row in _concerned(targets, seen)}
        self._emit_order(order, [row for row in rows.values() if row.backend])
        return targets, ids(targets, snapshot)

    def _emit_changes_under_way(self, emit: Emit, only: Collection[str] | None = None) -> None:
        """The watcher is often faster than the command: what it began is waited for as well."""
        snapshot = self.converger.snapshot
        if self.own or snapshot is None:
            return
        for row in snapshot.statuses:
            if row.phase in ON_ITS_WAY and (only is None or row.id in only):
                about = (row.id, row.reason or "under way already", row.model, row.gpus)
                emit(Event("begin", time.time(), *about, phase=row.phase.value))

    def _is_followed(self, path: str | None) -> bool:
        """Whether it is the file of this session; None: it is."""
        with suppress(ValueError, RuntimeError):  # it is no path, or one that goes in circles
            return path is None or Path(path).resolve() == self.path.resolve()
        return False

    def _check_path(self, path: str | None) -> None:
        if not self._is_followed(path):
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

    def _targets(self, params: Params, snapshot: Snapshot, action: str) -> Selection | None:
        names = params.targets
        return (
            select(names, self._names(snapshot), f"{action} {' '.join(names)}") if names else None
        )

    async def _named(self, params: Params, action: str) -> list[str]:
        """The instances of a name, or of all, but for those that are paused; all paused is an
        error, and so is a host that is drained. Of a model in a server of several, `memory_key`.
        """
        snapshot = await self.snapshots.first()
        everything, name = params.all, "--all" if params.all else params.name or ""
        if (order := snapshot.memory.drained) is not None:
            why = drained(order, snapshot.at)
            raise MicError(f"cannot {action} {name}: {why}", hint=why.hint)
        rows, model = snapshot.statuses, composed(name)
        found = [row for row in rows if row.backend] if everything else []
        found = found or [row for row in rows if is_called(name, row.id, [row.model])]
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
    def _listening(self, emit: Emit) -> Iterator[Noted]:
        """Pass events on meanwhile, and keep what tells how the order ended."""
        noted = Noted(emit)
        self.events.listeners.append(noted.emit)
        try:
            yield noted
        finally:
            self.events.listeners.remove(noted.emit)


def _concerned(chosen: Selection, snapshot: Snapshot) -> list[InstanceStatus]:
    """The rows of everything that a pause of these holds, named by the file or not."""
    return [
        row for row in snapshot.statuses if row.model in chosen.models or chosen.gpus & {*row.gpus}
    ]
