"""The directories that a host process wants to find when it starts.

A supervisor that systemd runs may write next to nowhere, and become nobody else. There PID 1 runs
this as a program, `python -I -c PROGRAM USER DIRECTORY…`, before the process itself.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from mic_supervisor.errors import PreflightFailed
from mic_supervisor.host import programs
from mic_supervisor.model import ProcessSpec
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.checks import Account

_PATIENCE = 10.0  # seconds for a command that makes or tries a directory
# -I leaves out the current directory and the user's own, but a checkout has to be found, too.
PROGRAM = f"""\
import sys
sys.path.append({str(Path(__file__).parents[2])!r})
from mic_supervisor.runtimes.directories import main
sys.exit(main(sys.argv[1:]))
"""

_MODE = 0o700
_PARENTS = 0o755

# Prints the first of its arguments that is of no use to whoever runs it.
_TRY = 'for d; do [ -r "$d" ] && [ -w "$d" ] && [ -x "$d" ] || { printf %s "$d"; exit 1; }; done'


def make(spec: ProcessSpec) -> None:
    """Make what is missing of `spec.directories`. What is there stays as it is. Idempotent.

    What belongs to the process's user may become a link to anywhere at any moment: below it, only
    that user makes anything. Raises PreflightFailed.
    """
    if not spec.directories:
        return
    who = checks.account(spec.user)
    for text in spec.directories:
        path = Path(text)
        try:
            if not path.is_dir():
                _make(path, who)
        except OSError as error:
            raise PreflightFailed(
                f"cannot make the directory {path}: {error.strerror or error}",
                hint="make room for it, or name another place in the file",
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
        make(ProcessSpec(("",), user=user or None, directories=tuple(directories)))
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
        _PATIENCE,
        env={"PATH": checks.DEFAULT_PATH, "LC_ALL": "C"},
        user=who.uid,
        group=who.gid,
        extra_groups=who.groups,
        umask=0o022,
    )
    if done.code is None:
        raise OSError(errno.ETIMEDOUT, f"{command[0]} does not end")
    return done.code, done.output.decode(errors="replace").strip()
