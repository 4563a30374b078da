"""What is installed: the program, its unit, the schema for editors, the group of the socket."""

from __future__ import annotations

import grp
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mic_supervisor import __version__
from mic_supervisor.doctor import Finding, ok, warn
from mic_supervisor.host.files import read_text

UNIT_DIRECTORIES = (
    *("/etc/systemd/system", "/run/systemd/system"),
    *("/usr/local/lib/systemd/system", "/usr/lib/systemd/system"),
)
"""Where systemd looks for a unit of the machine; the first that has it counts (systemd.unit(5))."""

_NAME = "mic-supervisor"


def this_program() -> str:
    """The command that runs now, as it was called; else the one of this environment."""
    found = shutil.which(sys.argv[0])
    if found is None or Path(found).name != _NAME:
        found = str(Path(sys.executable).with_name(_NAME))
    return os.path.abspath(found)  # noqa: PTH100 - a symlink stays as it is


def program_of(unit: Mapping[str, str]) -> str | None:
    """The program that a unit starts, by what `systemctl show` says of it."""
    found = re.search(r"path=(\S+) ;", unit.get("ExecStart", ""))
    return found and found[1]


def unusable(program: Path) -> str | None:
    """Why it cannot be started, as "is not there"; None: it can."""
    if not os.path.exists(program):  # noqa: PTH110 - false also where it may not be looked for
        return "is not there"
    # A FIFO would be waited for, and has nothing to execute.
    if not program.is_file() or not os.access(program, os.X_OK):
        return "cannot be executed"
    try:
        with program.open("rb") as file:
            line = file.readline(512)
    except PermissionError:  # which does not keep anybody from executing it
        return None
    words = line[2:].split() if line.startswith(b"#!") else []
    if words and not os.path.exists(words[0]):  # noqa: PTH110 - as above
        return f"needs {os.fsdecode(words[0])}, which is not there"
    return None


def programs(this: str, path: str, started: str | None) -> Iterator[Finding]:
    """`this` is the command that runs now, `path` a PATH, `started` what the unit starts."""
    there = [f"{directory}/{_NAME}" for directory in path.split(os.pathsep) if directory]
    if started is not None:
        there.append(started)
    # Several links to one program are one installation.
    found = {os.path.realpath(one): one for one in there if os.access(one, os.X_OK)}
    found[os.path.realpath(this)] = this
    if len(found) == 1:
        yield ok("program", f"{this}, version {__version__}")
        return
    yield warn(
        "program",
        f"there are {len(found)} installations: {', '.join(sorted(found.values()))}"
        + ("" if started is None else f"; systemd starts {started}"),
        "keep one: remove the others as they came, with apt, dnf or pipx",
    )


def unit_files(name: str, directories: Iterable[str] = UNIT_DIRECTORIES) -> Iterator[Finding]:
    """Quiet unless there are several."""
    there = [path for one in directories if (path := Path(one) / name).exists()]
    if len(there) > 1:
        yield warn(
            name,
            f"systemd uses {there[0]}, and not {', '.join(map(str, there[1:]))}",
            f"remove {there[0]} if it is left from an earlier installation",
        )


def schema(files: Iterable[Path], wanted: Callable[[], Mapping[str, Any]]) -> Iterator[Finding]:
    """Whether editors are told what this version takes. Quiet where there is none."""
    for path in files:
        fix = f"write it anew: {_NAME} schema > {path}"
        try:
            text = read_text(path, 4 << 20)
            current = json.loads(text) == wanted() if text.strip() else None
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            yield warn("schema", f"{path} cannot be read: {error}", fix)
            continue
        if current:
            yield ok("schema", f"{path} is that of this version")
        elif current is None:
            yield warn("schema", f"{path} is empty: editors complete nothing", fix)
        else:
            yield warn("schema", f"{path} is of another version, or of other plug-ins", fix)


def group(name: str = "mic") -> Iterator[Finding]:
    subject = f"group {name}"
    try:
        members = grp.getgrnam(name).gr_mem
    except KeyError:
        yield warn(
            subject,
            "does not exist: only root may use the daemon's socket",
            f"systemd-sysusers, or: groupadd --system {name}",
        )
        return
    yield ok(subject, f"its members may use the daemon's socket: {', '.join(members) or 'nobody'}")
