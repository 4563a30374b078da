"""What is amiss, whatever the plan is: each thing is told once when it comes, and once it is over.

With the supervisor itself, which cannot save what it remembers, for example, and goes on all the
same; and with GPUs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor

from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.tasks import blocking
from mic_supervisor.errors import MicError
from mic_supervisor.model import DesiredState, ObservedState
from mic_supervisor.plan.memory import Memory
from mic_supervisor.plan.obstacles import ForeignProcess, describe, foreign_processes, sentence
from mic_supervisor.text import quoted

_LOGGER = logging.getLogger("mic")
_UNSAVED = "a supervisor that ends meanwhile forgets what happened since the last save"


class Amiss:
    """What the supervisor itself cannot do now: said once, and shown for as long as it is so.

    `changed` is called when that becomes another.
    """

    def __init__(self, events: Events, now: Callable[[], float], changed: Callable[[], None]):
        self._events = events
        self._now = now
        self._changed = changed
        self._texts: dict[str, str] = {}

    @property
    def texts(self) -> Mapping[str, str]:
        """In words, by what they are about: "state", "generation", or the name of a runtime."""
        return dict(self._texts)

    def note(self, what: str, why: str | None) -> None:
        """`why` it cannot be done; None: it can."""
        if self._texts.get(what) == why:
            return
        known = what in self._texts
        if why is None:
            del self._texts[what]
        else:
            self._texts[what] = why
            if not known:
                self._events.emit(Event("warning", self._now(), what, why))
        self._changed()


class Saver:
    """Saves the memory whenever it has changed, one save after the other.

    One that fails ends nothing: it is noted in `amiss`, and tried again with the next.
    """

    def __init__(
        self, save: Callable[[Memory], None], saved: Memory, pool: Executor, amiss: Amiss
    ) -> None:
        self._save = save
        self._saved = saved  # what was saved last: the same again is not written
        self._pool = pool
        self._amiss = amiss
        self._saving = asyncio.Lock()

    async def save(self, newest: Callable[[], Memory]) -> None:
        """`newest` is asked for the memory when it is this save's turn."""
        async with self._saving:
            if (memory := newest()) == self._saved:
                return
            try:
                await blocking(self._pool, self._save, memory)
            except MicError as error:
                why = error.message
            # Whatever a save dies of, what runs is looked after.
            except Exception as error:
                said = quoted(f"{type(error).__name__}: {error}")
                why = f"cannot save what is remembered: {said}"
                _LOGGER.exception("cannot save what is remembered")
            else:
                self._saved = memory
                self._amiss.note("state", None)
                return
            self._amiss.note("state", f"{why}; {_UNSAVED}")


class GpuReporter:
    """Foreign processes on GPUs of ours, and GPUs that get into trouble or are gone."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._foreign: dict[tuple[str, int, int | None], ForeignProcess] = {}
        self._unhealthy: dict[str, str] = {}  # what was last told of each GPU that is in trouble
        self._known: dict[str, int | str] = {}  # the numbers of GPUs that were there, by UUID

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
                self._emit(one.gpu.uuid, one.gpu.number, sentence(one, observed), observed.at)
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
                self._emit(one.gpu.uuid, one.gpu.number, text, observed.at)
        self._foreign = found

    def _report_health(self, observed: ObservedState) -> None:
        inventory = observed.inventory
        unopened = {gpu.uuid: gpu.error_line for gpu in inventory.unopened}
        present = {gpu.uuid: gpu for gpu in inventory.gpus}
        self._known.update({uuid: gpu.number for uuid, gpu in present.items()})
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

    def _emit(self, uuid: str, number: int | str, text: str, at: float) -> None:
        self._events.emit(Event("gpu", at, f"GPU {number}", text, gpus=(uuid,)))
