"""Keeps the health of everything that runs up to date, each instance on its own clock."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from mic_supervisor.converge.probes import (
    ALL_DUE,
    DEVICES,
    DEVICES_AGAIN,
    Checker,
    Target,
    all_loaded,
    has_devices,
)
from mic_supervisor.converge.tasks import end, log_exception
from mic_supervisor.model import Health, ProbeResult
from mic_supervisor.plan.assess import passes
from mic_supervisor.text import quoted

FIRST_PERIOD = 0.05  # seconds after a start
_DEVICES_PERIOD = 60.0  # seconds between two looks at a container's GPUs from inside
_SLOWER = 1.3  # each look at what is on its way comes that much later than the one before


class Prober:
    """A task for each workload, so that a probe that hangs holds up its own only.

    `wake` is called when an answer changed.
    """

    def __init__(
        self, checker: Checker, wake: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self.health: dict[str, Health] = {}
        self._checker = checker
        self._wake = wake
        self._clock = clock
        self._targets: dict[str, Target] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._kicks: dict[str, asyncio.Event] = {}
        self._epochs: Counter[str] = Counter()  # of looks that nothing older may overwrite

    def watch(self, targets: Mapping[str, Target]) -> None:
        """Probe exactly these from now on, keyed by the workload's ref."""
        for ref in [*self._tasks]:
            if ref not in targets:
                self.forget(ref)
        for ref, target in targets.items():
            known = self._targets.get(ref)
            self._targets[ref] = target
            if ref not in self._tasks or self._tasks[ref].done():  # it never ends but by a defect
                self._kicks[ref] = asyncio.Event()
                task = asyncio.create_task(self._keep_probing(ref), name=f"the prober of {ref}")
                task.add_done_callback(log_exception)
                self._tasks[ref] = task
            elif known is not None and known.instance != target.instance:
                self.kick(ref)

    def kick(self, ref: str) -> None:
        """Look again now."""
        if ref in self._kicks:
            self._kicks[ref].set()

    async def probe_now(self, ref: str) -> None:
        """Look, and return when it is known. A look that began before that does not count."""
        target = self._targets.get(ref)
        if target is None:
            return
        self._epochs[ref] += 1
        health = await self._probe(target, self._clock(), self.health.get(ref))
        if ref in self._targets:
            self.health[ref] = health
            self._epochs[ref] += 1

    async def ask_once(self, targets: Mapping[str, Target]) -> dict[str, Health]:
        """One look at each of these, side by side, that nothing is remembered of."""
        now = self._clock()
        probes = (self._probe(target, now, None) for target in targets.values())
        found = dict(zip(targets, await asyncio.gather(*probes), strict=True))
        for ref in targets:
            self._checker.forget(ref)
        return found

    def forget(self, ref: str) -> None:
        """Drop what is known of a workload: it is about to be stopped or started."""
        task = self._tasks.pop(ref, None)
        if task is not None:
            task.cancel()
        self._targets.pop(ref, None)
        self._kicks.pop(ref, None)
        self._epochs.pop(ref, None)
        self.health.pop(ref, None)
        self._checker.forget(ref)

    async def close(self) -> None:
        tasks = [*self._tasks.values()]
        for ref in [*self._tasks]:
            self.forget(ref)
        await end(tasks)

    async def _keep_probing(self, ref: str) -> None:
        schedule = Schedule(self._clock())
        kick = self._kicks[ref]
        while True:
            target, before = self._targets[ref], self.health.get(ref)
            now = self._clock()
            epoch = self._epochs[ref]
            kinds = schedule.due(target, now)
            health = await self._probe(target, now, before, kinds)
            if epoch != self._epochs[ref]:
                continue
            self.health[ref] = health
            if before is None or _without_times(before) != _without_times(health):
                self._wake()
            schedule.asked(kinds, target, health, self._clock())
            try:
                async with asyncio.timeout(schedule.wait(target, self._clock())):
                    await kick.wait()
                kick.clear()
                schedule.hurry()
            except TimeoutError:
                continue

    async def _probe(
        self, target: Target, now: float, before: Health | None, due: Collection[str] = ALL_DUE
    ) -> Health:
        """A look, whatever the backend does: one that fails knows nothing, and probing goes on."""
        try:
            return await self._checker.probe(target, now, before, due)
        # Answers are read by the backend, which may be a plug-in of another package. A defect there
        # must neither count as a failure of the model nor end the probing.
        except Exception as error:  # noqa: BLE001 - see above
            said = quoted(f"{type(error).__name__}: {error}")
            unknown = ProbeResult(None, f"the probe failed: {said}", now)
            return Health(startup=unknown, liveness=unknown, readiness=unknown)


class Schedule:
    """When what is asked of one workload is due next, each kind at a pace of its own.

    Until the startup probe has passed it gates all else, and is asked in quick succession, slowing
    down to its own period: a start that takes 3 s should not be seen after 5. So is what warms up,
    and so are models that are being loaded. Nothing hastens liveness and readiness but a kick.
    `now` is in seconds.
    """

    def __init__(self, now: float) -> None:
        self._due = dict.fromkeys(ALL_DUE, now) | {DEVICES: now + DEVICES_AGAIN}
        self._pace = FIRST_PERIOD

    def due(self, target: Target, now: float) -> tuple[str, ...]:
        """The kinds to ask for now."""
        return tuple(kind for kind, at in self._asked_of(target).items() if at <= now)

    def wait(self, target: Target, now: float) -> float:
        """Seconds until the next kind is due."""
        return max(min(self._asked_of(target).values()) - now, 0.0)

    def hurry(self) -> None:
        """Ask for everything now, but for what is too dear."""
        self._due.update(dict.fromkeys(ALL_DUE, 0.0))

    def asked(self, kinds: Collection[str], target: Target, health: Health, now: float) -> None:
        """These were asked for, and this is what came of it."""
        probes = target.instance.probes
        period = probes.startup.period if probes.startup is not None else 5.0
        starts = probes.startup is not None and not passes(health.startup)
        if starts or (health.warm_up is not None and not passes(health.warm_up)):
            self._due.update(dict.fromkeys(kinds, now + self._next_pace(period)))
            return
        lost = health.devices is not None and health.devices.ok is False
        pauses = {
            "liveness": probes.liveness.period if probes.liveness is not None else period,
            "readiness": probes.readiness.period if probes.readiness is not None else period,
            DEVICES: DEVICES_AGAIN if lost else _DEVICES_PERIOD,
        }
        pauses["placements"] = pauses["liveness"]
        if "placements" in kinds:
            if all_loaded(target.instance, health.placements):
                self._pace = FIRST_PERIOD
            else:
                pauses["placements"] = self._next_pace(pauses["placements"])
        self._due.update({kind: now + pauses[kind] for kind in kinds})

    def _asked_of(self, target: Target) -> dict[str, float]:
        without = () if has_devices(target) else (DEVICES,)
        return {kind: at for kind, at in self._due.items() if kind not in without}

    def _next_pace(self, slowest: float) -> float:
        self._pace = min(self._pace * _SLOWER, slowest)
        return self._pace


def _without_times(health: Health) -> Health:
    """What a decision may depend on: not when it was, nor how the hundredth failure reads."""

    def trim(result: ProbeResult | None) -> ProbeResult | None:
        if result is None:
            return None
        return replace(result, at=0.0, counted_at=None, failures=min(result.failures, 100))

    return replace(
        health,
        startup=trim(health.startup),
        liveness=trim(health.liveness),
        readiness=trim(health.readiness),
        devices=trim(health.devices),
        warm_up=trim(health.warm_up),
    )
