"""Ports that no other test uses, in this process, another worker or another checkout."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import IO

SIZE = 20
FIRST = 22000  # above the supervisor's own default range, and
LAST = 32000  # below the kernel's range for outgoing connections

_LOCKS = Path(tempfile.gettempdir()) / "mic-test-ports"


class PortBlock:
    """SIZE ports in a row, held until `close`: the lock falls with the process at the latest."""

    def __init__(self) -> None:
        self.first, self._lock = _claim()
        self._given = 0

    @property
    def range(self) -> str:
        """As MIC_PORT_RANGE wants it. `take` gives from the end, so that both can be used."""
        return f"{self.first}-{self.first + SIZE - 6}"

    def take(self) -> int:
        """One port, at most five times."""
        self._given += 1
        if self._given > 5:
            raise AssertionError("a test may take five ports; put more into its range")
        return self.first + SIZE - self._given

    def close(self) -> None:
        self._lock.close()


def _claim() -> tuple[int, IO[str]]:
    _LOCKS.mkdir(mode=0o777, exist_ok=True)
    blocks = list(range(FIRST, LAST, SIZE))
    turn = os.getpid() % len(blocks)  # workers start at different places, and seldom collide
    for first in blocks[turn:] + blocks[:turn]:
        lock = (_LOCKS / str(first)).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        if all(_free(port) for port in range(first, first + SIZE)):
            return first, lock
        lock.close()
    raise AssertionError(f"no {SIZE} free ports in a row between {FIRST} and {LAST}")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
