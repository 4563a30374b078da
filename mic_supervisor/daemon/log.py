"""What happened: the daemon's log, a line per change, and the history, kept over restarts."""

from __future__ import annotations

import json
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from mic_supervisor import codec
from mic_supervisor.config.names import with_shown_ids
from mic_supervisor.converge.events import Event, fit
from mic_supervisor.errors import MicError
from mic_supervisor.host.files import read_file, set_aside
from mic_supervisor.plan.words import beside

LOGGER = logging.getLogger("mic")

_LEVELS = {
    "failed": logging.WARNING,
    "gpu": logging.WARNING,
    "progress": logging.DEBUG,
    "warning": logging.WARNING,
}
# journald reads a priority from the line's beginning: sd-daemon(3).
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


def set_up(level: str, style: str, *, journal: bool) -> None:
    """`style` is "text" or "json". Under systemd the journal has the time already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if style == "json" else _Text(journal=journal))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False


def log_event(event: Event) -> None:
    """What the converger tells, as a line."""
    LOGGER.log(
        _LEVELS.get(event.kind, logging.INFO),
        "%s",
        with_shown_ids(_sentence(event), {event.instance: event.model}),
        extra={
            "fields": {
                "event": event.kind,
                "instance": event.instance,
                "model": event.model,
                "gpus": list(event.gpus),
                "cause": event.cause or None,
                "seconds": None if event.seconds is None else round(event.seconds, 3),
                "phase": event.phase,
                "was": event.was,
                "by": event.by,
            }
        },
    )


def _sentence(event: Event) -> str:
    took = "" if event.seconds is None else f" after {event.seconds:.1f} s"
    where = event.instance
    if event.kind == "phase":
        was = f"{event.was} -> " if event.was else ""
        why = f": {beside(event.phase or '', event.text)}" if event.text else ""
        return f"{where}: {was}{event.phase}{took}{why}"
    if event.kind == "begin":
        return f"{where}: {event.phase}: {event.text}"
    if event.kind == "done":
        return f"{where}: {event.phase} done{took}: {event.text}"
    if event.kind == "failed":
        hint = f" ({event.hint})" if event.hint else ""
        return f"{where}: {event.phase} failed{took}: {event.text}{hint}"
    return f"{where}: {event.text}{event.ordered}"


class _Text(logging.Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)-7s %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._journal:
            return text
        priority = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(priority + line for line in text.splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)


# --- the history --------------------------------------------------------------------------------

KEPT = 1000
_MOST = 64 << 20  # bytes of the file


class History:
    """Appends to a file of one JSON document a line, and rewrites it when it has grown to double.

    A line that a crash cut short is left out when the file is read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: deque[Event] = deque(maxlen=KEPT)
        try:
            text = _text(path)
        except MicError as error:
            LOGGER.error("%s; the history begins anew", error.message)
            with suppress(OSError):  # then nothing is added, and that is told of each time
                set_aside(path)
            text = ""
        self._events.extend(_events(text))
        self._lines = len(self._events)
        self._whole = not text or text.endswith("\n")

    def add(self, event: Event) -> None:
        """Keep what changed something; progress is gone with the moment."""
        if event.kind == "progress" or self._fails_again(event):
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

    def _fails_again(self, event: Event) -> bool:
        """Whether it is a try that failed as the one before it did."""
        tries = (one for one in reversed(self._events) if one.kind in ("begin", "failed"))
        last = next((one for one in tries if one.instance == event.instance), None)
        return event.kind == "failed" and last is not None and _failure(last) == _failure(event)

    def newest(self) -> tuple[Event, ...]:
        return tuple(reversed(self._events))

    def _rewrite(self) -> None:
        scratch = self._path.with_suffix(".new")
        text = "".join(_line(event) for event in self._events)
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        scratch.replace(self._path)
        self._lines = len(self._events)


def _failure(event: Event) -> tuple[str, str | None, str, str]:
    return event.kind, event.phase, event.model, event.text


def read(path: Path) -> Iterable[Event]:
    """The kept events, oldest first. Raises MicError when the file is there and unreadable."""
    return _events(_text(path))


def _text(path: Path) -> str:
    try:
        return read_file(path, _MOST).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise MicError(f"cannot read {path}: {error.strerror}", hint="run as root") from error


def _events(text: str) -> Iterator[Event]:
    for line in text.splitlines()[-KEPT:]:
        with suppress(codec.BadDocument):  # cut short by a crash, or written by a newer version
            yield fit(codec.decode(Event, codec.parse(line)))


def _line(event: Event) -> str:
    return json.dumps(codec.encode(event), ensure_ascii=False) + "\n"
