"""Runs the installed command on a terminal of its own."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.support.mic import PROGRAM, Mic
from tests.support.waiting import until


class Terminal:
    """A command on a terminal of its own, and what it wrote so far."""

    def __init__(self, mic: Mic, *args: str, columns: int = 80) -> None:
        self._end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {k: v for k, v in mic.environment().items() if k not in ("COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [PROGRAM, *args],
            env={**env, "TERM": "xterm-256color"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character
        self.raw = ""

    def read(self) -> str:
        while select.select([self._end], [], [], 0.05)[0]:
            try:
                self.raw += self._decoder.decode(os.read(self._end, 65536))
            except OSError:  # the other end is closed
                break
        return self.raw

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C until it ends: one just before the command waits for a key is noticed with the
        next key only.
        """
        for _ in range(10):
            self.type("\x03")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
                return

    def shows(self, text: str, timeout: float = 60.0) -> str:
        """What came so far, once `text` is part of it. It is forgotten then."""
        until(lambda: text in self.read(), f"{text!r}; there is\n{self.raw}", timeout=timeout)
        shown, self.raw = self.raw.replace("\r", ""), ""
        return shown

    def ends(self, timeout: float = 30.0) -> tuple[int, str]:
        """The exit code, and what came since the last look."""
        code = self.process.wait(timeout)
        return code, self.read().replace("\r", "")

    def screens(self) -> list[str]:
        """Every screen that was drawn, without colours."""
        drawn = self.read().split("\x1b[H")[1:]
        return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "") for text in drawn]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)


@contextmanager
def terminal(mic: Mic, *args: str) -> Iterator[Terminal]:
    made = Terminal(mic, *args)
    try:
        yield made
    finally:
        made.close()
