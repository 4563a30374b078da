"""Host processes that hold GPUs and are not ours, as proposals."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from mic_supervisor.backends import Recognised
from mic_supervisor.backends.registry import recognise
from mic_supervisor.config.types import format_size
from mic_supervisor.host import processes
from mic_supervisor.kill import Survey
from mic_supervisor.model import Owner, OwnerKind, Pairs
from mic_supervisor.takeover import Proposal, base_name, for_env_file, in_order, refusal

_SHELLS = re.compile(
    r"(ba|z|da|k|fi|c|tc)?sh|tmux.*|screen|sshd.*|login|sudo|su|systemd|init|make|supervisord|"
    r"containerd-shim.*|cron|nohup"
)
_INTERPRETERS = re.compile(r"python[0-9.]*|node|ruby|perl|java|uv|accelerate|torchrun")
# Of a session, of a unit, or set by the supervisor: none of it is the program's own.
_NOT_ITS_OWN = re.compile(
    r"(_|USER|LOGNAME|SHELL|TERM|TERM_.*|COLORTERM|COLUMNS|LINES|PWD|OLDPWD|SHLVL|MAIL|EDITOR|"
    r"PAGER|DISPLAY|LS_COLORS|LESS(OPEN|CLOSE|CHARSET|KEY)?|SSH_(AGENT_PID|AUTH_SOCK|CLIENT|"
    r"CONNECTION|TTY)|XDG_(SESSION_.*|RUNTIME_DIR|SEAT.*|VTNR|CURRENT_DESKTOP|MENU_PREFIX)|"
    r"DBUS_(SESSION|STARTER)_.*|SUDO_.*|TMUX(_.*)?|STY|WINDOW|PS1|PROMPT_COMMAND|"
    r"INVOCATION_ID|JOURNAL_STREAM|NOTIFY_SOCKET|LISTEN_(FDS|PID|FDNAMES)|"
    r"SYSTEMD_(EXEC_PID|SLICE)|WATCHDOG_(PID|USEC)|MAINPID|"
    r"CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|MIC_.*)"
)
# Limits that a service of systemd has by itself, by their names in /proc/PID/limits; bytes or
# numbers. The others are unlimited.
_PLAIN_LIMITS = {
    "Max core file size": ("0",),
    "Max locked memory": (str(64 << 10), str(8 << 20)),
    "Max msgqueue size": ("819200",),
    "Max nice priority": ("0",),
    "Max open files": ("1024",),
    "Max realtime priority": ("0",),
    "Max stack size": (str(8 << 20),),
}
_KEYS_OF_LIMITS = {"Max open files": "nofile", "Max locked memory": "memlock"}
_OF_STATUS = {
    "CapAmb": "ambient capabilities",
    "CapBnd": "capability bounding set",
    "Cpus_allowed_list": "CPUs",
    "Mems_allowed_list": "memory nodes",
    "NoNewPrivs": "no_new_privs",
    "Seccomp": "seccomp mode",
    "Umask": "umask",
}


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
    addresses = {one.port: one.addresses for one in processes.listeners() or ()}
    found = []
    for root, holders in sorted(roots.items()):
        target = survey.target(holders[0])
        numbers = in_order(hold.number for pid in holders for hold in _holds(survey, pid))
        if target is None:
            continue
        try:
            proposal = propose(root, holders, numbers, target.owner, ports, addresses)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
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
    pid: int,
    holders: Sequence[int],
    gpus: Sequence[int | str],
    owner: Owner,
    ports: Mapping[int, int],
    addresses: Mapping[int, Collection[str]],
) -> Proposal | None:
    """`holders` are those of its tree that hold GPUs; `ports` maps listening ports to PIDs, and
    `addresses` to where they are listened on.

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
    if (user := _user(one)) is not None:
        entry["user"] = user
    limits, more = _limits(one)
    if limits:
        entry["limits"] = limits
    tree = {pid, *holders, *processes.descendants([pid])}
    listening = sorted(port for port, of in ports.items() if of in tree)
    notes = list(found.notes) if found is not None else []
    if "port" not in entry and listening:
        entry["port"] = listening[0]
    bound = addresses.get(entry.get("port", 0)) or {"127.0.0.1"}
    if entry["backend"] == "process" and "listen" not in entry and "127.0.0.1" not in bound:
        entry["listen"] = min(bound)
    if "port" in entry and "probe" not in entry and entry["backend"] == "process":
        entry["probe"] = {"tcp": True}
    if len(listening) > 1:
        notes.append(f"It listens on {', '.join(map(str, listening))}.")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and len(visible.split(",")) != len(gpus):
        notes.append(f"CUDA_VISIBLE_DEVICES is {visible!r} there, and it holds these GPUs only.")
    secrets = _own_environment(environment, one, notes)
    return Proposal(
        name=found.name if found is not None else _name(command),
        what=f"PID {pid} ({stat.name})",
        entry=entry,
        gpus=tuple(gpus),
        stop=_stop(pid, holders, owner),
        notes=tuple(notes),
        left=(*more, *_differences(one, owner)),
        secrets=secrets,
        settings={found.backend: found.settings} if found and found.settings else {},
        refused=refusal([*map(str, entry.get("command", ())), *map(str, entry.get("args", ()))]),
    )


