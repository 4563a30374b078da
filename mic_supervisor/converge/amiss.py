"""What the supervisor itself cannot do, whatever the plan is: save what it remembers, for example.

It goes on all the same, and says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor

from mic_supervisor.converge.events import Event, Events
from mic_supervisor.converge.tasks import blocking
from mic_supervisor.errors import MicError
from mic_supervisor.plan.memory import Memory
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
