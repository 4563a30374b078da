"""What PID 1 says of a unit, as a workload of ours or a stranger. Pure, and never surprised.

The properties are those of org.freedesktop.systemd1(5); times there are microseconds since the
epoch, or on the monotonic clock, and 0 is never.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mic_supervisor import clocks
from mic_supervisor.model import Doubt, ObservedWorkload, RunState, Stranger
from mic_supervisor.runtimes.identity import identity_of, unknown_identity
from mic_supervisor.runtimes.systemd.unit import SLICE, unit_name

RUNTIME = "systemd"
_NAMED = re.compile(r"-[0-9a-f]{8}$")  # how the name of every workload ends, see plan/launch.py

# "refreshing" and whatever later versions add is left UNKNOWN.
_HELD = frozenset({"active", "reloading", "activating", "deactivating"})
_ENDED = frozenset({"inactive", "failed"})
_BEGINNINGS = ("InactiveExitTimestamp", "ExecMainStartTimestamp")
EXITED = 1  # CLDEXITED, see sigaction(2); the others are deaths by signal
_NEVER = "it was never started"

# systemd.service(5), under `Restart=`, and org.freedesktop.systemd1(5), `Result`.
_RESULTS = {
    "timeout": "it did not end in time and was killed",
    "oom-kill": "it used more memory than there was, or than its limit, and was killed",
    "resources": "systemd could not set it up",
    "protocol": "systemd lost sight of it",
}


@dataclass(frozen=True, slots=True)
class Process:
    """One process in a unit's control group."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.command[:60] or '?'})"


@dataclass(frozen=True, slots=True)
class Unit:
    """One loaded unit. `remains` is what is in its control group; looked up where it matters."""

    name: str
    path: str
    properties: Mapping[str, Any]
    remains: tuple[Process, ...] = ()

    @property
    def active(self) -> str:
        return str(self.properties.get("ActiveState", ""))

    @property
    def sub(self) -> str:
        return str(self.properties.get("SubState", ""))

    @property
    def is_over(self) -> bool:
        """Whether its main process has ended and PID 1 has nothing left to do."""
        if self.active in _ENDED:
            return not self.has_job
        return (self.active, self.sub) == ("active", "exited")

    @property
    def has_job(self) -> bool:
        """Whether PID 1 has something to do with it yet; of one that is not active, to start it."""
        found = self.properties.get("Job")
        return isinstance(found, Sequence) and len(found) == 2 and found[0] != 0

    @property
    def main_pid(self) -> int | None:
        return self.number("MainPID") or None

    @property
    def invocation(self) -> str:
        """32 hex digits, another one each run; empty when unknown."""
        found = self.properties.get("InvocationID", b"")
        return bytes(found).hex() if isinstance(found, bytes | list) else ""

    @property
    def begun(self) -> float | None:
        """When its last run began: PID 1 forks before it notes down that the unit is active."""
        stamps = [stamp for stamp in map(self.seconds, _BEGINNINGS) if stamp]
        return min(stamps, default=None)

    @property
    def variables(self) -> dict[str, str]:
        found = self.properties.get("Environment")
        items = found if isinstance(found, Sequence) and not isinstance(found, str) else ()
        pairs = (str(item).partition("=") for item in items)
        return {name: value for name, _, value in pairs}

    def number(self, name: str) -> int:
        found = self.properties.get(name)
        return found if isinstance(found, int) else 0

    def text(self, name: str) -> str:
        found = self.properties.get(name)
        return found if isinstance(found, str) else ""

    def seconds(self, name: str) -> float | None:
        found = self.number(name)
        return found / 1e6 if found else None


def stranger_reason(unit: Unit, scope: str, host: str) -> str | None:
    """Why a unit is not ours; None: it is.

    An `Environment=` is copied as labels are. A name is not, while the original is there, and a
    unit of ours never comes from a file.
    """
    found = identity_of(unit.variables)
    if isinstance(found, str):
        return found
    name, identity = found
    if identity.scope != scope:
        return f"it belongs to scope {identity.scope or '(none)'}"
    if identity.host != host:
        return "it was made by the supervisor of another machine"
    if unit.name != unit_name(name):
        return f"it has the environment of {unit_name(name)}, and another name: it is a copy"
    if unit.properties.get("Transient") is False:
        return f"it comes from a unit file, {unit.text('FragmentPath') or 'which ours never do'}"
    return None


