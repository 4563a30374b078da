"""What the GPUs report by themselves, and a driver that was replaced under the daemon."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from mic_supervisor.daemon.log import LOGGER
from mic_supervisor.daemon.parts import in_thread
from mic_supervisor.errors import MicError
from mic_supervisor.gpu.events import (
    SAYS,
    XidEvent,
    XidRecord,
    XidSeverity,
    counted,
    watcher_of,
)

if TYPE_CHECKING:
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.gpu import GpuSource

_LEVELS = {XidSeverity.CRITICAL: logging.ERROR}


class GpuWatch:
    """Follows the Xid events of a source. All but the thread's own work is the event loop's.

    `records` counts the events since the daemon started, by GPU and number.
    """

    def __init__(
        self, source: GpuSource, *, wake: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self.records: tuple[XidRecord, ...] = ()
        self._source = source
        self._wake = wake
        self._watcher = watcher_of(source, clock)
        self._indices: dict[str, int] = {}
        self._outdated = asyncio.Event()

    @property
    def follows(self) -> bool:
        """Whether there is anything to follow."""
        return self._watcher is not None

    async def follow(self, over: threading.Event) -> None:
        """Follow in a thread until `over` is set."""
        loop, watcher = asyncio.get_running_loop(), self._watcher
        assert watcher is not None  # asked before

        def listen() -> None:
            for event in watcher.events(over):
                with suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(self._heard, event)

        await in_thread("xid", listen)

    def look(self, snapshot: Snapshot) -> None:
        """For the observers of the converger."""
        self._indices.update({gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus})
        if getattr(self._source, "outdated", False):
            self._outdated.set()

    async def outdated(self) -> None:
        """Raises MicError once the driver was replaced: only a new process can load its library."""
        await self._outdated.wait()
        raise MicError(
            "cannot go on: the NVIDIA driver was replaced while the daemon ran, and a process "
            "cannot load the new library; instances keep running",
            hint="systemd starts the daemon again; elsewhere: mic-supervisor run",
        )

    def _heard(self, event: XidEvent) -> None:
        self.records = counted(self.records, event)
        LOGGER.log(_LEVELS.get(event.severity, logging.WARNING), "%s", self._sentence(event))
        self._wake()

    def _sentence(self, event: XidEvent) -> str:
        if event.uuid is None:
            where = "a GPU"
        elif event.uuid in self._indices:
            where = f"GPU {self._indices[event.uuid]} ({event.uuid})"
        else:
            where = event.uuid
        says = SAYS[event.action] if event.action is not None else "the driver gives no advice"
        return f"{where}: Xid {event.xid}, {event.severity.value}; {says}"
