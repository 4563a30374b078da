"""Keeps the health of everything that runs up to date, each instance on its own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from dataclasses import replace

from mic_supervisor.converge.probes import ALL_DUE, DEVICES, Target, has_devices, look
from mic_supervisor.model import Health, LoadState, ProbeResult

FIRST_LOOK = 0.05  # seconds after a start
_DEVICES_PERIOD = 60.0  # seconds between two looks at a container's GPUs from inside
_DEVICES_AGAIN = 5.0  # seconds after one that did not see them
_SLOWER = 1.3  # each look at a starting instance comes that much later than the one before


class Prober:
    """Probes run in `pool`, so that one that hangs holds a thread and nothing else.

    `wake` is called when an answer changed. While an instance starts it is asked in quick
    succession, slowing down to its own period: a start that takes 3 s should not be seen after 5.
    """

    def __init__(
        self, pool: Executor, wake: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self.health: dict[str, Health] = {}
        self._pool = pool
        self._wake = wake
        self._clock = clock
        self._targets: dict[str, Target] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._kicks: dict[str, asyncio.Event] = {}
        self._epochs: dict[str, int] = {}

    def watch(self, targets: Mapping[str, Target]) -> None:
        """Probe exactly these from now on, keyed by the workload's ref."""
        for ref in [*self._tasks]:
            if ref not in targets:
                self.forget(ref)
        for ref, target in targets.items():
            known = self._targets.get(ref)
            self._targets[ref] = target
            if ref not in self._tasks:
                self._kicks[ref] = asyncio.Event()
                self._tasks[ref] = asyncio.create_task(self._keep_looking(ref))
            elif known is not None and known.instance != target.instance:
                self.kick(ref)

    def kick(self, ref: str) -> None:
        """Look again now."""
        if ref in self._kicks:
            self._kicks[ref].set()

    async def look_now(self, ref: str) -> None:
        """Look, and return when it is known. A look that began earlier does not count any more."""
        target = self._targets.get(ref)
        if target is None:
            return
        self._epochs[ref] = self._epochs.get(ref, 0) + 1
        loop = asyncio.get_running_loop()
        before = self.health.get(ref)
        self.health[ref] = await loop.run_in_executor(
            self._pool, _look, target, self._clock(), before
        )

    def forget(self, ref: str) -> None:
        """Drop what is known of a workload: it is about to be stopped or started."""
        task = self._tasks.pop(ref, None)
        if task is not None:
            task.cancel()
        self._targets.pop(ref, None)
        self._kicks.pop(ref, None)
        self._epochs.pop(ref, None)
        self.health.pop(ref, None)

    async def close(self) -> None:
        tasks = [*self._tasks.values()]
        for ref in [*self._tasks]:
            self.forget(ref)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_looking(self, ref: str) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_LOOK
        due = dict.fromkeys(ALL_DUE, 0.0)
        devices_due = self._clock() + _DEVICES_AGAIN
        kick = self._kicks[ref]
        while True:
            target, before = self._targets[ref], self.health.get(ref)
            now = self._clock()
            epoch = self._epochs.get(ref)
            kinds = tuple(kind for kind, at in due.items() if at <= now)
            if has_devices(target) and devices_due <= now:
                kinds = (*kinds, DEVICES)
            health = await loop.run_in_executor(self._pool, _look, target, now, before, kinds)
            if epoch != self._epochs.get(ref):
                continue
            self.health[ref] = health
            if before is None or _gist(before) != _gist(health):
                self._wake()
            settled = _settled(target, health)
            periods = _periods(target)
            pause = FIRST_LOOK if settled else min(pause * _SLOWER, min(periods.values()))
            now = self._clock()
            for kind in kinds:
                if kind == DEVICES:
                    blind = health.devices is not None and health.devices.ok is False
                    devices_due = now + (_DEVICES_AGAIN if blind else _DEVICES_PERIOD)
                else:
                    due[kind] = now + (periods[kind] if settled else pause)
            wait = max(min(due.values()) - now, 0.0) if settled else pause
            try:
                await asyncio.wait_for(kick.wait(), wait)
                kick.clear()
                due = dict.fromkeys(due, 0.0)
            except TimeoutError:
                if not settled:
                    due = dict.fromkeys(due, 0.0)


def _look(
    target: Target, now: float, before: Health | None, due: Collection[str] = ALL_DUE
) -> Health:
    """`look`, whatever the backend does: a prober that fails knows nothing, and goes on."""
    try:
        return look(target, now, before, due)
    # Answers are read by the backend, which may be a stranger's plug-in. A defect there must
    # neither count as a failure of the model nor end the probing.
    except Exception as error:  # noqa: BLE001 - see above
        unknown = ProbeResult(None, f"the probe failed: {type(error).__name__}: {error}", now)
        return Health(startup=unknown, liveness=unknown, readiness=unknown)


def _periods(target: Target) -> dict[str, float]:
    probes = target.instance.probes
    default = probes.startup.period if probes.startup else 5.0
    liveness = probes.liveness.period if probes.liveness else default
    readiness = probes.readiness.period if probes.readiness else default
    return {"liveness": liveness, "readiness": readiness, "placements": liveness}


def _settled(target: Target, health: Health) -> bool:
    """Whether nothing is on its way any more, so that the instance's own periods do."""
    probes = target.instance.probes
    wanted = {item.model: item.digest for item in target.instance.placements}
    loaded = {
        item.model: item.digest for item in health.placements if item.state is LoadState.LOADED
    }
    return (
        (probes.startup is None or _ok(health.startup))
        and (probes.readiness is None or _ok(health.readiness))
        and all(loaded.get(model) == digest for model, digest in wanted.items())
    )


def _ok(result: ProbeResult | None) -> bool:
    return result is not None and result.ok is True


def _gist(health: Health) -> Health:
    """What a decision may depend on: not when it was, nor how the hundredth failure reads."""

    def trim(result: ProbeResult | None) -> ProbeResult | None:
        if result is None:
            return None
        return replace(result, at=0.0, failures=0 if result.ok else min(result.failures, 100))

    return replace(
        health,
        startup=trim(health.startup),
        liveness=trim(health.liveness),
        readiness=trim(health.readiness),
        devices=trim(health.devices),
    )
