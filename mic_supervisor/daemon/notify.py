"""Speaks sd_notify(3) when systemd listens, and is silent elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping


class Notifier:
    """`watchdog` is how many seconds may pass between two signs of life; None: nobody asks."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        from sdnotify import SystemdNotifier

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
