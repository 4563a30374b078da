"""What may be asked of the daemon over its socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mic_supervisor import __version__
from mic_supervisor.converge.documents import apply_document
from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.state import host_name
from mic_supervisor.daemon.control import Method, Tell
from mic_supervisor.daemon.settle import Settling
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.http.published import status_of
from mic_supervisor.plan import render
from mic_supervisor.plan.health import Phase

if TYPE_CHECKING:
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.converge.loop import Converger
    from mic_supervisor.daemon.generations import Reloaded
    from mic_supervisor.http.published import Published


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
            "reload": self._asked_to_reload,
            "apply": self._apply,
            "edited": self._edited,
            "restart": self._restart,
            "retry": self._retry,
            "history": self._history,
        }

    async def _ping(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        return {"version": __version__, "scope": self._settings.scope}

    async def _status(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        await self._settling.first()
        document = status_of(self._published())
        assert document is not None  # there was a first snapshot
        return document

    async def _plan(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        """What is still out of sync; nothing is read again for it."""
        snapshot = await self._settling.first()
        indices = {gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus}
        return {
            "document": render.to_json(
                snapshot.plan, host=host_name(), config_hash=snapshot.desired.config_hash
            ),
            "text": render.to_text(snapshot.plan, indices),
            "empty": snapshot.plan.empty and not snapshot.busy,
            "busy": sorted(snapshot.busy),
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
        return {"changed": outcome.changed, "generation": outcome.generation}

    async def _apply(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """Reload, try everything again, and wait until there is nothing left to wait for."""
        self._check_path(params)
        with self._listening(tell) as errors:
            await self._asked_to_reload(params, tell)
            if params.get("rebind"):
                self._converger.rebind()
            self._converger.forgive()
            self._tell_what_is_under_way(tell)
            snapshot = await self._settling.settled()
        return apply_document(snapshot, errors, host_name())

    def _tell_what_is_under_way(self, tell: Tell) -> None:
        """The watcher is often faster than the command: what it began is waited for as well."""
        snapshot = self._converger.snapshot
        for row in snapshot.statuses if snapshot is not None else ():
            if row.phase in _ON_ITS_WAY and snapshot is not None:
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
            snapshot = await self._settling.settled()
        return apply_document(snapshot, errors, host_name())

    def _check_path(self, params: Mapping[str, Any]) -> None:
        path = Path(str(params.get("path", self._settings.config)))
        if path.resolve() != self._settings.config.resolve():
            raise MicError(
                f"cannot apply {path}: the daemon runs {self._settings.config}",
                hint="edit that file; `mic-supervisor plan FILE` compares another one",
            )

    async def _restart(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        names = await self._named(str(params.get("name", "")))
        with self._listening(tell) as errors:
            self._converger.forgive(names)
            self._converger.force(names)
            snapshot = await self._settling.settled()
        return apply_document(snapshot, errors, host_name())

    async def _retry(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        names = await self._named(str(params.get("name", "")))
        with self._listening(tell) as errors:
            self._converger.forgive(names)
            snapshot = await self._settling.settled()
        return apply_document(snapshot, errors, host_name())

    async def _history(self, params: Mapping[str, Any], _tell: Tell) -> list[dict[str, Any]]:
        name = params.get("name")
        return [
            asdict(event)
            for event in reversed(self._published().history)
            if name in (None, event.instance, event.model)
        ]

    async def _named(self, name: str) -> list[str]:
        snapshot = await self._settling.first()
        found = [row.id for row in snapshot.statuses if name in (row.id, row.model)]
        if not found:
            known = ", ".join(row.id for row in snapshot.statuses)
            raise MicError(f"there is no instance {name!r}", hint=f"there is {known}")
        return found

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
