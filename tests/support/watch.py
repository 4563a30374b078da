"""Looks at a machine again and again, while a test does something."""

from __future__ import annotations

import threading
from typing import Self


class Watch:
    """Looks every `PAUSE` seconds, for as long as it is entered.

    What looks doubled is looked at again, and counts when it is doubled still: one that was ending
    while it was looked at is gone from the second look. `looks` is how many there were.
    """

    PAUSE = 0.05

    def __init__(self) -> None:
        self.looks = 0
        self.doubled: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self.PAUSE):
            self.doubled += self._look()
            self.looks += 1

    def _look(self) -> list[str]:
        """What is doubled."""
        raise NotImplementedError
