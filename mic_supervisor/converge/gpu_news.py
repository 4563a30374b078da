"""What there is to tell of GPUs: each thing once when it comes, and once when it ends."""

from __future__ import annotations

from collections.abc import Collection

from mic_supervisor.converge.events import Event, Events
from mic_supervisor.model import DesiredState, ObservedState
from mic_supervisor.plan.obstacles import Intruder, describe, intruders, sentence


class GpuNews:
    """Strangers on GPUs of ours, and GPUs that get into trouble or are gone."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._strangers: dict[tuple[str, int, int | None], Intruder] = {}
        self._sick: dict[str, str] = {}  # what was last told of each GPU that is in trouble
        self._known: dict[str, int] = {}  # the GPUs that were there, by UUID, and their numbers

    def look(self, desired: DesiredState, observed: ObservedState, busy: Collection[str]) -> None:
        if observed.inventory.error is not None:
            return  # unknown is not gone
        if all(view.error is None for view in observed.runtimes):
            self._look_at_strangers(desired, observed, busy)
        self._look_at_troubles(observed)

    def _look_at_strangers(
        self, desired: DesiredState, observed: ObservedState, busy: Collection[str]
    ) -> None:
        found = {one.key: one for one in intruders(desired, observed, busy)}
        for key, one in found.items():
            if key not in self._strangers:
                self._tell(one.gpu.uuid, one.gpu.index, sentence(one, observed), observed.at)
        listed = {
            (gpu.uuid, process.pid, process.start_time)
            for gpu in observed.inventory.gpus
            for process in gpu.processes or ()
        }
        unread = {gpu.uuid for gpu in observed.inventory.gpus if gpu.processes is None}
        for key in [key for key in self._strangers if key not in found]:
            one = self._strangers[key]
            if key in listed or one.gpu.uuid in unread:
                found[key] = one  # it is there yet, and only whose GPU it is has changed
            else:
                text = f"{describe(one.process)} has left it"
                self._tell(one.gpu.uuid, one.gpu.index, text, observed.at)
        self._strangers = found

    def _look_at_troubles(self, observed: ObservedState) -> None:
        inventory = observed.inventory
        fallen = {gpu.uuid: gpu.told for gpu in inventory.unopened}
        present = {gpu.uuid: gpu for gpu in inventory.gpus}
        self._known.update({uuid: gpu.index for uuid, gpu in present.items()})
        found: dict[str, str] = {}
        for uuid in self._known:
            gpu = present.get(uuid)
            if gpu is None:
                found[uuid] = f"it is lost: {fallen.get(uuid) or 'the driver lists it no more'}"
            elif gpu.trouble is not None:
                found[uuid] = f"it is unhealthy: {gpu.trouble}"
        for uuid in sorted(found.keys() | self._sick.keys()):
            text = found.get(uuid, "it is well again")
            if text != self._sick.get(uuid):
                self._tell(uuid, self._known[uuid], text, observed.at)
        self._sick = found

    def _tell(self, uuid: str, index: int, text: str, at: float) -> None:
        self._events.tell(Event("gpu", at, f"GPU {index}", text, gpus=(uuid,)))
