"""The daemon's log: one line per change, to the journal or a terminal."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from mic_supervisor.converge.events import Event

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
        _sentence(event),
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
            }
        },
    )


def _sentence(event: Event) -> str:
    took = "" if event.seconds is None else f" after {event.seconds:.1f} s"
    where = event.instance
    if event.kind == "phase":
        was = f"{event.was} -> " if event.was else ""
        why = f": {event.text}" if event.text else ""
        return f"{where}: {was}{event.phase}{took}{why}"
    if event.kind == "begin":
        return f"{where}: {event.phase}: {event.text}"
    if event.kind == "done":
        return f"{where}: {event.phase} done{took}: {event.text}"
    if event.kind == "failed":
        hint = f" ({event.hint})" if event.hint else ""
        return f"{where}: {event.phase} failed{took}: {event.text}{hint}"
    return f"{where}: {event.text}"


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
