"""Tasks that are ended, and that may not end. What converges and what listens both need it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

_LOGGER = logging.getLogger("mic")
_AGAIN = 0.5  # seconds until a task that did not end is cancelled once more


async def end(tasks: Iterable[asyncio.Task[Any]], patience: float = 2.0) -> None:
    """Cancel them, and wait until they have ended, `patience` seconds at most.

    A cancellation can get lost on its way, in a library or in asyncio.wait_for of Python 3.11, so
    it is sent again. A task that stays is named in the log and left.
    """
    loop = asyncio.get_running_loop()
    left, over = set(tasks), loop.time() + patience
    while left and loop.time() < over:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=min(_AGAIN, patience))
        for task in done:
            tell_of_death(task)
    for task in left:
        _LOGGER.error("%s does not end; it is left behind", task.get_name())


def tell_of_death(task: asyncio.Task[Any]) -> None:
    """Write down what a task died of, as a callback of it, too. Being cancelled is no death."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOGGER.error("%s has died", task.get_name(), exc_info=error)
