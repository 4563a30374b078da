"""The last transitions, kept over restarts."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from mic_supervisor import codec
from mic_supervisor.converge.events import Event
from mic_supervisor.errors import MicError

KEPT = 1000


class History:
    """Appends to a file of one JSON document a line, and rewrites it when it has grown to double.

    A line that a crash cut short is left out when the file is read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._lines = 0
        self._whole = _ends_with_a_line(path)
        for event in read(path):
            self._events.append(event)
            self._lines += 1

    def add(self, event: Event) -> None:
        """Keep what changed something; progress is gone with the moment."""
        if event.kind == "progress":
            return
        self._events.append(event)
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._lines >= 2 * KEPT:
                self._rewrite()
            else:
                with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    # A line that a crash cut short must not spoil this one.
                    file.write(("" if self._whole else "\n") + _line(event))
                self._whole = True
                self._lines += 1
        except OSError as error:
            raise MicError(f"cannot write {self._path}: {error.strerror}") from error

    def newest(self) -> tuple[Event, ...]:
        return tuple(reversed(self._events))

    def _rewrite(self) -> None:
        scratch = self._path.with_suffix(".new")
        text = "".join(_line(event) for event in self._events)
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        scratch.replace(self._path)
        self._lines = len(self._events)


def read(path: Path) -> Iterable[Event]:
    """The kept events, oldest first. Raises MicError when the file is there and unreadable."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise MicError(f"cannot read {path}: {error.strerror}", hint="run as root") from error
    for line in text.splitlines()[-KEPT:]:
        try:
            yield codec.decode(Event, codec.parse(line))
        except codec.BadDocument:
            continue  # cut short by a crash, or written by a newer version


def _ends_with_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return not file.seek(0, 2) or (file.seek(-1, 2) > -1 and file.read(1) == b"\n")
    except OSError:
        return True  # `read` tells of it, where it is more than missing


def _line(event: Event) -> str:
    return json.dumps(codec.encode(event), ensure_ascii=False) + "\n"
