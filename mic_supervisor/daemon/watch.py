"""Notices that the configuration's files changed, however they were changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from mic_supervisor.converge.tasks import tell_of_death

POLL = 2.0  # seconds between two looks at the files' content, for what no event tells
_STEP = 100  # milliseconds between two looks of the listener at what the kernel told it
_QUIET = 0.25  # seconds without a change until a file counts as written
_LONGEST = 3.0  # seconds after which a file that never rests is read all the same


async def watch(
    path: Path, differs: Callable[[], bool], changed: Callable[[], Awaitable[None]]
) -> None:
    """Call `changed` once for each burst of changes, until cancelled.

    The directories are watched, not the file: editors replace it, and a mounted file is often a
    link that is swapped. Events only hasten the look at the content, which decides.
    """
    hints = asyncio.Event()
    listener = asyncio.create_task(_listen(path, hints), name="the listener for changed files")
    listener.add_done_callback(tell_of_death)  # the look at the content goes on
    try:
        while True:
            # Where nobody said anything the content is looked at all the same.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL):
                    await hints.wait()
            hints.clear()
            if await asyncio.to_thread(differs):
                await _rest(hints)
                await changed()
    finally:
        listener.cancel()


async def _rest(hints: asyncio.Event) -> None:
    """Until nothing happened for a moment: ten saves in a second are one change."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LONGEST
    while loop.time() < deadline:
        try:
            async with asyncio.timeout(_QUIET):
                await hints.wait()
        except TimeoutError:
            return
        hints.clear()


async def _listen(path: Path, hints: asyncio.Event) -> None:
    from watchfiles import awatch

    while True:
        directories = _directories(path)
        try:
            if directories:
                async for _ in awatch(
                    *directories, debounce=200, step=_STEP, recursive=False, stop_event=None
                ):
                    hints.set()
                    if _directories(path) != directories:
                        break  # a drop-in directory came, or a link points elsewhere
                    continue
        except OSError:
            hints.set()  # a watched directory is gone; the content is still looked at
        await asyncio.sleep(POLL)


def _directories(path: Path) -> list[Path]:
    drop_ins = path.with_name(path.name + ".d")
    real = path.resolve()
    found = {path.parent, drop_ins, real.parent}
    return sorted(directory for directory in found if directory.is_dir())