def is_its_own(name: str) -> bool:
    """Whether a variable is not of the session, of the unit, or set by the supervisor."""
    return not _NOT_ITS_OWN.fullmatch(name)


def _own_environment(
    environment: Mapping[str, str], one: psutil.Process, notes: list[str]
) -> Pairs:
    account = _account(one.uids().real)
    home = account.pw_dir if account is not None else "/"
    secrets, lost = for_env_file(
        (name, value)
        for name, value in environment.items()
        if is_its_own(name) and (name, value) != ("HOME", home)
    )
    if lost:
        notes.append(f"An env_file cannot hold {', '.join(lost)}: put it under env.")
    if dropped := sorted(name for name in environment if name.startswith("MIC_")):
        notes.append(f"{', '.join(dropped)} is left out: such names are the supervisor's own.")
    return secrets


def _user(one: psutil.Process) -> str | None:
    """`user`, where it is not the supervisor's, or has another group than is its own."""
    uid, gid = one.uids().real, one.gids().real
    entry = _account(uid)
    if entry is None:
        return f"{uid}:{gid}"
    if gid != entry.pw_gid:
        return f"{entry.pw_name}:{_group(gid)}"
    return None if uid == os.geteuid() else entry.pw_name


def _account(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _limits(one: psutil.Process) -> tuple[dict[str, Any], list[str]]:
    """`limits` that a model would not have by itself, and more of the kind that no key says."""
    limits: dict[str, Any] = {}
    left = []
    ours = _soft_limits(os.getpid())
    for name, soft in _soft_limits(one.pid).items():
        key = _KEYS_OF_LIMITS.get(name)
        if soft in _PLAIN_LIMITS.get(name, ("unlimited",)):
            continue
        if key is not None:
            # Not as we have it: this shell may have more than the supervisor.
            if soft != "unlimited":
                limits[key] = format_size(int(soft)) if key == "memlock" else int(soft)
            else:
                limits[key] = soft
        elif soft != ours.get(name):
            left.append(f"{name.lower()} {soft}, and {ours.get(name)} here")
    return limits, left


def _soft_limits(pid: int) -> dict[str, str]:
    """/proc/PID/limits, which may be read where prlimit(2) wants a capability."""
    lines = Path(f"{psutil.PROCFS_PATH}/{pid}/limits").read_text().splitlines()[1:]
    return {line[:25].strip(): line[25:].split()[0] for line in lines}


def _differences(one: psutil.Process, owner: Owner) -> Iterator[str]:
    """What it has, no key says, and a model would not have by itself."""
    if (unit := _unit(owner)) is not None:
        yield f"what its unit sets besides: systemctl cat {unit}"
    ours = _circumstances(psutil.Process()) | {"umask": "0022"}
    for what, value in _circumstances(one).items():
        if value != ours.get(what):
            yield f"{what} {value}, and {ours.get(what)} here"
    account, gid = _account(one.uids().real), one.gids().real
    usual = {gid} if account is None else {*os.getgrouplist(account.pw_name, gid)}
    groups = {int(group) for group in _status(one.pid).get("Groups", "").split()}
    if account is not None and account.pw_uid == os.geteuid():
        usual |= set(os.getgroups())
    if more := sorted(groups - usual):
        yield f"more groups than its user has: {', '.join(map(_group, more))}"
    output = Path(f"{psutil.PROCFS_PATH}/{one.pid}/fd/1")
    if output.is_file():
        yield f"its output in {output.readlink()}: a model's is in `mic-supervisor logs`"


def _circumstances(one: psutil.Process) -> dict[str, str]:
    """What somebody who starts a process may give to it, and what children take over."""
    status, root = _status(one.pid), Path(f"{psutil.PROCFS_PATH}/{one.pid}")
    found = {what: status.get(key, "") for key, what in _OF_STATUS.items()}
    found["nice value"] = str(one.nice())
    found["I/O priority"] = " ".join(str(int(part)) for part in one.ionice())
    found["scheduling policy"] = str(os.sched_getscheduler(one.pid))
    found["OOM score adjustment"] = (root / "oom_score_adj").read_text().strip()
    found["root directory"] = str((root / "root").readlink())
    for link in sorted((root / "ns").iterdir()):
        if not link.name.endswith("_for_children"):
            found[f"{link.name} namespace"] = str(link.readlink())
    return found


def _status(pid: int) -> dict[str, str]:
    """/proc/PID/status by its names."""
    text = Path(f"{psutil.PROCFS_PATH}/{pid}/status").read_text(errors="replace")
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


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


def _unit(owner: Owner) -> str | None:
    """The service that an administrator may ask about and stop."""
    unit = owner.ref or ""
    of_system = unit.endswith(".service") and not unit.startswith("user@")
    return unit if owner.kind is OwnerKind.UNIT and of_system else None


def _stop(pid: int, holders: Sequence[int], owner: Owner) -> tuple[str, ...]:
    if (unit := _unit(owner)) is not None:
        return (f"systemctl disable --now {unit}",)
    if pid in holders:
        return (f"mic-supervisor kill {pid}",)
    return (f"mic-supervisor kill --force {pid}",)
