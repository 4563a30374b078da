"""Host processes that hold GPUs and are not ours, as proposals."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from mic_supervisor.backends import Recognised
from mic_supervisor.backends.registry import recognise
from mic_supervisor.host import processes
from mic_supervisor.kill import Survey
from mic_supervisor.model import Owner, OwnerKind
from mic_supervisor.takeover import Proposal, base_name, for_env_file, refusal

_SHELLS = re.compile(
    r"(ba|z|da|k|fi|c|tc)?sh|tmux.*|screen|sshd.*|login|sudo|su|systemd|init|make|supervisord|"
    r"containerd-shim.*|cron|nohup"
)
_INTERPRETERS = re.compile(r"python[0-9.]*|node|ruby|perl|java|uv|accelerate|torchrun")
# Of a session, of a unit, or set by the supervisor: none of it is the program's own.
_NOT_ITS_OWN = re.compile(
    r"(_|HOME|USER|LOGNAME|SHELL|TERM|TERM_.*|COLORTERM|COLUMNS|LINES|PWD|OLDPWD|SHLVL|MAIL|EDITOR|"
    r"PAGER|DISPLAY|LS_COLORS|LESS.*|SSH_.*|XDG_.*|DBUS_.*|SUDO_.*|TMUX.*|STY|WINDOW|PS1|PROMPT.*|"
    r"INVOCATION_ID|JOURNAL_STREAM|NOTIFY_SOCKET|LISTEN_.*|SYSTEMD_.*|WATCHDOG_.*|MAINPID|"
    r"CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|MIC_.*)"
)


def proposals(survey: Survey, warnings: list[str]) -> list[Proposal]:
    known = processes.processes()
    roots: dict[int, list[int]] = {}
    for pid in sorted({*survey.pids(OwnerKind.ORPHAN), *survey.pids(OwnerKind.UNIT)}):
        target = survey.target(pid)
        if target is None:
            continue
        if target.instance is not None:
            warnings.append(
                f"PID {pid} is left out: it belongs to instance {target.instance} "
                f"of scope {target.scope}"
            )
            continue
        roots.setdefault(root_of(pid, known), []).append(pid)
    for pid in survey.pids(OwnerKind.UNKNOWN):
        warnings.append(f"PID {pid} is left out: its owner cannot be read")
    if not roots:
        return []
    owners = processes.listener_owners()
    ports = {port: one.pid for port, one in owners.items() if one.pid is not None}
    found = []
    for root, holders in sorted(roots.items()):
        target = survey.target(holders[0])
        indices = sorted({hold.index for pid in holders for hold in _holds(survey, pid)})
        if target is None:
            continue
        try:
            proposal = propose(root, holders, indices, target.owner, ports)
        except psutil.NoSuchProcess:
            continue  # it has ended meanwhile
        except (OSError, psutil.AccessDenied):
            warnings.append(f"PID {root} is left out: only root can read it")
            continue
        if proposal is not None:
            found.append(proposal)
    return found


def _holds(survey: Survey, pid: int) -> Any:
    target = survey.target(pid)
    return () if target is None else target.holds


def root_of(pid: int, known: Mapping[int, processes.Stat]) -> int:
    """The process that was started as a whole: up, as long as it is no shell and no manager."""
    while (stat := known.get(pid)) is not None:
        parent = known.get(stat.ppid)
        if parent is None or parent.pid <= 1 or _SHELLS.fullmatch(parent.name):
            return pid
        if parent.session != stat.session:
            return pid
        pid = parent.pid
    return pid


def propose(
    pid: int, holders: Sequence[int], gpus: Sequence[int], owner: Owner, ports: Mapping[int, int]
) -> Proposal | None:
    """`holders` are those of its tree that hold GPUs; `ports` maps listening ports to PIDs.

    None: it has ended meanwhile. Raises psutil.Error, and OSError, where it may not be looked at.
    """
    one, stat = psutil.Process(pid), processes.stat(pid)
    arguments = processes.command_line(pid)
    if stat is None or not arguments:
        return None
    directory = one.cwd()
    environment = processes.environ(pid) or {}
    program = _absolute(one, arguments[0], directory, environment.get("PATH"))
    command = [program, *arguments[1:]]
    found = recognise(command, directory, lambda path: Path(path).exists())
    if found is None or found.backend == "process":
        entry = _any_command(command, directory, found)
    else:
        entry = {"backend": found.backend, **found.entry}
    if one.uids().real != os.geteuid():
        entry["user"] = one.username()
    tree = {pid, *holders, *processes.descendants([pid])}
    listening = sorted(port for port, of in ports.items() if of in tree)
    notes = list(found.notes) if found is not None else []
    if "port" not in entry and listening:
        entry["port"] = listening[0]
    if "port" in entry and "probe" not in entry and entry["backend"] == "process":
        entry["probe"] = {"tcp": True}
    if len(listening) > 1:
        notes.append(f"It listens on {', '.join(map(str, listening))}.")
    own = [(k, v) for k, v in environment.items() if not _NOT_ITS_OWN.fullmatch(k)]
    secrets, lost = for_env_file(own)
    if lost:
        notes.append(f"An env_file cannot hold {', '.join(lost)}: put it under env.")
    return Proposal(
        name=found.name if found is not None else _name(command),
        what=f"PID {pid} ({stat.name})",
        entry=entry,
        gpus=tuple(gpus),
        stop=_stop(pid, holders, owner),
        notes=tuple(notes),
        secrets=secrets,
        settings={found.backend: found.settings} if found and found.settings else {},
        refused=refusal([*map(str, entry.get("command", ())), *map(str, entry.get("args", ()))]),
    )


def _any_command(
    command: Sequence[str], directory: str, found: Recognised | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"backend": "process", "command": list(command)}
    if directory != "/":
        entry["working_dir"] = directory
    return entry | (found.entry if found is not None else {})


def _absolute(one: psutil.Process, program: str, directory: str, search: str | None) -> str:
    """Not exe() first: behind a virtual environment's link it would lose that."""
    if program.startswith("/"):
        return program
    if "/" in program:
        return os.path.normpath(os.path.join(directory, program))  # noqa: PTH118 - links stay
    found = shutil.which(program, path=search)
    if found is not None and found.startswith("/"):
        return found
    return one.exe()


def _name(command: Sequence[str]) -> str:
    """ "serve" of "/opt/x/bin/python /opt/x/serve.py --port 1"."""
    rest = list(command)
    if _INTERPRETERS.fullmatch(base_name(rest[0])):
        if "-m" in rest[:-1]:
            return rest[rest.index("-m") + 1].rpartition(".")[2]
        scripts = [base_name(arg) for arg in rest[1:] if not arg.startswith("-")]
        if scripts:
            return scripts[0].removesuffix(".py")
    return base_name(rest[0])


def _stop(pid: int, holders: Sequence[int], owner: Owner) -> tuple[str, ...]:
    unit = owner.ref or ""
    if owner.kind is OwnerKind.UNIT and unit.endswith(".service") and not unit.startswith("user@"):
        return (f"systemctl disable --now {unit}",)
    if pid in holders:
        return (f"mic-supervisor kill {pid}",)
    return (f"mic-supervisor kill --force {pid}",)
