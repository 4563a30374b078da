"""A launch as a transient systemd service, and a unit as a workload of ours or a foreign one. Pure.

The properties are those of systemd.service(5), systemd.exec(5), systemd.kill(5) and
systemd.resource-control(5), under the names and types that org.freedesktop.systemd1(5) gives them.
What PID 1 says of times is microseconds since the epoch, or on the monotonic clock; 0 is never.

A unit's `Environment` can be read by every user of the machine over D-Bus. So it holds only who the
unit is; what the specification sets goes into a file that PID 1 reads when it starts the program.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mic_supervisor import clocks
from mic_supervisor.config.env_file import SYSTEMD_NAME
from mic_supervisor.errors import PreflightFailed
from mic_supervisor.model import (
    Doubt,
    ForeignWorkload,
    Launch,
    Near,
    ObservedWorkload,
    ProcessSpec,
    RunState,
)
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.identity import (
    identity_of,
    identity_variables,
    in_doubt,
    unknown_identity,
)

SLICE = "mic.slice"

START_TIMEOUT = 30.0
"""Seconds from the request until the program was executed."""

_PATHS = "/org/freedesktop/systemd1/unit/"
_SUFFIX = ".service"
_LONGEST = 255  # bytes of a unit's name, see systemd.unit(5)
_PLAIN = re.compile(r"[A-Za-z0-9:_.-]")
_UNLIMITED = (1 << 64) - 1
_BIND = 2  # MPOL_BIND of Linux: memory of these nodes and of no other


class Property(NamedTuple):
    """`signature` is the D-Bus type of `value`."""

    name: str
    signature: str
    value: Any


# --- the name ---------------------------------------------------------------------------------


def unit_name(name: str) -> str:
    r"""The unit for a workload's name. What a unit's name cannot hold becomes \xNN.

    That is systemd's own way, see systemd-escape(1). A name that is too long is cut, and ends in a
    digest of the whole.
    """
    parts = [_escape(character) for character in name]
    room = _LONGEST - len(_SUFFIX)
    if sum(map(len, parts)) > room:
        digest = "-" + hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
        while sum(map(len, parts)) > room - len(digest):
            parts.pop()
        parts.append(digest)
    return "".join(parts) + _SUFFIX


def _escape(character: str) -> str:
    if _PLAIN.fullmatch(character):
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))


def pattern(scope: str) -> str:
    """Matches the units of a scope, and those of a scope whose name begins like it."""
    return f"mic-{scope}-*{_SUFFIX}"


def path_prefix(scope: str) -> str:
    """With what the D-Bus path of every unit that `pattern` matches begins."""
    return _PATHS + "".join(
        character if character.isalnum() else f"_{ord(character):02x}"
        for character in f"mic-{scope}-"
    )


def name_of(path: str) -> str:
    """The unit that a D-Bus path stands for."""
    return re.sub("_([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), path.rpartition("/")[2])


# --- the environment --------------------------------------------------------------------------


def check_variables(variables: Mapping[str, str]) -> None:
    """Raises PreflightFailed for what PID 1 would leave out without failing, see env-util.c."""
    for name, value in variables.items():
        if not SYSTEMD_NAME.fullmatch(name):
            raise PreflightFailed(
                f"cannot set the variable {name!r}: "
                "systemd takes letters, digits and _ only, and no digit first"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise PreflightFailed(
                f"cannot set the variable {name}: systemd takes only UTF-8 as its value"
            ) from None


def check_texts(arguments: tuple[str, ...]) -> None:
    """Raises PreflightFailed for an argument that D-Bus cannot carry."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise PreflightFailed(
                f"cannot run {arguments[0]!r}: systemd takes only UTF-8 as its arguments"
            ) from None


# --- properties -------------------------------------------------------------------------------


def properties(
    launch: Launch, spec: ProcessSpec, program: str, stop_signal: int, environment_path: str
) -> list[Property]:
    """What StartTransientUnit is given. `program` is the absolute path of what is executed."""
    identity = launch.identity
    gpus = ", ".join(identity.gpus)
    variables = [
        f"{name}={value}" for name, value in identity_variables(launch.name, identity).items()
    ]
    found = [
        Property("Description", "s", f"{identity.model} on {gpus}" if gpus else identity.model),
        Property("Slice", "s", SLICE),
        # The start has succeeded once the program was executed, and tells why where it was not.
        Property("Type", "s", "exec"),
        Property("TimeoutStartUSec", "t", _microseconds(START_TIMEOUT)),
        command(program, spec.command),
        Property("Environment", "as", variables),
        Property("EnvironmentFiles", "a(sb)", [[environment_path, False]]),
        Property("WorkingDirectory", "s", spec.working_dir or "/"),
        # A unit that exits 0 would otherwise be forgotten, and its exit status with it.
        Property("RemainAfterExit", "b", True),
        Property("Restart", "s", "no"),
        # How PID 1 ends it when the machine goes down, and what its main process leaves behind.
        Property("KillMode", "s", "control-group"),
        Property("KillSignal", "i", stop_signal),
        Property("SendSIGKILL", "b", True),
        Property("TimeoutStopUSec", "t", _microseconds(spec.stop_timeout)),
        # What is left of a server after the kernel killed a part of it only holds the GPU.
        Property("OOMPolicy", "s", "kill"),
        # Model servers start a thread per core and model; containers have no bound either.
        Property("TasksMax", "t", _UNLIMITED),
        Property("StandardOutput", "s", "journal"),
        Property("StandardError", "s", "journal"),
        Property("SyslogIdentifier", "s", identity.instance),
        # By these, `logs --previous` finds a predecessor whose unit had another name.
        Property(
            "LogExtraFields",
            "aay",
            [
                f"MIC_SCOPE={identity.scope}".encode(),
                f"MIC_INSTANCE={identity.instance}".encode(),
            ],
        ),
    ]
    return [
        *found,
        *user(spec.user),
        *_limits(spec),
        *_confinement(launch.near),
        *_directories(spec),
    ]


