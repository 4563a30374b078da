"""Errors that a caller can tell apart.

Each message reads "cannot X: cause"; a hint names the way out.
"""

from __future__ import annotations

from mic_supervisor.text import LONGEST, printable

_MOST_LINES = 20  # of a message


class MicError(Exception):
    """Base of every error that is shown to a person without a traceback.

    `hint` is one imperative sentence ("start it with: systemctl start docker"), or None. What a
    program or a person said may be part of either: no terminal obeys it, and it is cut.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = _shown(message)
        self.hint = None if hint is None else _shown(hint)

    def __str__(self) -> str:
        return self.message


class ConfigError(MicError):
    """gpus.yaml, a drop-in or a setting is missing or invalid.

    `rendered` holds the whole report, one diagnostic after the other, sorted by location, for the
    terminal of who may read the file. `outline` holds their locations alone, for everybody else:
    the log, the daemon's socket, HTTP.
    """

    def __init__(
        self, message: str, *, rendered: str = "", outline: str = "", hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.rendered = rendered or outline
        self.outline = outline


class CompileError(MicError):
    """One model cannot be turned into a workload (template missing, env file unreadable).

    Blocks the instances of that model and nothing else.
    """


class Unserviceable(MicError):
    """What was asked for cannot be had here, however often it is asked for: a model that the file
    does not have, another scope. `claim` ends with 78 then."""


class DaemonGone(MicError):
    """The daemon does not answer, or went away: it may be back in a moment."""


class RuntimeUnavailable(MicError):
    """A runtime cannot be reached: what it runs is unknown, which is never the same as absent."""


class RuntimeRefused(MicError):
    """A runtime answered, and refused the call (image missing, port taken, name in use)."""


class WorkloadGone(RuntimeRefused):
    """What was to be started is not there any more: somebody removed it since the last look."""


class PreflightFailed(MicError):
    """Something that a start needs is not there; found before anything was stopped."""


class Withdrawn(MicError):
    """What a step was doing is not wanted any more; it was given up before anything was stopped."""


class StopFailed(MicError):
    """A workload is still there after TERM, grace and KILL."""


class ReleaseFailed(MicError):
    """What a former owner of a GPU had was not given back: its processes, or their memory."""


class LoadFailed(MicError):
    """A server is up but refused to load or unload a model."""


class LockHeld(MicError):
    """Another writer converges this scope. The message says who, since when, and which command."""


def _shown(text: str) -> str:
    """Printable, and no longer than anybody reads: a program may have said thousands of lines."""
    lines = text[: 2 * LONGEST].split("\n", _MOST_LINES)
    rest = "\n…" if len(lines) > _MOST_LINES else "…" if len(text) > 2 * LONGEST else ""
    return "\n".join(map(printable, lines[:_MOST_LINES])) + rest
