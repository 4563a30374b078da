"""Converges: observe, reconcile, apply, until there is nothing left to do, and then again.

Level-triggered. Whatever wakes the loop, a round looks at everything anew. Rounds are short; what
takes time runs in lanes, and a lane that is busy is left out of the rounds meanwhile.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial

from mic_supervisor.clocks import Clock
from mic_supervisor.converge.amiss import Amiss, GpuReporter, Saver
from mic_supervisor.converge.apply import Lane, Steps
from mic_supervisor.converge.claims import ClaimDesk
from mic_supervisor.converge.events import Event, EventKind, Events, adopted, pauses
from mic_supervisor.converge.hooks import Publisher, Transitions
from mic_supervisor.converge.observe import LastViews, Sources, combine, read_in, with_holders
from mic_supervisor.converge.prober import Prober
from mic_supervisor.converge.probes import Checker, Target
from mic_supervisor.converge.snapshot import Desired, Snapshot
from mic_supervisor.converge.tasks import Threads, blocking
from mic_supervisor.errors import LoadFailed, MicError, Withdrawn
from mic_supervisor.gpu.events import XidRecord, with_xids
from mic_supervisor.host import host_name
from mic_supervisor.model import DesiredState, GpuInventory, ObservedState, ObservedWorkload
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import (
    Change,
    Create,
    Drain,
    Prepare,
    Restart,
    Start,
    Step,
    Stop,
    ToModel,
    Withdraw,
    in_order,
)
from mic_supervisor.plan.assess import Assessment, Context, Selection, is_alive
from mic_supervisor.plan.fallback import as_it_runs
from mic_supervisor.plan.health import Activity, phase_of_step
from mic_supervisor.plan.launch import listed
from mic_supervisor.plan.look import Look, look
from mic_supervisor.plan.memory import Drained, Memory, Pause, Paused, instance_of
from mic_supervisor.plan.release import Released, floor_of
from mic_supervisor.plan.selection import asked_for, given_up, is_withdrawn
from mic_supervisor.views import view

RESYNC = 10.0  # seconds between two rounds that nothing woke


class Converger:
    """Keeps one scope of one machine in its desired state.

    `context` holds what decisions depend on; `save` is called with the memory whenever it changed,
    from a thread. `removal_confirmed` says whether what a configuration, by its hash, no longer
    names may be removed; `unconfirmed` why the file as it is now is not what is followed. Until
    `act` is called it only looks: it asks each probe once a round, and starts and stops nothing.
    All methods belong to the thread of the event loop.
    """

    def __init__(
        self,
        *,
        sources: Sources,
        desired: Desired,
        context: Context,
        memory: Memory,
        save: Callable[[Memory], None],
        events: Events,
        clock: Clock,
    ) -> None:
        self.context = context  # what decisions depend on besides a look
        self.memory = memory  # the ledger of every instance, as the last round or step left it
        self.snapshot: Snapshot | None = None  # of the last round that ended
        self.rounds_begun = 0  # so that who asked can tell a round that began after that
        self.resync = RESYNC  # seconds between two rounds that nothing woke
        self.observers: list[Callable[[Snapshot], None]] = []  # called with each round's snapshot
        self.released: list[Callable[[float], None]] = []  # called with what each release took
        self.removal_confirmed: Callable[[str], bool] = lambda _config_hash: True
        self.unconfirmed: Callable[[], str | None] = lambda: None
        self.claims: ClaimDesk | None = None  # who else says what runs, on GPUs handed over
        self._sources = sources  # runtimes, GPUs, listeners
        self._desired = desired  # what the file asks for
        self._events = events
        self._clock = clock
        self._now = clock.steady
        self._acts = False  # whether plans are carried out
        self._wakes = asyncio.Event()  # somebody wants a round
        self._pool = Threads(64, "mic-work")  # for what blocks by nature
        self.amiss = Amiss(events, clock.wall, self.wake)  # what cannot be done now, but the plan
        self._saver = Saver(save, memory, self._pool, self.amiss)
        checker = Checker(Threads(64, "mic-probe"))
        self._prober = Prober(checker, self.wake, clock.steady)
        self._steps = Steps(sources, self._target_of, desired.backend, checker)
        self._steps.withdrawn = lambda step: is_withdrawn(  # from any thread
            self.memory, self._assessments.get(step.instance), step
        )
        self._lanes: dict[asyncio.Task[None], Lane] = {}  # that are being carried out
        self._inventory = GpuInventory("none")  # of the last look at the GPUs
        self._readable: GpuInventory | None = None  # the last one that told of GPUs
        self._gpu_reporter = GpuReporter(events)
        self.xids: Callable[[], Collection[XidRecord]] = tuple  # that the GPUs reported so far
        self._assessments: dict[str, Assessment] = {}  # of the last round, by instance
        self._bound = True  # whether the remembered bindings hold
        self._indices: dict[str, int] = {}  # the driver's of today, by UUID
        self._gpus, self._views, self._listeners = read_in(sources, self._pool, self.wake)
        self._last_views = LastViews()
        self._publisher = Publisher(
            self._pool, clock.steady, self._emit_hook, host_name(), memory.published
        )
        emit = partial(self._emit_hook, about="transitions")
        self._transitions = Transitions(self._pool, emit, host_name())
        events.listeners.append(self._transitions.listen)

    def act(self, targets: Selection | None = None) -> None:
        """Carry out plans from now on; with `targets` for these models and GPUs alone."""
        self._acts = True
        self.context = replace(self.context, targets=targets)
        self.wake()

    def wake(self) -> None:
        """Have a round soon: something may have changed."""
        self._wakes.set()

    async def run(self, until: Callable[[Snapshot], bool] | None = None) -> Snapshot:
        """Converge until `until` says that it is enough; without it, until cancelled.

        The first round begins when somebody wants one.
        """
        await self._wakes.wait()
        while True:
            self._wakes.clear()
            snapshot = await self._round()
            for observer in self.observers:
                observer(snapshot)
            if until is not None and not snapshot.busy and until(snapshot):
                await self.finish()
                return snapshot
            with suppress(TimeoutError):
                async with asyncio.timeout(snapshot.pause(self.resync, self._now())):
                    await asyncio.sleep(snapshot.gap)
                    await self._wakes.wait()

    def forgive(self, names: Collection[str] | None = None) -> set[str]:
        """Try again now what failed before; None is everything. Somebody asked for it.

        A server's id means its models as well, `memory_key` one of them. Returns what had failed.
        """
        self.explain(None if names is None else {*map(instance_of, names)})
        chosen = {
            key
            for key in self.memory.instances
            if names is None or key in names or instance_of(key) in names
        }
        failed = {key for key in chosen if self.memory.of(key).has_failed}
        self.memory = ledger.forgiven(self.memory, chosen)
        return failed

    def explain(self, instances: Collection[str] | None = None) -> None:
        """Go on also with what runs for a reason that is lost; None is everything."""
        self.memory = ledger.explained(self.memory, instances)
        self.wake()

    @property
    def activities(self) -> dict[str, Activity]:
        """What is being carried out, by instance."""
        return {name: at for lane in self._lanes.values() for name, at in lane.activities.items()}

    def rebind(self) -> None:
        """Bind the file's GPU numbers to today's GPUs anew, in the next round."""
        self._bound = False
        self.wake()

    def force(self, names: Collection[str]) -> None:
        """Restart these instances, and models of servers by `memory_key`, although nothing is wrong
        with them.
        """
        self.context = replace(self.context, forced=self.context.forced | set(names))
        self.wake()

    def pause(self, chosen: Selection, reason: str | None, by: str | None = None) -> None:
        """Leave these as they are from now on. A lane that has stopped something goes on."""
        pause = Pause(self._clock.wall(), reason)
        paused = self.memory.paused.including(chosen.models, chosen.gpus, pause)
        self._note_pause(paused, chosen, f"paused: {reason}" if reason else "paused", by)

    def resume(self, chosen: Selection, by: str | None = None) -> None:
        """Look after these again."""
        paused = self.memory.paused.without(chosen.models, chosen.gpus)
        self._note_pause(paused, chosen, "resumed", by)

    def _note_pause(self, paused: Paused, chosen: Selection, text: str, by: str | None) -> None:
        self.memory = replace(self.memory, paused=paused)
        for event in pauses(chosen, text, self._indices, self._clock.wall(), by):
            self._events.emit(event)
        self.wake()

    def drain(self, order: Drained | None, by: str | None = None) -> None:
        """Stop everything, and start nothing; None: follow the file again, as if nothing had
        failed."""
        memory = replace(self.memory, drained=order)
        self.memory = ledger.explained(ledger.forgiven(memory, memory.instances))
        text = "undrained" if order is None else f"drained: {order.reason}"
        text = text.removesuffix(": None")
        self._events.emit(Event("pause", self._clock.wall(), "host", text, by=by))
        self.wake()

    async def finish(self) -> None:
        """Let the hooks be told of what is true, and keep what is remembered."""
        await self._publisher.finish()
        await self._transitions.finish()
        await self._keep_published()

    async def close(self, timeout: float = 5.0) -> None:
        """Stop looking. Steps under way may end within `timeout` seconds.

        What does not is left behind: the next look at the machine finds it where it is. A drain
        fails at once, and nothing is stopped.
        """
        self._steps.end()
        self._transitions.end()
        await self._prober.close()
        if self._lanes:
            await asyncio.wait(self._lanes, timeout=timeout)
        self._pool.shutdown()

    # --- one round ----------------------------------------------------------------------------

    async def _round(self) -> Snapshot:
        # What is busy now may end while the machine is being read, and what was read of it would
        # then be old: it stays out of this round.
        self.rounds_begun += 1
        began, lanes = self._now(), [*self._lanes.values()]
        activities = self.activities
        desired, observed, context = await self._observe(lanes)
        seen = self._look(desired, observed, context)
        if self._acts:
            seen = self._act(seen, lanes, activities)
            await self._keep_published()
        else:
            answers = await self._prober.ask_once(self._targets(seen))
            seen = self._look(desired, replace(observed, health=answers), context)
            self.memory = replace(self.memory, unexplained=seen.memory.unexplained)
            self._publisher.follow(None, seen.statuses)
        reported = seen.in_wall()
        self.snapshot = view(
            Snapshot,
            reported,
            busy=context.busy | {name for lane in self._lanes.values() for name in lane.instances},
            round=self.rounds_begun,
            seconds=self._now() - began,
            hook=self._publisher.state.in_wall(seen.offset),
            endpoints=self._publisher.endpoints,
        )
        return self.snapshot

    async def _observe(self, lanes: list[Lane]) -> tuple[DesiredState, ObservedState, Context]:
        """What should run, what does, and what else decisions depend on now."""
        inventory, views = await asyncio.gather(
            self._gpus.get(), asyncio.gather(*(view.get() for view in self._views))
        )
        inventory = with_xids(inventory, self.xids(), self._now())
        busy = frozenset(name for lane in lanes for name in lane.instances)
        views = [self._last_views.noted(view, busy) for view in views]
        # After the runtimes: the port of a container that dies in between would look foreign.
        listeners = await self._listeners.get()
        bindings, self._bound = (self.memory.bindings if self._bound else {}), True
        if inventory.error is None:
            self._readable = inventory
        # GPUs that cannot be read are not absent: what runs on them is desired, and probed.
        there = self._readable or inventory
        desired = await blocking(self._pool, self._desired.state, there, bindings)
        # Asked of the configuration at hand: another one may have come since it was taken.
        confirmed = self.context.confirmed and self.removal_confirmed(desired.config_hash)
        if self.claims is not None:
            at, pool = self.memory.paused.gpus, self._pool
            desired = await self.claims.add(desired, there, views, at, pool, confirmed=confirmed)
        offset, now, self._indices = self._clock.offset(), self._now(), there.indices
        observed = combine(inventory, views, listeners, dict(self._prober.health), now + offset)
        observed = await blocking(self._pool, with_holders, observed, desired, self._sources)
        context = replace(
            self.context,
            busy=busy,
            confirmed=confirmed,
            published=self._publisher.known(desired.hook),
            hook_error=self._publisher.state.error,
            unconfirmed=self.unconfirmed(),
            amiss=self.amiss.texts,
        )
        return desired, observed, context

    def _look(self, desired: DesiredState, observed: ObservedState, context: Context) -> Look:
        offset = self._clock.offset()
        now, jitter = observed.at - offset, random.random()
        return look(desired, observed, self.memory, now, context, jitter=jitter, offset=offset)

    def _act(self, seen: Look, lanes: list[Lane], activities: dict[str, Activity]) -> Look:
        """Carry out what the look concludes; the same look, with what that began."""
        self._assessments = {item.instance.id: item for item in seen.assessments}
        self._inventory = seen.observed.inventory
        self._prober.watch(self._targets(seen))
        for event in adopted(seen, self._clock.wall()):
            self._events.emit(event)
        self._gpu_reporter.report(seen.desired, seen.observed, seen.context.busy)
        self._dispatch(seen, lanes)
        self._transitions.hook = seen.desired.on_transition
        seen = self._note_phases(seen.doing(activities | self.activities))
        self.memory = seen.memory
        drained = seen.memory.drained is not None
        self._publisher.follow(seen.desired.hook, seen.statuses, drained=drained)
        return seen

    async def _keep_published(self) -> None:
        self.memory = replace(self.memory, published=self._publisher.published)
        await self._saver.save(lambda: self.memory)

    async def _withdraw(self, step: Withdraw, change: Change) -> None:
        if self._publisher.published:
            self._emit("progress", change, "withdrawing it from on_endpoints_change")
        if not await self._publisher.withdraw(step.workload.identity.instance):
            self._emit("warning", change, "stopping it although on_endpoints_change failed")

    def _emit_hook(self, text: str, bad: bool, about: str = "endpoints") -> None:
        kind: EventKind = "failed" if bad else "hook"
        self._events.emit(Event(kind, self._clock.wall(), about, text, phase="hook"))
        self.wake()

    def _targets(self, seen: Look) -> dict[str, Target]:
        """What runs, as the file says or by an earlier specification that is as good as known."""
        as_they_are = (as_it_runs(seen.memory.of(one.instance.id), one) for one in seen.assessments)
        return {
            item.match.ref: self._target(item.match, item)
            for item in as_they_are
            if item.match is not None
            and is_alive(item.match)
            and (item.instance.id not in seen.context.busy or item.match.ref in self._prober.health)
        }

    def _target(self, workload: ObservedWorkload, item: Assessment) -> Target:
        return Target(
            instance=item.instance,
            workload=workload,
            backend=self._desired.backend(item.instance.backend),
            execute=self._sources.runtimes[workload.runtime].run_check,
            indices=listed(item.instance.gpus, self._indices),
        )

    def _target_of(self, step: ToModel) -> Target:
        item = self._assessments.get(step.instance)
        if item is None:
            raise LoadFailed(f"cannot change {step.instance}: the file no longer names it")
        return self._target(step.workload, as_it_runs(self.memory.of(step.instance), item))

    def _note_phases(self, seen: Look) -> Look:
        """Tell of every phase that an instance entered; progress tells what a step waits for."""
        seen, entered = seen.reported()
        at = self._clock.wall()
        for row, was, seconds in entered:
            told = row.why is None and row.id in self.activities
            about = (row.id, "" if told else row.reason or "", row.model, row.gpus)
            self._events.emit(
                Event("phase", at, *about, seconds=seconds, phase=row.phase.value, was=was)
            )
        return seen

    # --- lanes --------------------------------------------------------------------------------

    def _dispatch(self, seen: Look, busy: list[Lane]) -> None:
        by_lane: dict[str, list[Change]] = {}
        for change in seen.plan.changes:
            if change.steps and change.waits is None:
                by_lane.setdefault(change.lane, []).append(change)
        for changes in by_lane.values():
            lane = Lane.of(changes)
            if any(lane.overlaps(other) for other in [*busy, *self._lanes.values()]):
                continue
            done = {key for key in seen.context.forced if instance_of(key) in lane.instances}
            self.context = replace(self.context, forced=self.context.forced - done)
            task = asyncio.create_task(self._execute(changes, lane))
            self._lanes[task] = lane
            task.add_done_callback(self._lane_done)

    def _lane_done(self, task: asyncio.Task[None]) -> None:
        lane = self._lanes.pop(task)
        self._publisher.restore(lane.instances)
        self.wake()
        if not task.cancelled() and task.exception() is not None:
            why, now = f"a defect: {task.exception()!r}", self._now()
            for name in lane.instances:
                self.memory = ledger.cool_down(self.memory, name, why, now)
            task.result()  # a defect: the event loop's exception handler writes it down

    async def _execute(self, changes: list[Change], lane: Lane) -> None:
        began, asked = self._now(), asked_for(changes, self._assessments)
        owner = {step.id: change for change in changes for step in change.steps}
        failed: set[str] = set()
        broken: set[tuple[str, str]] = set()
        for change in changes:
            # That what failed is tried again is no news, as long as it fails in the same way.
            if self.memory.of(change.instance).cooldown is None:
                self._emit("begin", change, change.cause)
            else:
                self._emit("progress", change, f"trying again: {change.kind}: {change.cause}")

        async def attempt(step: Step, change: Change) -> None:
            try:
                await self._step(step, change, lane)
            except Withdrawn as error:  # the next round decides anew
                failed.add(step.id)
                broken.add((change.instance, change.model))
                self._emit("progress", change, error.message)
            except MicError as error:
                failed.add(step.id)
                broken.add((change.instance, change.model))
                now, item = self._now(), self._assessments.get(change.instance)
                self.memory = ledger.failed(self.memory, step, error, item, now, random.random())
                text, hint = error.message, error.hint
                self._emit("failed", change, text, seconds=now - began, hint=hint)

        stopping = False
        beside: list[asyncio.Task[None]] = []
        for step in in_order([step for change in changes for step in change.steps]):
            change = owner[step.id]
            if not stopping:
                # What has been stopped for something is not left lying for a pause.
                if how := given_up(self.memory, changes, asked, self._assessments):
                    self._emit("progress", change, f"{how} before anything was stopped for it")
                    return
                stopping = not isinstance(step, Prepare | Create | Withdraw | Drain)
            if failed & set(step.depends_on):
                failed.add(step.id)
                broken.add((change.instance, change.model))
            elif isinstance(step, ToModel):
                # Nothing depends on one, and one that hangs must not hold up the others.
                beside.append(asyncio.create_task(attempt(step, change)))
            else:
                await attempt(step, change)
        await asyncio.gather(*beside)
        for change in changes:
            if (change.instance, change.model) not in broken:
                self.memory = ledger.finished(self.memory, change)
                self._emit("done", change, change.cause, seconds=self._now() - began)

    async def _step(self, step: Step, change: Change, lane: Lane) -> None:
        lane.enters(change.instance, phase_of_step(step))
        self.memory = ledger.begun(self.memory, step)
        self._last_views.begins(step)
        if isinstance(step, Stop | Restart):
            self._prober.forget(step.workload.ref)
        if isinstance(step, Start | Stop | Restart):
            await self._saver.save(lambda: self.memory)  # we may be killed before the next round
        if isinstance(step, Withdraw):
            await self._withdraw(step, change)
            return
        loop = asyncio.get_running_loop()

        def report(text: str) -> None:
            lane.reports(change.instance, text)
            self._emit("progress", change, text)

        def progress(text: str) -> None:  # from any thread
            loop.call_soon_threadsafe(report, text)

        # As it is before the start: afterwards it is the instance's own.
        seen = {g.uuid: f for g in self._inventory.gpus if (f := floor_of(g)) is not None}
        began = self._now()
        found = await self._steps.run(step, progress)
        if isinstance(found, Released):
            lane.floors[change.instance] = found.floors
            for listener in self.released:
                listener(self._now() - began)
            if found.warning is not None:
                self._emit("warning", change, found.warning)
        floors = lane.floors.get(change.instance, seen)
        files = found if isinstance(found, str) else None
        self.memory = ledger.done(self.memory, step, change, self._now(), floors, files)
        if isinstance(step, ToModel):
            # The next round must see what is loaded now, or it would ask for it again.
            await self._prober.probe_now(step.workload.ref)

    def _emit(
        self,
        kind: EventKind,
        change: Change,
        text: str,
        seconds: float | None = None,
        hint: str | None = None,
    ) -> None:
        at, about = self._clock.wall(), (change.instance, text, change.model, change.gpus)
        self._events.emit(Event(kind, at, *about, change.cause, seconds, hint, phase=change.kind))
