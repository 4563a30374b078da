"""What a plan leaves as it is, whatever is due: what is paused, and what was not chosen.

A pause is for who works on something by hand. It holds whatever is of the model or on the GPU,
named by the file or not: nothing is created, started, stopped, removed, loaded or unloaded, and no
failure is counted. What needs something that is held waits for it.

A plan may be limited to models and GPUs. Then whatever else there is stays as it is, apart from
what has to leave the GPUs of the chosen so that they can start. What the file merely no longer
names is left alone: to limit a plan is no word on that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mic_supervisor.model import DesiredState, ObservedState, ObservedWorkload
from mic_supervisor.plan.actions import Blocked, Change, Plan
from mic_supervisor.plan.assess import Assessment, is_alive, workloads
from mic_supervisor.plan.memory import Pause, Paused
from mic_supervisor.plan.render import moment
from mic_supervisor.plan.render import reason as reason_of

if TYPE_CHECKING:
    from mic_supervisor.plan.selection import Selection


@dataclass(frozen=True, slots=True)
class Hold:
    """One instance that is left as it is. `reason` completes "it is …", `hint` is the way out.

    Neither `paused` nor `doubted`: it was not chosen. If it is doubted, `reason` is a sentence.
    """

    instance: str
    model: str
    gpus: tuple[str, ...]
    reason: str
    hint: str
    paused: bool
    doubted: bool = False

    @property
    def unchosen(self) -> bool:
        return not self.paused and not self.doubted

    def told(self, otherwise: Plan) -> Blocked:
        """That it is paused, and what would be done for it if it were not: see `otherwise`."""
        if self.doubted:
            return Blocked(self.instance, self.reason, self.gpus, self.model, self.hint)
        due = [
            f"would {change.kind}: {change.cause}"
            for change in otherwise.changes
            if change.instance == self.instance and change.kind != "adopt"
        ]
        due += [
            f"would be blocked: {reason_of(item)}"
            for item in otherwise.blocked
            if item.instance == self.instance
        ]
        text = "; ".join([self.reason, *due])
        return Blocked(self.instance, text, self.gpus, self.model, self.hint, paused=True)


class Holds:
    """What holds what, for one plan. `targets` None: everything is chosen."""

    def __init__(
        self,
        desired: DesiredState,
        observed: ObservedState,
        paused: Paused,
        targets: Selection | None,
        now: float,
    ) -> None:
        self._observed = observed
        self._paused = paused
        self._targets = targets
        self._now = now
        chosen = [] if targets is None else [i for i in desired.instances if targets.has(i)]
        self._chosen = {item.id for item in chosen}
        self._needed = {uuid for item in chosen for uuid in item.gpus}
        if targets is not None:
            self._needed |= targets.gpus & {*desired.kept_empty}

    @property
    def any(self) -> bool:
        return bool(self._paused) or self._targets is not None

    def find(
        self, assessments: Iterable[Assessment], orphans: Iterable[ObservedWorkload]
    ) -> dict[str, Hold]:
        """What is held, by instance: of the file, and of what no desired instance has the id of."""
        doubts = doubted(self._observed)
        if not self.any:
            return doubts
        found: list[Hold | None] = []
        for item in assessments:
            instance = item.instance
            free = self._targets is None or instance.id in self._chosen
            found.append(self._hold(instance.id, instance.model, instance.gpus, item.gpus, free))
        # Of several with one id, those that are alive say where it is.
        by_instance: dict[str, list[ObservedWorkload]] = {}
        for orphan in orphans:
            by_instance.setdefault(orphan.identity.instance, []).append(orphan)
        for several in by_instance.values():
            one = next((item for item in several if is_alive(item)), several[0]).identity
            alive = [item for item in several if is_alive(item)] or several
            held = {uuid for item in alive for uuid in item.identity.gpus}
            free = self._targets is None or bool(held & self._needed)
            found.append(self._hold(one.instance, one.model, one.gpus, held, free))
        return {hold.instance: hold for hold in found if hold is not None} | doubts

    def placement(self, model: str) -> str | None:
        """Why a model inside a server is neither loaded nor unloaded; None: it may be."""
        pause = self._paused.models.get(model)
        return since(pause, self._now) if pause is not None else None

    def concerns(self, model: str | None, gpus: Collection[str]) -> bool:
        """Whether an entry in trouble is one of the chosen."""
        targets = self._targets
        return targets is None or model in targets.models or bool(targets.gpus & {*gpus})

    def on(self, gpus: Collection[str], held: Collection[str]) -> set[str]:
        """The instances of `held` that have any of these GPUs."""
        if not held:
            return set()
        found = (item.identity for item in workloads(self._observed) if is_alive(item))
        return {one.instance for one in found if one.instance in held and {*one.gpus} & {*gpus}}

    def _hold(
        self, instance: str, model: str, gpus: tuple[str, ...], held: set[str], free: bool
    ) -> Hold | None:
        """`held` are the GPUs that are concerned; `free`: it is chosen."""
        pauses = {uuid: self._paused.gpus[uuid] for uuid in held & self._paused.gpus.keys()}
        if not pauses and model not in self._paused.models:
            if free:
                return None
            return Hold(instance, model, gpus, "not among the chosen", "choose it too", False)
        indices = {gpu.uuid: gpu.index for gpu in self._observed.inventory.gpus}
        names = [str(indices.get(uuid, uuid)) for uuid in sorted(pauses)]
        every = [*pauses.values()]
        if model in self._paused.models:
            names.insert(0, model)
            every.append(self._paused.models[model])
        reason = since(min(every, key=lambda pause: pause.since), self._now)
        return Hold(instance, model, gpus, reason, way_out(names), True)


def doubted(observed: ObservedState) -> dict[str, Hold]:
    """What runs, and cannot be told for certain: nothing is done with it, nor on its GPUs."""
    return {
        item.identity.instance: Hold(
            item.identity.instance,
            item.identity.model,
            item.identity.gpus,
            item.doubt.reason,
            item.doubt.hint,
            paused=False,
            doubted=True,
        )
        for item in workloads(observed)
        if item.doubt is not None and is_alive(item)
    }


def left_out(whole: Plan, held: Iterable[Hold]) -> tuple[Change, ...]:
    """What of the whole plan is due, and was not chosen."""
    unchosen = {hold.instance for hold in held if hold.unchosen}
    return tuple(
        replace(change, steps=(), waits=None)
        for change in whole.changes
        if change.instance in unchosen and change.kind != "adopt"
    )


def since(pause: Pause, now: float) -> str:
    """ "paused since 12:04:10 (a new riser)"; with the date where that was not today."""
    text = f"paused since {moment(pause.since, now)}"
    return f"{text} ({pause.reason})" if pause.reason else text


def way_out(names: Iterable[str]) -> str:
    return "; ".join(f"mic-supervisor resume {name}" for name in names)
