"""The daemon: one converger, and what feeds it and listens to it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from mic_supervisor import __version__
from mic_supervisor.backends.registry import Registry
from mic_supervisor.clocks import Clock
from mic_supervisor.config.document import WAY_OUT, Config
from mic_supervisor.config.settings import Settings
from mic_supervisor.converge.claims import ClaimDesk
from mic_supervisor.converge.events import Event, Events, Order
from mic_supervisor.converge.loop import Converger
from mic_supervisor.converge.observe import Sources
from mic_supervisor.converge.outcome import Snapshots, all_converged
from mic_supervisor.converge.session import Session
from mic_supervisor.converge.snapshot import ConfigState, Reloaded, Snapshot
from mic_supervisor.converge.state import StateDir
from mic_supervisor.daemon.control import ControlServer
from mic_supervisor.daemon.generations import Generations
from mic_supervisor.daemon.log import LOGGER, History, log_event
from mic_supervisor.daemon.notify import Notifier, sentence
from mic_supervisor.daemon.parts import Parts, in_thread
from mic_supervisor.daemon.watch import FileWatch, GpuWatch
from mic_supervisor.desired import FileDesired
from mic_supervisor.errors import LockHeld, MicError, RuntimeRefused, RuntimeUnavailable
from mic_supervisor.host import host_name
from mic_supervisor.http.access import Scrubber
from mic_supervisor.http.documents import LoopState, Published
from mic_supervisor.http.server import HttpServer
from mic_supervisor.plan.assess import Context
from mic_supervisor.runtimes import Runtime

_LOCK_POLL = 2.0  # seconds between two looks at whether the lock's file is still there
_STREAM_DELAY = 1.0  # seconds between two tries to follow a runtime's events
_STREAM_PROVEN = 5.0  # seconds after which events that do not break count as followed
_LAST_STEPS = 2.5  # seconds for steps under way to end: a daemon is gone 5 s after SIGTERM
_STOP_NOTICE = 15.0  # seconds for which systemd is asked at a time while instances are stopped


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
        renew_lock: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._renew_lock = renew_lock
        self._sources = sources
        self._clock = Clock()
        self._generations = Generations(
            settings.config,
            registry,
            settings.environ,
            state,
            prune_on_watch=settings.prune_on_watch,
            plan_first=settings.watch == "plan",
        )
        self._notifier = Notifier(settings.environ)
        self._history = History(state.path / "history.jsonl")
        self._events = Events([log_event, self._record, self._count])
        self._unrecorded = ""  # why the history could not be written last
        self._loop_state = LoopState()
        self._started_with = self._generations.start(self._clock.steady())
        self._desired = FileDesired(
            self._config(), registry, settings.instance_data, self._generations.waiting
        )
        self._converger = Converger(
            sources=sources,
            desired=self._desired,
            context=context,
            memory=state.memory(),
            save=state.save_memory,
            events=self._events,
            clock=self._clock,
        )
        self._converger.act()
        self._converger.removal_confirmed = self._generations.confirms
        self._converger.unconfirmed = lambda: self._generations.unconfirmed
        self._converger.resync = min(settings.resync, (self._notifier.watchdog or 1e9) / 3)
        self._converger.released.append(self._count_release)
        self._gpu_watch = GpuWatch(
            sources.gpus, wake=self._converger.wake, clock=self._clock.steady
        )
        self._converger.xids = lambda: self._gpu_watch.records
        self._converger.observers.append(self._gpu_watch.on_snapshot)
        self._converger.observers.append(self._publish)
        self._snapshots = Snapshots(self._converger, self._clock.steady)
        self._converger.observers.append(self._snapshots.on_snapshot)
        self._reloads = asyncio.Lock()
        self._file_watch = FileWatch(
            self._generations.fingerprint,
            self._generations.differs,
            partial(self._reload, confirm=False, why="the file changed"),
            self._reloads,
        )
        grace, wake = settings.claim_grace, self._converger.wake
        self._claims = ClaimDesk(self._desired, grace, self._events, self._clock, wake)
        self._claims.read_file = self._file_watch.look
        self._converger.claims = self._claims
        self._converger.observers.append(self._claims.on_snapshot)
        self._stopping = asyncio.Event()
        self._ready = False  # whether a round was done, and systemd told
        self._parts = Parts(changed=lambda: self._notify(self.published.snapshot))
        self._asked: set[asyncio.Future[Reloaded]] = set()
        self._scrubber = Scrubber()
        self.published = self._view(None)

    # --- life -----------------------------------------------------------------------------------

    async def run(self, serve: Callable[[Supervisor], HttpServer] | None = None) -> None:
        """Until SIGTERM or SIGINT. `serve` starts the HTTP server."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        self._announce_start()
        session = Session(
            scope=self._settings.scope,
            path=self._settings.config,
            converger=self._converger,
            events=self._events,
            snapshots=self._snapshots,
            config=lambda: self.published.config,
            history=lambda: self.published.history,
            reload=self._asked_to_reload,
            current=self._generations.current,
            runtimes=self._sources.runtimes,
            claims=self._claims,
        )
        control = ControlServer(self._settings.socket, session.methods_for, self._settings.scope)
        await control.start()
        streams_over = threading.Event()
        keep = self._parts.keep
        if serve is not None:
            keep("the HTTP server", lambda: self._serve(serve))
        keep("the loop", self._converger.run)
        keep("the control socket", control.keep_listening)
        keep("the file watch", self._file_watch.follow)
        for runtime in self._sources.runtimes.values():
            keep(f"the follower of {runtime.name}", partial(self._follow, runtime, streams_over))
        if self._gpu_watch.follows:
            keep("the Xid watch", lambda: self._gpu_watch.follow(streams_over))
        # Each of these ends by raising alone: systemd then starts a fresh daemon.
        ends = [
            asyncio.create_task(self._gpu_watch.outdated()),
            asyncio.create_task(self._keep_lock()),
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({*ends, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in ends:
                if task.done():
                    task.result()
        finally:
            self._notifier.stopping()
            self._notifier.status("stopping")
            streams_over.set()
            for task in ends:
                task.cancel()
            await asyncio.gather(self._parts.stop(), control.close())
            stops = self._settings.on_stop == "stop" and stopping.done()
            if stops:
                await self._stop_instances()
            await self._converger.close(_LAST_STEPS)
            LOGGER.info("stopped; instances %s", "stopped" if stops else "keep running")

    async def _serve(self, serve: Callable[[Supervisor], HttpServer]) -> None:
        """Ends when the HTTP server is not alive any more."""
        server = serve(self)
        try:
            while server.alive:
                await asyncio.sleep(1.0)
        finally:
            await asyncio.to_thread(server.stop)

    async def _keep_lock(self) -> None:
        """Take the lock again where its file was removed. Raises LockHeld where another has it."""
        said = ""
        while True:
            await asyncio.sleep(_LOCK_POLL)
            try:
                self._renew_lock()
            except LockHeld:
                raise
            except MicError as error:
                if error.message != said:
                    LOGGER.error("%s", error.message)
                said = error.message

    def _hung_up(self) -> None:
        task = asyncio.ensure_future(self._reload(confirm=True, why="SIGHUP"))
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    def _announce_start(self) -> None:
        LOGGER.info(
            "mic-supervisor %s, scope %s, configuration %s",
            __version__,
            self._settings.scope,
            self._settings.config,
        )
        if self._generations.error is not None:
            LOGGER.error("%s", self._generations.error.rstrip())
        if self._generations.unconfirmed is not None:
            LOGGER.warning("%s: %s", self._generations.unconfirmed, WAY_OUT)
        self._warn(self._started_with)
        if self._converger.memory.lost is not None:
            LOGGER.warning("%s", self._converger.memory.lost)
        self._events.emit(
            Event("config", self._clock.wall(), "configuration", self._origin(), cause="start")
        )

    def _origin(self) -> str:
        found = self._generations
        why = "the file has errors"
        if found.unconfirmed is not None:
            why = "the file waits to be confirmed"
        elif found.error is None:
            return f"started with generation {found.number}"
        if found.config is not None:
            return f"started with generation {found.number}, the last good one: {why}"
        return f"started with nothing: {why}, and nothing is started or stopped"

    async def _stop_instances(self) -> None:
        """Remove nothing by a file's word: this is the operator's setting MIC_ON_STOP=stop."""
        self._desired.use(Config.nothing(self._settings.config, asked=True))
        self._converger.removal_confirmed = lambda _hash: True
        self._converger.explain()
        notice = asyncio.create_task(self._ask_for_time())
        began = self._clock.steady()
        self._converger.wake()
        try:
            await self._converger.run(until=lambda snapshot: all_converged(snapshot, began))
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
        loop, note = asyncio.get_running_loop(), self._converger.amiss.note

        def listen() -> None:
            for line in runtime.events(over):
                LOGGER.debug("%s: %s", runtime.name, line)
                loop.call_soon_threadsafe(self._converger.wake)

        while not over.is_set():
            self._converger.wake()  # what happened while nobody listened
            proven = loop.call_later(_STREAM_PROVEN, note, runtime.name, None)
            try:
                await in_thread(f"follow-{runtime.name}", listen)
            except (RuntimeUnavailable, RuntimeRefused) as error:
                note(runtime.name, f"{error}; trying again every few seconds until it is back")
            finally:
                proven.cancel()
            await asyncio.sleep(_STREAM_DELAY)

    def _asked_to_reload(self, confirm: bool, written: str, order: Order) -> Awaitable[Reloaded]:
        return self._reload(confirm=confirm, written=written, why=order.command, by=order.by)

    async def _reload(
        self, *, confirm: bool, why: str, written: str = "", by: str | None = None
    ) -> Reloaded:
        async with self._reloads:
            self._notifier.reloading()
            try:
                outcome = await asyncio.to_thread(
                    self._generations.reload,
                    self._clock.steady(),
                    confirm=confirm,
                    written=written,
                )
            finally:
                # Also after a rejection: systemd is told that the reload is over, not that it
                # was good; that stands in STATUS and in the exit status of ExecReload.
                if self._ready:
                    self._notifier.ready()
            if confirm and outcome.error is None:
                self._converger.explain()
            self._took(outcome, why, by)
            return outcome

    def _took(self, outcome: Reloaded, why: str, by: str | None) -> None:
        now, number = self._clock.wall(), self._generations.number
        if outcome.error is not None:
            LOGGER.error("%s", outcome.error.rstrip())
            text = f"rejected ({why}); generation {number} keeps running"
        elif outcome.unconfirmed is not None:
            LOGGER.warning("%s: %s", outcome.unconfirmed, WAY_OUT)
            text = f"waits to be confirmed ({why}); generation {number} keeps running"
        elif outcome.changed:
            text = f"generation {number} accepted ({why})"
        else:
            text = f"generation {number} confirmed ({why})"
        self._warn(outcome)
        self._events.emit(Event("config", now, "configuration", text, cause=why, by=by))
        if not self._stopping.is_set():  # else MIC_ON_STOP says what is to run
            self._desired.use(self._config(), self._generations.waiting)
        # A round may take its time: what is wrong with the file is shown now.
        self._notify(self.published.snapshot)
        self._converger.wake()

    def _warn(self, outcome: Reloaded) -> None:
        if outcome.error is None and outcome.unconfirmed is None:
            why = outcome.warning and (
                f"{outcome.warning}; the configuration runs; after a restart it runs only if it is "
                "still valid"
            )
            self._converger.amiss.note("generation", why)

    def _config(self) -> Config:
        """What runs; before there ever was a valid file, a configuration that names nothing.

        That one is never confirmed, so it removes nothing either.
        """
        return self._generations.config or Config.nothing(self._settings.config)

    # --- what is told ---------------------------------------------------------------------------

    def _publish(self, snapshot: Snapshot) -> None:
        self._loop_state = replace(
            self._loop_state,
            rounds=self._loop_state.rounds + 1,
            last_duration=snapshot.seconds,
            last_success_at=snapshot.at,
        )
        self._notify(snapshot)
        self._notifier.alive()
        if not self._ready:
            self._ready = True
            self._notifier.ready()

    def _notify(self, snapshot: Snapshot | None) -> None:
        self.published = self._view(snapshot)
        self._notifier.status(sentence(self.published))

    def _count(self, event: Event) -> None:
        if event.kind == "failed":
            self._loop_state = replace(self._loop_state, errors=self._loop_state.errors + 1)

    def _count_release(self, seconds: float) -> None:
        releases = self._loop_state.releases.with_one(seconds)
        self._loop_state = replace(self._loop_state, releases=releases)

    def _record(self, event: Event) -> None:
        """A disk that is full must not end the supervision; it is said once."""
        try:
            self._history.add(event)
        except MicError as error:
            if error.message != self._unrecorded:
                LOGGER.error("%s", error.message)
            self._unrecorded = error.message
        else:
            self._unrecorded = ""

    def _view(self, snapshot: Snapshot | None) -> Published:
        found = self._generations
        config = found.config or Config.nothing(self._settings.config)
        if snapshot is not None:
            self._scrubber = self._scrubber.including(snapshot.desired)
        # One offset for all that is shown together.
        offset = self._clock.offset() if snapshot is None else snapshot.offset
        return Published(
            host=host_name(),
            version=__version__,
            config=ConfigState(
                path=str(self._settings.config),
                hash=config.hash,
                generation=found.number,
                loaded_at=None if found.loaded_at is None else found.loaded_at + offset,
                last_reload_ok=found.error is None,
                error=found.error,
                error_at=None if found.error_at is None else found.error_at + offset,
                unconfirmed=found.unconfirmed,
                profile=config.profile,
                models={name: model.backend for name, model in config.models.items()},
            ),
            loop=self._loop_state,
            snapshot=snapshot,
            offset=offset,
            history=self._history.newest(),
            xids=tuple(
                replace(one, last_at=one.last_at + offset) for one in self._gpu_watch.records
            ),
            down=dict(self._parts.down),
            scrubber=self._scrubber,
        )
