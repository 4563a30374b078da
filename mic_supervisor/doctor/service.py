"""systemd, the unit, and the daemon that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mic_supervisor.doctor import Finding, fail, ok, warn
from mic_supervisor.errors import MicError
from mic_supervisor.host import programs
from mic_supervisor.host.lock import lock_holder

UNIT = "mic.service"
_SLICE = "mic.slice"
_PATIENCE = 5.0  # seconds for one question


def systemd(
    marker: Path = Path("/run/systemd/system"), program: str = "systemctl"
) -> Iterator[Finding]:
    if not marker.is_dir():
        yield warn(
            "systemd",
            "is not PID 1: host processes run below keepers, and nothing starts the daemon",
            "start it from whatever supervises this machine: mic-supervisor run",
        )
        return
    version = _ask(program, "--version").split("\n", 1)[0]
    yield ok("systemd", version or "is PID 1")
    unit = _show(program, UNIT)
    if unit.get("LoadState") != "loaded":
        yield warn(
            UNIT,
            "is not installed" if unit.get("LoadState") == "not-found" else "cannot be loaded",
            "copy systemd/mic.service to /etc/systemd/system",
        )
    else:
        yield from _unit(unit)
    if (tasks := _show(program, _SLICE).get("TasksCurrent", "")).isdigit():
        yield ok(_SLICE, f"{tasks} tasks in it")


def _unit(unit: dict[str, str]) -> Iterator[Finding]:
    state = unit.get("ActiveState", "?")
    if state == "failed":
        yield fail(UNIT, f"has failed ({unit.get('Result', '?')})", "see why: journalctl -u mic -e")
    elif state != "active":
        yield warn(UNIT, f"is {state}", "start it with: systemctl start mic")
    else:
        restarts = unit.get("NRestarts", "0")
        yield ok(UNIT, "runs" if restarts == "0" else f"runs, after {restarts} restarts")
    if unit.get("UnitFileState") not in ("enabled", "enabled-runtime", "static"):
        yield warn(
            UNIT,
            f"is {unit.get('UnitFileState') or 'not enabled'}: it does not come back after a boot",
            "enable it with: systemctl enable mic",
        )


def daemon(
    ask: Callable[[], Mapping[str, Any] | None], path: Path, lock_path: Path
) -> Iterator[Finding]:
    """`ask` gives the daemon's status document; None: nobody listens at `path`. Raises MicError."""
    status = ask()
    holder = lock_holder(lock_path)
    who = "nobody"
    if holder is not None:
        since = datetime.fromtimestamp(holder.since).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        who = f"PID {holder.pid} ({holder.command}, by {holder.user}) since {since}"
    if status is None:
        if holder is not None:
            yield warn("daemon", f"does not listen at {path}, and {who} holds the lock")
        else:
            yield warn("daemon", f"none listens at {path}", "start it with: systemctl start mic")
        return
    yield ok("daemon", f"answers at {path}; the lock is held by {who}")
    config = status["config"]
    if not config["last_reload_ok"]:
        yield warn(
            "daemon",
            f"rejected {config['path']} as it is now; what was good before keeps running",
            "see why: mic-supervisor check",
        )


def _show(program: str, unit: str) -> dict[str, str]:
    names = "LoadState,ActiveState,UnitFileState,Result,NRestarts,TasksCurrent"
    lines = _ask(program, "show", unit, f"--property={names}").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _ask(*command: str) -> str:
    try:
        done = programs.run(command, _PATIENCE, apart=True)
    except OSError as error:
        raise MicError(f"cannot ask {command[0]}: {error.strerror}") from error
    if done.code is None:
        raise MicError(f"cannot ask {command[0]}: it gives no answer within {_PATIENCE:g} s")
    return done.output.decode(errors="replace")