def judge(unit: Unit, scope: str, host: str) -> ObservedWorkload | Stranger:
    """What a unit is to us."""
    reason = stranger_reason(unit, scope, host)
    found = identity_of(unit.variables)
    if isinstance(found, str) and (doubted := _doubted(unit, scope, host, found)) is not None:
        return doubted
    if reason is not None or isinstance(found, str):
        running = not unit.is_over
        one = None if isinstance(found, str) else found[1]
        claims = one.instance if one and (one.scope, one.host) == (scope, host) else None
        return Stranger(
            RUNTIME,
            unit.name,
            unit.name,
            running=running,
            reason=reason or "",
            claims=claims,
            elsewhere=one is not None and one.scope != scope,
        )
    name, identity = found
    state, error = _state(unit)
    over = state is RunState.EXITED
    started = unit.seconds("ExecMainStartTimestamp")
    monotonic = None if over else unit.seconds("ExecMainStartTimestampMonotonic")
    began = None if monotonic is None else clocks.from_monotonic(monotonic)
    return ObservedWorkload(
        runtime=RUNTIME,
        name=name,
        ref=unit.name,
        identity=identity,
        state=state,
        pid=None if over else unit.main_pid,
        exit_code=exit_code(unit) if over else None,
        created_at=unit.begun,
        started_at=started if began is None else clocks.in_wall(began, started),
        running_since=began,
        finished_at=unit.seconds("ExecMainExitTimestamp") if over else None,
        error=error,
    )


def _doubted(unit: Unit, scope: str, host: str, why: str) -> ObservedWorkload | None:
    """A unit that nobody else can have made, runs, and does not tell what it is; else None.

    PID 1 says that it is transient and in our slice, and only root can have told it to make it so.
    """
    name = unit.name.removesuffix(".service")
    instance = name.removeprefix(f"mic-{scope}-")
    # One of another slice is somebody else's. Where the slice cannot be read, the name tells.
    slice_ = unit.text("Slice")
    ours = unit.properties.get("Transient") is True and (
        slice_ == SLICE or (not slice_ and _NAMED.search(name) is not None)
    )
    if not ours or instance == name or (unit.is_over and not unit.remains):
        return None
    variables = unit.variables
    if variables.get("MIC_SCOPE", scope) != scope:
        return None
    instance = variables.get("MIC_INSTANCE") or _NAMED.sub("", instance)
    pid = unit.main_pid or (unit.remains[0].pid if unit.remains else None)
    who = f"PID {pid}" if pid is not None else "it"
    reason = f"what it is cannot be told: {why}; {who} runs, and is left as it is"
    hint = f"see `systemctl status {unit.name}`; when it is not wanted: systemctl stop {unit.name}"
    return ObservedWorkload(
        runtime=RUNTIME,
        name=name,
        ref=unit.name,
        identity=unknown_identity(scope, host, instance),
        state=RunState.UNKNOWN,
        pid=pid,
        created_at=unit.begun,
        started_at=unit.seconds("ExecMainStartTimestamp"),
        error=reason,
        doubt=Doubt(reason, hint),
    )


def _state(unit: Unit) -> tuple[RunState, str | None]:
    """A GPU is free once the whole control group is gone, not when the main process is."""
    if unit.is_over:
        if unit.remains:
            return RunState.RUNNING, remains_text(unit.remains)
        return RunState.EXITED, end_reason(unit)
    if unit.active in _ENDED:
        return RunState.RUNNING, "its start is in flight"
    if unit.active not in _HELD:
        return RunState.UNKNOWN, f"systemd says that it is {unit.active or 'in no state'}"
    if unit.main_pid is None and unit.active == "deactivating":
        return RunState.RUNNING, "its main process has ended, and what it left is being ended"
    return RunState.RUNNING, None


def remains_text(remains: Sequence[Process]) -> str:
    pids = ", ".join(str(process.pid) for process in remains)
    return f"its main process has ended, and PID {pids} of it still run"


def exit_code(unit: Unit) -> int | None:
    """As a shell gives it: 128 and the signal's number for a death by signal."""
    if not unit.number("ExecMainExitTimestamp"):
        return None
    status = unit.number("ExecMainStatus")
    return status if unit.number("ExecMainCode") == EXITED else 128 + status


def end_reason(unit: Unit) -> str | None:
    """What is more than an exit code can say."""
    result = unit.text("Result")
    if result in _RESULTS:
        return _RESULTS[result]
    if not unit.number("ExecMainExitTimestamp"):
        return _NEVER
    if unit.number("ExecMainCode") == EXITED:
        return None
    number = unit.number("ExecMainStatus")
    try:
        return f"ended by {signal.Signals(number).name}"
    except ValueError:
        return f"ended by signal {number}"
