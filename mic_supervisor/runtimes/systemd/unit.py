"""A launch as a transient systemd service: its name, its properties, its environment. Pure.

The properties are those of systemd.service(5), systemd.exec(5), systemd.kill(5) and
systemd.resource-control(5), under the names and types that org.freedesktop.systemd1(5) gives them.

A unit's `Environment` can be read by every user of the machine over D-Bus. So it holds only who the
unit is; what the specification sets goes into a file that PID 1 reads when it starts the program.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mic_supervisor.config.env_file import SYSTEMD_NAME
from mic_supervisor.errors import PreflightFailed
from mic_supervisor.model import Launch, ProcessSpec
from mic_supervisor.runtimes import directories
from mic_supervisor.runtimes.identity import identity_variables

SLICE = "mic.slice"

START_TIMEOUT = 30.0
"""Seconds from the request until the program was executed."""

_PATHS = "/org/freedesktop/systemd1/unit/"
_SUFFIX = ".service"
_LONGEST = 255  # bytes of a unit's name, see systemd.unit(5)
_PLAIN = re.compile(r"[A-Za-z0-9:_.-]")
_UNLIMITED = (1 << 64) - 1


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
    return [*found, *user(spec.user), *_limits(spec), *_directories(spec)]


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
    program = (sys.executable, "-I", "-c", directories.PROGRAM)
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


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)
