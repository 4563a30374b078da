"""The daemon: one converger, and what feeds it and listens to it."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mic_supervisor import __version__
from mic_supervisor.converge.desired import FileDesired
from mic_supervisor.converge.documents import apply_document, status_document
from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.loop import Converger, Snapshot
from mic_supervisor.converge.state import StateDir, host_name
from mic_supervisor.daemon.control import ControlServer, Tell
from mic_supervisor.daemon.generations import Generations, Reloaded
from mic_supervisor.daemon.history import History
from mic_supervisor.daemon.log import LOGGER, log_event
from mic_supervisor.daemon.notify import Notifier
from mic_supervisor.daemon.summary import sentence
from mic_supervisor.daemon.watch import watch
from mic_supervisor.errors import ConfigError, MicError, RuntimeUnavailable
from mic_supervisor.http.published import ConfigState, LoopState, Published
from mic_supervisor.plan import render
from mic_supervisor.plan.settled import settled

if TYPE_CHECKING:
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.document import Config
    from mic_supervisor.config.settings import Settings
    from mic_supervisor.converge.observe import Sources
    from mic_supervisor.plan.assess import Context
    from mic_supervisor.runtimes import Runtime

_STREAM_REST = 1.0  # seconds between two tries to follow a runtime's events
_STOP_NOTICE = 15.0  # seconds for which systemd is asked at a time while instances are stopped


class SteadyClock:
    """Wall-clock time that never jumps: it is read once, and goes on with the monotonic clock.

    A clock that is set while the daemon runs must neither end nor prolong a backoff.
    """

    def __init__(self) -> None:
        self._base = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._base + time.monotonic()


class Supervisor:
    """Everything that lives as long as the daemon does."""

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        sources: Sources,
        state: StateDir,
        context: Context,
    ) -> None:
        self._settings = settings
        self._sources = sources
        self._clock = SteadyClock()
        self._generations = Generations(
            settings.config,
            registry,
            settings.environ,
            state,
            prune_on_watch=settings.prune_on_watch,
        )
        self._notifier = Notifier(settings.environ)
        self._history = History(state.path / "history.jsonl")
        self._events = Events([log_event, self._history.add])
        self._loop_state = LoopState(started_at=self._clock())
        self._generations.start(self._clock())
        self._desired = FileDesired(self._config(), registry)
        self._converger = Converger(
            sources=sources,
            desired=self._desired,
            context=replace(context, confirmed=self._generations.confirmed),
            memory=state.memory(),
            save=state.save_memory,
            events=self._events,
            clock=self._clock,
        )
        self._converger.resync = min(settings.resync, (self._notifier.watchdog or 1e9) / 3)
        self._converger.observers.append(self._publish)
        self._waiters: list[_Waiter] = []
        self._stopping = asyncio.Event()
        self._first = asyncio.Event()
        self._reloads = asyncio.Lock()
        self.published = self._view(None)

    # --- life -----------------------------------------------------------------------------------

    async def run(self, serve: Callable[[Supervisor], Any] | None = None) -> None:
        """Until SIGTERM or SIGINT. `serve` starts the HTTP server and returns how to stop it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(
            signal.SIGHUP, lambda: loop.create_task(self._reload(confirm=True, why="SIGHUP"))
        )
        self._announce_start()
        control = ControlServer(self._settings.socket, self._methods())
        await control.start()
        stop_serving = serve(self) if serve is not None else None
        streams_over = threading.Event()
        tasks = [
            asyncio.create_task(self._converger.run()),
            asyncio.create_task(
                watch(self._settings.config, self._generations.differs, self._file_changed)
            ),
            *(
                asyncio.create_task(self._follow(runtime, streams_over))
                for runtime in self._sources.runtimes.values()
            ),
            asyncio.create_task(self._say_ready()),
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({*tasks[:2], stopping}, return_when="FIRST_COMPLETED")
            for task in done - {stopping}:
                task.result()  # the loop ends by a defect only: let systemd start a fresh one
        finally:
            self._notifier.stopping()
            self._notifier.status("stopping")
            streams_over.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await control.close()
            if stop_serving is not None:
                await asyncio.to_thread(stop_serving)
            if self._settings.on_stop == "stop" and stopping.done():
                await self._stop_instances()
            await self._converger.close()
            LOGGER.info("stopped; instances %s", "stopped" if self._stops else "keep running")

    @property
    def _stops(self) -> bool:
        return self._settings.on_stop == "stop"

    def _announce_start(self) -> None:
        LOGGER.info(
            "mic-supervisor %s, scope %s, configuration %s",
            __version__,
            self._settings.scope,
            self._settings.config,
        )
        if self._generations.error is not None:
            running = (
                f"generation {self._generations.number}, the last good one, runs"
                if self._generations.config is not None
                else "nothing is started, and nothing stopped"
            )
            LOGGER.error("%s\nthe configuration has errors: %s", self._generations.error, running)

    async def _say_ready(self) -> None:
        await self._first.wait()
        self._notifier.ready()

    async def _stop_instances(self) -> None:
        """Remove nothing by a file's word: this is the operator's setting MIC_ON_STOP=stop."""
        from mic_supervisor.config.document import Config

        nothing = Config(self._settings.config, (), "", (), {}, {})
        self._desired.use(nothing)
        self._converger.context = replace(self._converger.context, confirmed=True)
        notice = asyncio.create_task(self._ask_for_time())
        began = self._clock()
        try:
            await self._converger.run(until=lambda snapshot: _all_settled(snapshot, began))
        finally:
            notice.cancel()

    async def _ask_for_time(self) -> None:
        while True:
            self._notifier.extend(_STOP_NOTICE)
            self._notifier.alive()
            await asyncio.sleep(_STOP_NOTICE / 3)

    # --- what wakes the loop --------------------------------------------------------------------

    async def _follow(self, runtime: Runtime, over: threading.Event) -> None:
        """Wake the loop with every event of a runtime. A broken stream is followed anew."""
        loop = asyncio.get_running_loop()
        broken = False

        def listen() -> None:
            for line in runtime.events(over):
                LOGGER.debug("%s: %s", runtime.name, line)
                loop.call_soon_threadsafe(self._converger.wake)

        while not over.is_set():
            thread_done: asyncio.Future[None] = loop.create_future()
            threading.Thread(
                target=_report_end, args=(loop, thread_done, listen), daemon=True
            ).start()
            self._converger.wake()  # what happened while nobody listened
            try:
                await thread_done
                broken = False
            except RuntimeUnavailable as error:
                if not broken:
                    LOGGER.warning("%s; looking every few seconds until it is back", error)
                broken = True
            await asyncio.sleep(_STREAM_REST)

    async def _file_changed(self) -> None:
        await self._reload(confirm=False, why="the file changed")

    async def _reload(self, *, confirm: bool, why: str) -> Reloaded:
        async with self._reloads:
            self._notifier.reloading()
            try:
                outcome = await asyncio.to_thread(
                    self._generations.reload, self._clock(), confirm=confirm
                )
            finally:
                # Also after a rejection: systemd is told that the reload is over, not that it
                # was good; that stands in STATUS and in the exit status of ExecReload.
                if self._first.is_set():
                    self._notifier.ready()
            self._took(outcome, why)
            return outcome

    def _took(self, outcome: Reloaded, why: str) -> None:
        now, number = self._clock(), self._generations.number
        if outcome.error is not None:
            LOGGER.error("%s", outcome.error)
            text = f"rejected ({why}); generation {number} keeps running"
        elif outcome.changed:
            text = f"generation {number} accepted ({why})"
        else:
            text = f"generation {number} confirmed ({why})"
        self._events.tell(Event("config", now, "configuration", text, cause=why))
        if outcome.error is None:
            self._desired.use(self._config())
            self._converger.context = replace(
                self._converger.context, confirmed=self._generations.confirmed
            )
        self._converger.wake()

    def _config(self) -> Config:
        """What runs; before there ever was a valid file, a configuration that names nothing.

        That one is never confirmed, so it removes nothing either.
        """
        from mic_supervisor.config.document import Config

        return self._generations.config or Config(self._settings.config, (), "", (), {}, {})

    # --- what is told ---------------------------------------------------------------------------

    def _publish(self, snapshot: Snapshot) -> None:
        self._loop_state = replace(
            self._loop_state,
            rounds=self._loop_state.rounds + 1,
            last_duration=snapshot.seconds,
            last_success_at=snapshot.at,
        )
        self.published = self._view(snapshot)
        self._notifier.status(sentence(self.published))
        self._notifier.alive()
        self._first.set()
        for waiter in [*self._waiters]:
            waiter.look(snapshot)

    def _view(self, snapshot: Snapshot | None) -> Published:
        found = self._generations
        models = found.config.models if found.config is not None else {}
        return Published(
            host=host_name(),
            version=__version__,
            config=ConfigState(
                path=str(self._settings.config),
                hash=found.config.hash if found.config is not None else "",
                generation=found.number,
                loaded_at=found.loaded_at,
                last_reload_ok=found.error is None,
                error=found.error,
                error_at=found.error_at,
                models={name: model.backend for name, model in models.items()},
            ),
            loop=self._loop_state,
            snapshot=snapshot,
            history=self._history.newest(),
        )

    # --- what may be asked over the socket ------------------------------------------------------

    def _methods(self) -> dict[str, Callable[[Mapping[str, Any], Tell], Any]]:
        return {
            "ping": self._ping,
            "status": self._status,
            "plan": self._plan,
            "reload": self._asked_to_reload,
            "apply": self._apply,
            "restart": self._restart,
            "retry": self._retry,
            "history": self._asked_for_history,
        }

    async def _ping(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        return {"version": __version__, "scope": self._settings.scope}

    async def _status(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        snapshot = await self._snapshot()
        config = self.published.config
        return status_document(
            host=host_name(),
            config={
                "path": config.path,
                "hash": config.hash,
                "generation": config.generation,
                "loaded_at": config.loaded_at,
                "last_reload_ok": config.last_reload_ok,
                "error": config.error,
            },
            desired=snapshot.desired,
            observed=replace(snapshot.observed, at=self._clock()),
            statuses=snapshot.statuses,
            warnings=snapshot.plan.warnings,
        )

    async def _plan(self, _params: Mapping[str, Any], _tell: Tell) -> dict[str, Any]:
        """What is still out of sync; nothing is read again for it."""
        snapshot = await self._snapshot()
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
        # Whoever asked may be gone already; what was begun is finished.
        outcome = await asyncio.shield(self._reload(confirm=True, why="reload"))
        if outcome.error is not None:
            raise ConfigError(
                "the configuration has errors",
                rendered=outcome.error,
                hint=f"generation {outcome.generation} keeps running",
            )
        return {"changed": outcome.changed, "generation": outcome.generation}

    async def _apply(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        """Reload, try everything again, and wait until there is nothing left to wait for."""
        path = Path(str(params.get("path", self._settings.config)))
        if path.resolve() != self._settings.config.resolve():
            raise MicError(
                f"cannot apply {path}: the daemon runs {self._settings.config}",
                hint="edit that file; `mic-supervisor plan FILE` compares another one",
            )
        errors: dict[str, Event] = {}

        def listen(event: Event) -> None:
            if event.kind == "failed":
                errors[event.instance] = event
            tell(event)

        self._events.listeners.append(listen)
        try:
            await self._asked_to_reload(params, tell)
            if params.get("rebind"):
                self._converger.memory = replace(self._converger.memory, bindings={})
            self._converger.forgive()
            snapshot = await self._settle()
        finally:
            self._events.listeners.remove(listen)
        return apply_document(snapshot, errors, host_name())

    async def _restart(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        names = await self._named(str(params.get("name", "")))
        self._events.listeners.append(tell)
        try:
            self._converger.forgive(names)
            self._converger.force(names)
            snapshot = await self._settle()
        finally:
            self._events.listeners.remove(tell)
        return apply_document(snapshot, {}, host_name())

    async def _retry(self, params: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        names = await self._named(str(params.get("name", "")))
        self._events.listeners.append(tell)
        try:
            self._converger.forgive(names)
            snapshot = await self._settle()
        finally:
            self._events.listeners.remove(tell)
        return apply_document(snapshot, {}, host_name())

    async def _asked_for_history(self, params: Mapping[str, Any], _tell: Tell) -> Any:
        from dataclasses import asdict

        name = params.get("name")
        return [
            asdict(event)
            for event in reversed(self._history.newest())
            if name in (None, event.instance, event.model)
        ]

    async def _named(self, name: str) -> list[str]:
        snapshot = await self._snapshot()
        found = [row.id for row in snapshot.statuses if name in (row.id, row.model)]
        if not found:
            known = ", ".join(row.id for row in snapshot.statuses)
            raise MicError(f"there is no instance {name!r}", hint=f"there is {known}")
        return found

    async def _snapshot(self) -> Snapshot:
        await self._first.wait()
        assert self.published.snapshot is not None  # the first round sets it
        return self.published.snapshot

    async def _settle(self) -> Snapshot:
        """The first snapshot of a round that begins from now on and leaves nothing to wait for."""
        waiter = _Waiter(self._converger.rounds_begun, self._clock())
        self._waiters.append(waiter)
        self._converger.wake()
        try:
            return await waiter.future
        finally:
            self._waiters.remove(waiter)


class _Waiter:
    def __init__(self, after: int, began: float) -> None:
        self.future: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._after = after
        self._began = began

    def look(self, snapshot: Snapshot) -> None:
        if self.future.done() or snapshot.round <= self._after or snapshot.busy:
            return
        if _all_settled(snapshot, self._began):
            self.future.set_result(snapshot)


def _all_settled(snapshot: Snapshot, began: float) -> bool:
    return settled(
        snapshot.desired,
        snapshot.plan,
        snapshot.statuses,
        snapshot.memory,
        failing=snapshot.failing,
        began=began,
        now=snapshot.at,
    )


def _report_end(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], listen: Callable[[], None]
) -> None:
    """Run `listen` in this thread; its end, or its error, becomes the future's."""

    def end(error: MicError | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    outcome: MicError | None = None
    try:
        listen()
    except MicError as error:
        outcome = error
    if not loop.is_closed():
        loop.call_soon_threadsafe(end, outcome)
