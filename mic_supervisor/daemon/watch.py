"""Notices what wakes the loop: files that changed, what GPUs report, a driver that was replaced."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

from mic_supervisor.converge.snapshot import Snapshot
from mic_supervisor.daemon.log import LOGGER
from mic_supervisor.daemon.parts import in_thread
from mic_supervisor.errors import MicError
from mic_supervisor.gpu import GpuSource
from mic_supervisor.gpu.events import SAYS, XidEvent, XidRecord, XidSeverity, counted, watcher_of

POLL = 0.5  # seconds between two looks at the files' content
_QUIET = 0.25  # seconds without a change until a file counts as written
_LONGEST = 3.0  # seconds after which a file that never stays the same is read all the same


class FileWatch:
    """Calls `changed` once for each burst of changes.

    `stamp` says what the files hold, `differs` whether that is not what was last read. The content
    is looked at, and no event of the kernel is waited for: network file systems send none, and
    editors and mounts replace files, links and directories in many ways. Whoever reads them, also
    `changed`, holds `reads` until they are followed.
    """

    def __init__(
        self,
        stamp: Callable[[], str],
        differs: Callable[[], bool],
        changed: Callable[[], Awaitable[object]],
        reads: asyncio.Lock,
    ) -> None:
        self._stamp = stamp
        self._differs = differs
        self._changed = changed
        self._reads = reads
        self._looks = asyncio.Lock()  # so that two who look at once find a change once

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(POLL)
            await self.look()

    async def look(self) -> None:
        """Returns when what the files held at the call is followed, whoever read it."""
        async with self._looks:
            if await asyncio.to_thread(self._differs):
                await self._unchanging()
                async with self._reads:
                    pass  # a command may have read it meanwhile
                if await asyncio.to_thread(self._differs):
                    await self._changed()
        async with self._reads:
            pass

    async def _unchanging(self) -> None:
        """Until nothing changed for a moment: ten saves in a second are one change."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LONGEST
        before = ""
        while loop.time() < deadline and (now := await asyncio.to_thread(self._stamp)) != before:
            before = now
            await asyncio.sleep(_QUIET)


# --- GPUs ---------------------------------------------------------------------------------------

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
                    loop.call_soon_threadsafe(self._on_event, event)

        await in_thread("xid", listen)

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """For the observers of the converger."""
        self._indices.update(snapshot.indices)
        if getattr(self._source, "outdated", False):
            self._outdated.set()

    async def outdated(self) -> None:
        """Raises MicError once the driver was replaced: only a new process can load its library."""
        await self._outdated.wait()
        raise MicError(
            "cannot continue: the NVIDIA driver was replaced while the daemon ran, and a process "
            "cannot load the new library; instances keep running",
            hint="systemd starts the daemon again; elsewhere: mic-supervisor run",
        )

    def _on_event(self, event: XidEvent) -> None:
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