def command(program: str, arguments: tuple[str, ...]) -> Property:
    """ExecStart, in which `$` is doubled: PID 1 replaces variables.

    ExecStartEx could turn that off, but systemd 252 writes it into its own copy of the unit in a
    way that it cannot read again, and the next daemon-reload leaves a unit with "bad-setting".
    """
    return Property("ExecStart", "a(sasb)", [[program, _doubled(arguments), False]])


def _doubled(arguments: Iterable[str]) -> list[str]:
    return [argument.replace("$", "$$") for argument in arguments]


def _directories(spec: ProcessSpec) -> list[Property]:
    """PID 1 has them made, as root: a supervisor in a unit of its own may not do it."""
    if not spec.directories:
        return []
    program = (sys.executable, "-I", "-c", checks.PROGRAM)
    arguments = _doubled((*program, spec.user or "", *spec.directories))
    return [
        Property("ExecStartPre", "a(sasb)", [[sys.executable, arguments, False]]),
        Property("PermissionsStartOnly", "b", True),
    ]


def user(name: str | None) -> list[Property]:
    """As whom; nothing for who PID 1 is. `name` is "user", "user:group" or the same in numbers."""
    if name is None:
        return []
    who, _, group = name.partition(":")
    found = [Property("User", "s", who)]
    return [*found, Property("Group", "s", group)] if group else found


def _limits(spec: ProcessSpec) -> list[Property]:
    limits = spec.limits
    found = []
    for name, value in (("LimitNOFILE", limits.nofile), ("LimitMEMLOCK", limits.memlock)):
        if value is not None:
            bound = _UNLIMITED if value < 0 else value
            found += [Property(name, "t", bound), Property(f"{name}Soft", "t", bound)]
    if limits.memory is not None:
        found.append(Property("MemoryMax", "t", limits.memory))
    if limits.cpus is not None:
        found.append(Property("CPUQuotaPerSecUSec", "t", _microseconds(limits.cpus)))
    return found


def _confinement(near: Near | None) -> list[Property]:
    """To the CPUs and the memory next to its GPUs. AllowedCPUs takes control groups version 2."""
    found = []
    if near is not None:
        found.append(Property("AllowedCPUs", "ay", _mask(near.cpus)))
    if near is not None and near.nodes:
        found.append(Property("NUMAPolicy", "i", _BIND))
        found.append(Property("NUMAMask", "ay", _mask(near.nodes)))
    return found


def _mask(numbers: Iterable[int]) -> bytes:
    """A bit for each, the lowest first."""
    mask = sum(1 << number for number in set(numbers))
    return mask.to_bytes(-(-mask.bit_length() // 8), "little")


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


# --- what PID 1 says of a unit ------------------------------------------------------------------


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
    "protocol": "systemd lost track of it",
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


def foreign_reason(unit: Unit, scope: str, host: str) -> str | None:
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
        return f"it comes from a unit file, {unit.text('FragmentPath') or 'and ours never do'}"
    return None


def classify(unit: Unit, scope: str, host: str) -> ObservedWorkload | ForeignWorkload:
    """What a unit is to us."""
    reason = foreign_reason(unit, scope, host)
    found = identity_of(unit.variables)
    if isinstance(found, str) and (doubted := _doubted(unit, scope, host, found)) is not None:
        return doubted
    if reason is not None or isinstance(found, str):
        running = not unit.is_over
        one = None if isinstance(found, str) else found[1]
        claims = one.instance if one and (one.scope, one.host) == (scope, host) else None
        return ForeignWorkload(
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
    reason = f"it is not certain what it is: {why}; {who} runs, and is left as it is"
    hint = f"see `systemctl status {unit.name}`; when it is not wanted: systemctl stop {unit.name}"
    identity = unknown_identity(scope, host, instance)
    seen = in_doubt(RUNTIME, name, unit.name, identity, Doubt(reason, hint))
    started = unit.seconds("ExecMainStartTimestamp")
    return replace(seen, pid=pid, created_at=unit.begun, started_at=started)


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
    return f"its main process has ended, and its other processes still run: PID {pids}"


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
    return checks.ended_by(unit.number("ExecMainStatus"))
