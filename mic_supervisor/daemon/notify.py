"""Speaks sd_notify(3) when systemd listens, and is silent elsewhere; and the sentence it shows."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from sdnotify import SystemdNotifier

from mic_supervisor.http.documents import Published
from mic_supervisor.plan.actions import Plan
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.words import clock, gpu_names

_SHOWN = 3  # instances that the sentence names


class Notifier:
    """`watchdog` is how many seconds may pass between two signs of life; None: nobody asks."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._notifier = SystemdNotifier()
        self._status = ""
        limit = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog = int(limit) / 1e6 if limit.isdigit() and mine else None

    def ready(self) -> None:
        self._send("READY=1")

    def reloading(self) -> None:
        # systemd wants to know when the reload began, to tell it from an earlier one's end.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Ask for so much more time to start or stop; to be sent again within it."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """The sentence that `systemctl status` shows. Sent when it changed."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def _send(self, text: str) -> None:
        self._notifier.notify(text)


def sentence(published: Published) -> str:
    """ "7/8 ready; GPU 3 backoff until 12:04:10; config generation 5" """
    snapshot, config = published.snapshot, published.config
    if snapshot is None:
        return "observing the machine"
    indices = snapshot.indices
    rows = snapshot.statuses
    parts = [f"{sum(row.as_desired for row in rows)}/{len(rows)} ready"]
    not_as_desired = [row for row in rows if not row.as_desired]
    for row in not_as_desired[:_SHOWN]:
        until = f" until {clock(row.next_retry)}" if row.next_retry is not None else ""
        why = f": {row.reason}" if row.phase is Phase.BLOCKED and row.reason else ""
        parts.append(f"{gpu_names(row.gpus, indices)} {row.phase.value}{until}{why}")
    if len(not_as_desired) > _SHOWN:
        parts.append(f"{len(not_as_desired) - _SHOWN} more")
    parts += [
        f"{view.runtime} cannot be read"
        for view in snapshot.observed.runtimes
        if view.error is not None
    ]
    if config.generation == 0:
        parts.append("no configuration yet")
    else:
        parts.append(f"config generation {config.generation}")
    if config.error is not None:
        first = next((line for line in config.error.splitlines() if line.strip()), "")
        parts.append(f"the file has errors and is not used: {first}")
    if config.unconfirmed is not None:
        parts.append(f"the file is not used yet: {config.unconfirmed}")
    if (waiting := snapshot.waiting()) is not None:
        parts.append(_would(waiting.plan))
    return "; ".join(parts)


def _would(plan: Plan) -> str:
    """ "it would create MAM-51000000, replace embed-51000001, and 2 more" """
    due = [f"{one.kind} {one.instance}" for one in plan.changes if one.kind != "adopt"]
    more = [f"and {len(due) - _SHOWN} more"] if len(due) > _SHOWN else []
    return f"it would {', '.join([*due[:_SHOWN], *more]) or 'change nothing that runs'}"
