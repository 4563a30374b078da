"""What both runtimes of host processes share: what one needs before it can start, and its checks.

A supervisor that systemd runs may write next to nowhere, and become nobody else. There PID 1 makes
the directories: it runs this as a program, `python -I -c PROGRAM USER DIRECTORY…`, before the
process itself.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import resource
import shutil
import signal
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mic_supervisor.errors import PreflightFailed, RuntimeRefused, StopFailed
from mic_supervisor.host import processes as procfs
from mic_supervisor.host import programs
from mic_supervisor.model import Launch, ObservedWorkload, ProcessSpec
from mic_supervisor.runtimes import TIMED_OUT, HostCommand

CHECK_ID = "MIC_CHECK_ID"
MOST_OUTPUT = 4096  # bytes of a check's output that are kept


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a process runs as. `switch` False: it is who we are already."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    switch: bool


def account(user: str | None) -> Account:
    """The account that `user` ("name", "1000", "name:group", "1000:1000") stands for.

    None is who we are. Raises PreflightFailed for names that do not exist, and for another user
    than our own where we are not root.
    """
    me = os.geteuid()
    if user is None:
        return Account(me, os.getegid(), (), programs.home(), False)
    name, _, group = user.partition(":")
    entry = _user(name)
    if entry is None and not (name.isdigit() and group):
        raise PreflightFailed(
            f"cannot run as {user}: there is no user {name}",
            hint="create it, or write two numbers, UID:GID",
        )
    uid = entry.pw_uid if entry else int(name)
    gid = _group(group) if group else (entry.pw_gid if entry else None)
    if gid is None:
        raise PreflightFailed(f"cannot run as {user}: there is no group {group}")
    home = (entry.pw_dir if entry else "") or "/"
    if me == 0:
        groups = tuple(os.getgrouplist(entry.pw_name, gid)) if entry else (gid,)
        return Account(uid, gid, groups, home, True)
    if uid != me or (group and gid != os.getegid()):
        raise PreflightFailed(
            f"cannot run as {user}: only root may run a process as somebody else",
            hint="run the supervisor as root, or leave `user` out",
        )
    return Account(me, os.getegid(), (), home, False)


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        return None


def _group(name: str) -> int | None:
    try:
        return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def environment(what: ProcessSpec | HostCommand, who: Account) -> dict[str, str]:
    """PATH, HOME and LANG, unless it sets them, and what it sets."""
    return {**programs.plain_environment(who.home), **dict(what.env)}


def limits(spec: ProcessSpec) -> dict[str, int]:
    """Names of `resource` -> both bounds; -1 is unlimited."""
    named = {"RLIMIT_NOFILE": spec.limits.nofile, "RLIMIT_MEMLOCK": spec.limits.memlock}
    return {name: value for name, value in named.items() if value is not None}


def stop_signal(workload: ObservedWorkload, name: str) -> int:
    """The number of a signal to stop a workload with. Raises RuntimeRefused."""
    if (number := signal_number(name)) is None:
        raise RuntimeRefused(f"cannot stop {workload.name}: there is no signal {name}")
    return number


def signal_number(name: str) -> int | None:
    """The number of "SIGTERM", "TERM" or "15"; None for what is no signal."""
    text = name.upper()
    if text.isdigit():
        return int(text) if int(text) in signal.valid_signals() else None
    full = text if text.startswith("SIG") else f"SIG{text}"
    # SIGRTMIN+1 and so on are not in the enumeration, and nobody stops a server with them.
    return signal.Signals[full].value if full in signal.Signals.__members__ else None


def ended_by(number: int) -> str:
    """A death by signal, in words."""
    try:
        return f"ended by {signal.Signals(number).name}"
    except ValueError:
        return f"ended by signal {number}"


def survived(name: str, who: str) -> StopFailed:
    """Of a tree of which something is left after KILL."""
    return StopFailed(
        f"cannot stop {name}: {who} survived KILL",
        hint="where the kernel does not let go of it, only a restart of the machine helps",
    )


class ProcessRuntime(ABC):
    """What a runtime of host processes does whatever keeps them. See `Runtime` for the contract.

    Nothing on disk holds an environment, which may hold secrets: what `restart` needs is kept here.
    """

    creates_ahead = False

    def __init__(self) -> None:
        self._launches: dict[str, Launch] = {}

    @abstractmethod
    def start(self, launch: Launch) -> None: ...

    def create(self, launch: Launch) -> None:
        """Never: see `creates_ahead`."""
        raise RuntimeRefused(f"cannot create {launch.name} without starting it: it is a process")

    def restart(self, workload: ObservedWorkload) -> None:
        """Start it again, if this very program started it.

        Raises RuntimeRefused otherwise; `start` with a launch of the same specification does it.
        """
        launch = self._launches.get(workload.name)
        if launch is None:
            raise RuntimeRefused(
                f"cannot start {workload.name} again: its environment may hold secrets, is "
                "therefore not kept, and was lost when the supervisor was restarted",
                hint="it can be started from its specification only",
            )
        self.start(launch)


def process_spec(launch: Launch) -> ProcessSpec:
    """Raises PreflightFailed for a container."""
    if not isinstance(launch.spec, ProcessSpec):
        raise PreflightFailed(f"cannot start {launch.name}: a container is no host process")
    return launch.spec


def preflight(spec: ProcessSpec) -> None:
    """Raises PreflightFailed for the first thing that would make a start fail."""
    who = account(spec.user)
    _check_texts(spec)
    _check_limits(spec)
    if signal_number(spec.stop_signal) is None:
        raise PreflightFailed(f"cannot stop it with {spec.stop_signal}: there is no such signal")
    directory = Path(spec.working_dir or "/")
    if not directory.is_absolute():
        raise PreflightFailed(f"cannot run in {directory}: working_dir is not an absolute path")
    try:
        if not directory.is_dir():
            reason = "it is not a directory" if directory.exists() else "it does not exist"
            raise PreflightFailed(f"cannot run in {directory}: {reason}")
    except PermissionError as error:
        raise PreflightFailed(f"cannot run in {directory}: {error.strerror}") from error
    program = _check_program(spec, directory, who)
    if who.switch:
        for path in (directory, program):
            if not _may_use(path, who):
                raise PreflightFailed(
                    f"cannot run as {spec.user}: that user has no access to {path}",
                    hint=f"see which part keeps it out: namei -l {path}",
                )


def _may_use(path: Path, who: Account) -> bool:
    """Whether the account may enter a directory or execute a file, as the kernel sees it."""
    try:
        done = programs.run(
            ["test", "-x", str(path)], 10.0, env={"PATH": programs.DEFAULT_PATH}, **as_account(who)
        )
    except OSError:
        return True  # it could not be asked: the start will tell
    return done.code in (0, None)


def _check_texts(spec: ProcessSpec) -> None:
    if not spec.command or not spec.command[0]:
        raise PreflightFailed("cannot run an empty command")
    for argument in spec.command:
        if "\0" in argument:
            raise PreflightFailed(f"cannot run {spec.command[0]}: an argument holds a NUL")
    for name, value in spec.env:
        if not name or "=" in name or "\0" in name:
            raise PreflightFailed(f"cannot set the variable {name!r}: that is not a name")
        if "\0" in value:
            raise PreflightFailed(f"cannot set the variable {name}: its value holds a NUL")


def _check_limits(spec: ProcessSpec) -> None:
    bound = spec.limits
    for name, value in (("memory", bound.memory), ("cpus", bound.cpus), ("numa", bound.numa)):
        if value is not None:
            raise PreflightFailed(
                f"cannot keep limits.{name}: a process without systemd has no control group",
                hint=f"leave limits.{name} out, or run where systemd is PID 1",
            )
    for text, value in limits(spec).items():
        _, hard = resource.getrlimit(getattr(resource, text))
        beyond = hard != resource.RLIM_INFINITY and (value == -1 or value > hard)
        if beyond and os.geteuid() != 0:
            raise PreflightFailed(
                f"cannot set {text} to {'unlimited' if value == -1 else value}: "
                f"the hard limit is {hard}, and only root may raise it"
            )


def find_program(name: str, directory: Path, search: str) -> Path:
    """What is executed for a command that begins with `name`. Raises PreflightFailed."""
    if "/" in name:
        return directory / name
    found = shutil.which(name, path=search)
    if found is None:
        raise PreflightFailed(
            f"cannot run {name}: it is not on the PATH {search}",
            hint="write its absolute path, or set PATH in `env`",
        )
    return Path(found)


def _check_program(spec: ProcessSpec, directory: Path, who: Account) -> Path:
    """Where the program is. A script needs its interpreter, too."""
    path = find_program(spec.command[0], directory, environment(spec, who)["PATH"])
    try:
        if not path.exists():
            raise PreflightFailed(f"cannot run {path}: it does not exist")
        if not path.is_file():
            raise PreflightFailed(f"cannot run {path}: it is not a file")
    except PermissionError as error:
        raise PreflightFailed(f"cannot run {path}: {error.strerror}") from error
    # What is executable for its owner alone, a root that is confined to reading may not execute.
    theirs = who.switch and path.stat().st_mode & 0o111
    if not theirs and not os.access(path, os.X_OK):
        raise PreflightFailed(f"cannot run {path}: it is not executable", hint=f"chmod +x {path}")
    interpreter = _interpreter(path)
    if interpreter is not None and not (directory / interpreter).exists():
        raise PreflightFailed(
            f"cannot run {path}: its interpreter {interpreter} does not exist",
            hint="a virtual environment that was moved has to be made again",
        )
    return path


def _interpreter(path: Path) -> Path | None:
    """What the `#!` line of a script names; None for anything else."""
    try:
        with path.open("rb") as file:
            first = file.readline(512)
    except OSError:
        return None  # a program may be executable without being readable
    words = first[2:].split() if first.startswith(b"#!") else []
    return Path(os.fsdecode(words[0])) if words else None


# --- probing ----------------------------------------------------------------------------------


def run_check(
    command: tuple[str, ...],
    timeout: float,
    who: Account,
    directory: str,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, str]:
    """(exit code, output) of a command with a minimal environment, stdout and stderr together.

    128 and the signal's number for a death by signal, TIMED_OUT at the deadline. Whatever the
    command started is gone when this returns. Raises OSError when it cannot be started.
    """
    nonce = str(uuid.uuid4())
    done = programs.run(
        command,
        timeout,
        env={**programs.plain_environment(who.home), CHECK_ID: nonce},
        cwd=directory,
        most=MOST_OUTPUT,
        end=lambda process: end_all(nonce, process.pid),
        clock=clock,
        **as_account(who),
    )
    text = done.output.decode(errors="replace").strip()
    if done.code is None:
        return timed_out(timeout, text)
    return (128 - done.code if done.code < 0 else done.code), text


def timed_out(timeout: float, said: str) -> tuple[int, str]:
    """What a check gives that was ended at its deadline."""
    return TIMED_OUT, f"it did not end within {timeout:g} s" + (f": {said}" if said else "")


def as_account(who: Account) -> dict[str, Any]:
    """How to run a program as an account."""
    if not who.switch:
        return {}
    return {"user": who.uid, "group": who.gid, "extra_groups": who.groups}


def end_all(nonce: str, *pids: int) -> None:
    """KILL what has this nonce, and these with all below them. They are children that were not
    waited for: their PIDs are their own until then.
    """
    none_before = False
    for _ in range(50):
        below = procfs.descendants(pids)
        found = {*pids, *below, *procfs.with_environ(CHECK_ID, [nonce])}
        running = [one for pid in found if (one := procfs.stat(pid)) is not None and one.running]
        # One that forks behind a look and ends before it is read leaves a child for the next look.
        if not running and none_before:
            break
        none_before = not running
        for one in running:
            with contextlib.suppress(PermissionError):
                procfs.send_signal(one.pid, one.start_time, signal.SIGKILL)
        time.sleep(0.01)


# --- directories --------------------------------------------------------------------------------


_TIMEOUT = 10.0  # seconds for a command that makes or tries a directory
# -I leaves out the current directory and the user's own, but a checkout has to be found, too.
PROGRAM = f"""\
import sys
sys.path.append({str(Path(__file__).parents[2])!r})
from mic_supervisor.runtimes.checks import main
sys.exit(main(sys.argv[1:]))
"""

_MODE = 0o700
_PARENTS = 0o755

# Prints the first of its arguments that is of no use to whoever runs it.
_TRY = 'for d; do [ -r "$d" ] && [ -w "$d" ] && [ -x "$d" ] || { printf %s "$d"; exit 1; }; done'


def make_directories(spec: ProcessSpec) -> None:
    """Make what is missing of `spec.directories`. What is there stays as it is. Idempotent.

    What belongs to the process's user may become a link to anywhere at any moment: below it, only
    that user makes anything. Raises PreflightFailed.
    """
    if not spec.directories:
        return
    who = account(spec.user)
    for text in spec.directories:
        path = Path(text)
        try:
            if not path.is_dir():
                _make(path, who)
        except OSError as error:
            raise PreflightFailed(
                f"cannot make the directory {path}: {error.strerror or error}",
                hint="make room for it, or name another directory in the file",
            ) from error
    try:
        useless = _useless(spec.directories, who)
    except OSError as error:
        raise PreflightFailed(
            f"cannot try the directories as {spec.user}: {error.strerror or error}"
        ) from error
    if useless is not None:
        raise PreflightFailed(
            f"cannot use the directory {useless}: {spec.user or 'this user'} may not write there",
            hint=f"see which part keeps it out: namei -l {useless}",
        )


def main(arguments: list[str]) -> int:
    """The exit status; why, in one line on stderr."""
    user, *directories = arguments
    try:
        make_directories(ProcessSpec(("",), user=user or None, directories=tuple(directories)))
    except PreflightFailed as error:
        hint = f" ({error.hint})" if error.hint else ""
        sys.stderr.write(f"{error}{hint}\n")
        return 1
    return 0


def _make(path: Path, who: Account) -> None:
    missing = [path]
    while not missing[-1].parent.is_dir():
        missing.append(missing[-1].parent)
    there = [*path.parents][len(missing) - 1 :]
    if who.switch and any(part.lstat().st_uid == who.uid for part in there):
        _make_as(path, who)
        return
    for part in reversed(missing):
        part.mkdir(exist_ok=True)  # two lanes may have a parent in common
        # Not by mkdir's mode, which the umask has a say in.
        part.chmod(_MODE if part == path else _PARENTS, follow_symlinks=True)
    if who.switch:
        os.chown(path, who.uid, who.gid, follow_symlinks=False)


def _make_as(path: Path, who: Account) -> None:
    code, said = _run(["mkdir", "-p", "-m", f"{_MODE:o}", "--", str(path)], who)
    if code:
        raise OSError(0, said.rpartition(": ")[2] or "mkdir failed")


def _useless(paths: tuple[str, ...], who: Account) -> str | None:
    """The first directory in which the user cannot work; None: there is none."""
    if not who.switch:
        return next((p for p in paths if not os.access(p, os.R_OK | os.W_OK | os.X_OK)), None)
    code, said = _run(["sh", "-c", _TRY, "sh", *paths], who)
    return said if code == 1 and said else None


def _run(command: list[str], who: Account) -> tuple[int, str]:
    """(exit code, output). Raises OSError, for a command that does not end, too."""
    done = programs.run(
        command,
        _TIMEOUT,
        env={"PATH": programs.DEFAULT_PATH, "LC_ALL": "C"},
        umask=0o022,
        **as_account(who),
    )
    if done.code is None:
        raise OSError(errno.ETIMEDOUT, f"{command[0]} does not end")
    return done.code, done.output.decode(errors="replace").strip()
