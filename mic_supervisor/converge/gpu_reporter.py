"""What there is to tell of GPUs: each thing once when it comes, and once when it ends."""

from __future__ import annotations

from collections.abc import Collection

from mic_supervisor.converge.events import Event, Events
from mic_supervisor.model import DesiredState, ObservedState
from mic_supervisor.plan.obstacles import ForeignProcess, describe, foreign_processes, sentence


class GpuReporter:
    """Foreign processes on GPUs of ours, and GPUs that get into trouble or are gone."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._foreign: dict[tuple[str, int, int | None], ForeignProcess] = {}
        self._unhealthy: dict[str, str] = {}  # what was last told of each GPU that is in trouble
        self._known: dict[str, int] = {}  # the GPUs that were there, by UUID, and their numbers

    def report(self, desired: DesiredState, observed: ObservedState, busy: Collection[str]) -> None:
        if observed.inventory.error is not None:
            return  # unknown is not gone
        if all(view.error is None for view in observed.runtimes):
            self._report_foreign(desired, observed, busy)
        self._report_health(observed)

    def _report_foreign(
        self, desired: DesiredState, observed: ObservedState, busy: Collection[str]
    ) -> None:
        found = {one.key: one for one in foreign_processes(desired, observed, busy)}
        for key, one in found.items():
            if key not in self._foreign:
                self._emit(one.gpu.uuid, one.gpu.index, sentence(one, observed), observed.at)
        listed = {
            (gpu.uuid, process.pid, process.start_time)
            for gpu in observed.inventory.gpus
            for process in gpu.processes or ()
        }
        unread = {gpu.uuid for gpu in observed.inventory.gpus if gpu.processes is None}
        for key in [key for key in self._foreign if key not in found]:
            one = self._foreign[key]
            if key in listed or one.gpu.uuid in unread:
                found[key] = one  # it is there yet, and only whose GPU it is has changed
            else:
                text = f"{describe(one.process)} has left it"
                self._emit(one.gpu.uuid, one.gpu.index, text, observed.at)
        self._foreign = found

    def _report_health(self, observed: ObservedState) -> None:
        inventory = observed.inventory
        unopened = {gpu.uuid: gpu.error_line for gpu in inventory.unopened}
        present = {gpu.uuid: gpu for gpu in inventory.gpus}
        self._known.update({uuid: gpu.index for uuid, gpu in present.items()})
        found: dict[str, str] = {}
        for uuid in self._known:
            gpu = present.get(uuid)
            if gpu is None:
                found[uuid] = f"it is lost: {unopened.get(uuid) or 'the driver lists it no more'}"
            elif gpu.trouble is not None:
                found[uuid] = f"it is unhealthy: {gpu.trouble}"
        for uuid in sorted(found.keys() | self._unhealthy.keys()):
            text = found.get(uuid, "it is well again")
            if text != self._unhealthy.get(uuid):
                self._emit(uuid, self._known[uuid], text, observed.at)
        self._unhealthy = found

    def _emit(self, uuid: str, index: int, text: str, at: float) -> None:
        self._events.emit(Event("gpu", at, f"GPU {index}", text, gpus=(uuid,)))
