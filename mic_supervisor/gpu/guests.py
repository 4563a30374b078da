"""Who else is inside NVML, and how to have them leave for a moment.

NVML counts its users, and enumerates GPUs only when the first one initialises it. Whoever stays
inside keeps a GPU that came back from being found.
"""

from __future__ import annotations

import threading


class Guests:
    """The door of the library. Its host lets in and sends away; a guest enters and leaves.

    A guest inside has an nvmlInit of its own, so that nothing breaks if it does not leave in time:
    the host's new initialisation merely finds no other GPUs than the old one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._inside = 0

    def admit(self) -> None:
        """The library is initialised: come in."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def send_away(self, timeout: float) -> bool:
        """Whether everyone has left within `timeout` seconds. Nobody enters until `admit`."""
        with self._changed:
            self._open = False
            return self._changed.wait_for(lambda: not self._inside, timeout)

    def enter(self, timeout: float) -> bool:
        """Wait at the door for at most `timeout` seconds; who enters must `leave`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._open, timeout):
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @property
    def welcome(self) -> bool:
        """False: leave at the next occasion."""
        return self._open
