"""What may be asked of the daemon over its socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mic_supervisor import __version__
from mic_supervisor.config.doubt import WAY_OUT
from mic_supervisor.config.merge import NONE
from mic_supervisor.config.names import composed
from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.state import host_name
from mic_supervisor.daemon.control import Method, Tell
from mic_supervisor.daemon.settle import Settling
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.http.published import status_of
from mic_supervisor.plan import endpoints, render
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.pauses import free_of_pauses, to_resume
from mic_supervisor.plan.reconcile import reconcile
from mic_supervisor.plan.selection import Names, Selection, select
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.views.apply import apply_document
from mic_supervisor.views.plan import plan_document
from mic_supervisor.views.status import instances, pauses

if TYPE_CHECKING:
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.converge.loop import Converger
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.daemon.generations import Reloaded
    from mic_supervisor.http.published import Published
    from mic_supervisor.plan.actions import Plan


_ON_ITS_WAY = (
    Phase.PENDING,
    Phase.STOPPING,
    Phase.WAITING_VRAM,
    Phase.STARTING,
    Phase.LOADING,
)


class Requests:
    """The methods of the socket. Questions are answered from what was published last.

    `reload` reads the file; with its argument, with the word of a person behind it.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        converger: Converger,
        events: Events,
        settling: Settling,
        published: Callable[[], Published],
        reload: Callable[[bool], Any],
    ) -> None:
        self._settings = settings
        self._converger = converger
        self._events = events
        self._settling = settling
        self._published = published
        self._reload = reload

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
            "history": self._history,
        }

    async def _ping(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        return {"version": __version__, "scope": self._settings.scope}

    async def _status(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        await self._settling.first()
        document = status_of(self._published())
        assert document is not None  # there was a first snapshot
        return asdict(document)

    async def _endpoints(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        snapshot = await self._settling.first()
        return endpoints.document(snapshot.endpoints, host_name())

    async def _plan(self, params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        """What is still out of sync; nothing is read again for it."""
        snapshot = await self._settling.first()
        targets = self._targets(params, snapshot, "plan")
        plan, busy = snapshot.plan, snapshot.busy
        if targets is not None:
            plan = self._limited(snapshot, targets)
            busy &= {row.id for row in targets.rows(snapshot.desired, snapshot.statuses)}
        return {
            "document": asdict(
                plan_document(plan, host=host_name(), config_hash=snapshot.desired.config_hash)
            ),
            "text": render.to_text(plan, indices_of(snapshot)),
            "empty": plan.empty and not busy,
            "busy": sorted(busy),
        }

    async def _asked_to_reload(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        return await self._read_file(confirm=True)

    async def _read_file(self, *, confirm: bool) -> dict[str, Any]:
        # Whoever asked may be gone already; what was begun is finished.
        outcome: Reloaded = await asyncio.shield(self._reload(confirm))
        if outcome.error is not None:
            raise ConfigError(
                "the configuration has errors",
                rendered=outcome.error,
                hint=f"generation {outcome.generation} keeps running",
            )
        if outcome.unconfirmed is not None:
            raise MicError(f"cannot follow the file: {outcome.unconfirmed}", hint=WAY_OUT)
        return {"changed": outcome.changed, "generation": outcome.generation}

    async def _apply(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """Reload, try everything again, and wait until there is nothing left to wait for.

        With targets it waits for those alone, and neither confirms nor forgives anything else. The
        loop converges the rest all the same: it knows of no half of a file.
        """
        self._check_path(params)
        limited = bool(params.get("targets"))
        with self._listening(tell) as errors:
            await self._read_file(confirm=not limited)
            if params.get("rebind"):
                self._converger.rebind()
            if not limited:
                self._converger.forgive()
                self._tell_what_is_under_way(tell)
                return asdict(apply_document(await self._settling.settled(), errors, host_name()))
            snapshot = await self._settling.next()
            targets = self._targets(params, snapshot, "apply")
            assert targets is not None  # there are some
            rows = targets.rows(snapshot.desired, snapshot.statuses)
            self._converger.forgive([row.id for row in rows])
            self._tell_what_is_under_way(tell, {row.id for row in rows})
            snapshot = await self._settling.settled(targets)
        left_out = self._limited(snapshot, targets).left_out
        removals = [change for change in left_out if change.kind == "remove"]
        return asdict(apply_document(snapshot, errors, host_name(), targets, removals))

    def _tell_what_is_under_way(self, tell: Tell, only: Collection[str] | None = None) -> None:
        """The watcher is often faster than the command: what it began is waited for as well."""
        snapshot = self._converger.snapshot
        for row in snapshot.statuses if snapshot is not None else ():
            if row.phase in _ON_ITS_WAY and (only is None or row.id in only):
                tell(
                    Event(
                        "begin",
                        time.time(),
                        row.id,
                        row.reason or "under way already",
                        row.model,
                        row.gpus,
                        phase=row.phase.value,
                    )
                )

    async def _edited(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """As apply, after one entry was edited: no removal is confirmed, nothing is forgiven."""
        self._check_path(params)
        with self._listening(tell) as errors:
            await self._read_file(confirm=False)
            targets = self._targets(params, await self._settling.next(), "follow the file on")
            snapshot = await self._settling.settled(targets)
        return asdict(apply_document(snapshot, errors, host_name(), targets))

    def _check_path(self, params: Mapping[str, Any]) -> None:
        path = Path(str(params.get("path", self._settings.config)))
        if path.resolve() != self._settings.config.resolve():
            raise MicError(
                f"cannot apply {path}: the daemon runs {self._settings.config}",
                hint="edit that file; `mic-supervisor plan FILE` compares another one",
            )

    async def _restart(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        names = await self._named(str(params.get("name", "")), "restart")
        with self._listening(tell) as errors:
            self._converger.forgive(names)
            self._converger.force(names)
            snapshot = await self._settling.settled()
        return asdict(apply_document(snapshot, errors, host_name()))

    async def _retry(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        names = await self._named(str(params.get("name", "")), "retry")
        with self._listening(tell) as errors:
            failed = self._converger.forgive(names)
            snapshot = await self._settling.settled()
        document = asdict(apply_document(snapshot, errors, host_name()))
        return document | {"failed_before": sorted(failed)}

    async def _pause(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """Returns when nothing is done any more for what is paused."""
        snapshot = await self._settling.first()
        names = [str(name) for name in params.get("names", ())]
        chosen = select(names, self._names(snapshot), f"pause {' '.join(names)}")
        reason = params.get("reason")
        with self._listening(tell):
            self._converger.pause(chosen, str(reason) if reason else None)
            snapshot = await self._settling.seen(
                lambda seen: not seen.busy & {row.id for row in _concerned(chosen, seen)}
            )
        return self._paused(snapshot, chosen)

    async def _resume(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """Returns when what is not paused any more has nothing left to wait for."""
        snapshot = await self._settling.first()
        names = [str(name) for name in params.get("names", ())]
        chosen = to_resume(names, self._names(snapshot), self._converger.memory.paused)
        with self._listening(tell) as errors:
            self._converger.resume(chosen)
            snapshot = await self._settling.settled(chosen)
        ids = {row.id for row in _concerned(chosen, snapshot)}
        document = asdict(apply_document(snapshot, errors, host_name()))
        rows = [row for row in document["instances"] if row["id"] in ids]
        resumed = chosen.called(indices_of(snapshot))
        return document | {"instances": rows, "resumed": resumed}

    def _paused(self, snapshot: Snapshot, chosen: Selection) -> dict[str, Any]:
        indices = indices_of(snapshot)
        return {
            "paused": [asdict(one) for one in pauses(snapshot.memory.paused, indices)],
            "named": chosen.called(indices),
            "instances": [asdict(row) for row in instances(_concerned(chosen, snapshot), indices)],
        }

    def _names(self, snapshot: Snapshot) -> Names:
        """What there is to be named: in the file, running, or paused."""
        paused = snapshot.memory.paused
        models = {*self._published().config.models, *paused.models}
        models |= {row.model for row in snapshot.statuses if row.model != NONE}
        return Names.of(snapshot.desired, models, snapshot.observed.inventory, paused.gpus)

    def _targets(
        self, params: Mapping[str, Any], snapshot: Snapshot, action: str
    ) -> Selection | None:
        names = [str(name) for name in params.get("targets", ())]
        return (
            select(names, self._names(snapshot), f"{action} {' '.join(names)}") if names else None
        )

    def _limited(self, snapshot: Snapshot, targets: Selection) -> Plan:
        """What an apply of these alone would still have to do, and what it would leave out."""
        context = replace(
            self._converger.context, targets=targets, busy=snapshot.busy, confirmed=True
        )
        plan = reconcile(
            snapshot.desired, snapshot.observed, snapshot.memory, snapshot.now, context
        )
        return plan.in_wall(snapshot.offset)

    async def _history(self, params: Mapping[str, Any], _tell: Tell) -> list[dict[str, Any]]:
        name = params.get("name")
        return [
            asdict(event)
            for event in reversed(self._published().history)
            if name in (None, event.instance, event.model)
        ]

    async def _named(self, name: str, action: str) -> list[str]:
        """The instances of a name, but for those that are paused; all paused is an error."""
        snapshot = await self._settling.first()
        found = [row for row in snapshot.statuses if composed(name) in (row.id, row.model)]
        if not found:
            known = ", ".join(row.id for row in snapshot.statuses)
            raise MicError(
                f"cannot {action} {name}: there is no instance {name!r}",
                hint=f"there is {known}" if known else None,
            )
        return free_of_pauses(
            [(row.id, row.model, row.gpus) for row in found],
            snapshot.memory.paused,
            f"{action} {name}",
            indices_of(snapshot),
            snapshot.at,
        )

    @contextmanager
    def _listening(self, tell: Tell) -> Iterator[dict[str, Event]]:
        """Pass events on meanwhile, and keep the last failure of each instance."""
        errors: dict[str, Event] = {}

        def listen(event: Event) -> None:
            if event.kind == "failed":
                errors[event.instance] = event
            tell(event)

        self._events.listeners.append(listen)
        try:
            yield errors
        finally:
            self._events.listeners.remove(listen)


def indices_of(snapshot: Snapshot) -> dict[str, int]:
    return snapshot.observed.inventory.indices


def _concerned(chosen: Selection, snapshot: Snapshot) -> list[InstanceStatus]:
    """The rows of everything that a pause of these holds, named by the file or not."""
    return [
        row for row in snapshot.statuses if row.model in chosen.models or chosen.gpus & {*row.gpus}
    ]
