"""A wall clock that a test sets while a program runs; the machine's own stays as it is.

clock = SetClock(tmp_path)
subprocess.run([...], env={**os.environ, **clock.env()})
clock.set(-3600)
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.support.require import missing

_SOURCE = Path(__file__).with_name("realtime.c")


class SetClock:
    """`ahead` are the seconds that programs with `env()` see more than there are."""

    def __init__(self, directory: Path, ahead: int = 0) -> None:
        self._library = directory / "realtime.so"
        self._file = directory / "ahead"
        self.set(ahead)
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        try:
            subprocess.run([*command, "-o", self._library, _SOURCE], check=True, timeout=120)
        except FileNotFoundError:
            missing("gcc was not found; install it with: apt-get install gcc")

    def set(self, ahead: int) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(ahead))
        fresh.replace(self._file)
        self.ahead = ahead

    def now(self) -> float:
        return time.time() + self.ahead

    def env(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "SET_CLOCK": str(self._file)}
