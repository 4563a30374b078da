"""install and uninstall: what systemd, editors, shells and man read of this installation.

A package brings the same files, made by `files`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path

import click

from mic_supervisor import codec
from mic_supervisor.cli.common import write_file
from mic_supervisor.doctor.installation import this_program
from mic_supervisor.errors import MicError
from mic_supervisor.host.files import read_file

UNIT = "lib/systemd/system/mic.service"
SCHEMA = "share/mic/gpus.schema.json"
_RECORD = "share/mic/installed.json"  # path below the prefix -> SHA-256 of what was written there
_EXAMPLES = "share/doc/mic-supervisor/examples"
_SHELLS = {
    "bash": "share/bash-completion/completions/mic-supervisor",
    "fish": "share/fish/vendor_completions.d/mic-supervisor.fish",
    "zsh": "share/zsh/site-functions/_mic-supervisor",
}
_SHARE = Path(__file__).parents[1] / "share"
_PACKAGED = "/usr/bin/mic-supervisor"  # in the unit as it is kept
_OWN_UNIT = Path("/etc/systemd/system/mic.service")  # comes before any other

prefix_option = click.option(
    "--prefix",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/usr/local"),
    metavar="DIRECTORY",
    help="What the files are below; /usr/local.",
)


@click.command(name="install")
@prefix_option
@click.option("--dry-run", is_flag=True, help="Write nothing, and show what would be written.")
def install(prefix: Path, dry_run: bool) -> int:
    """Write the systemd unit of this installation, and what belongs to it.

    That is the group mic for systemd-sysusers, the JSON Schema for editors, the man page,
    completions for bash, zsh and fish, and the examples. Nothing is started, and systemd is not
    told: what to run for that is said. What an earlier version wrote and this one does not goes. A
    file that was changed since is not replaced.
    """
    prefix = Path(os.path.abspath(prefix))  # noqa: PTH100 - a symlink stays as it is
    program = _program()
    wanted, record = files(program), _recorded(prefix)
    for name, text in wanted.items():
        digest = _digest_at(prefix / name)
        if digest not in (None, _digest(text), record.get(name)):
            raise MicError(
                f"cannot write {prefix / name}: it was changed, or something else made it",
                hint="move it away; changes of the unit belong in a drop-in: systemctl edit mic",
            )
    written = [n for n, text in wanted.items() if _digest_at(prefix / n) != _digest(text)]
    stale = list(_unchanged(prefix, {n: d for n, d in record.items() if n not in wanted}))
    for name in written:
        click.echo(f"{'would write' if dry_run else 'writes'} {prefix / name}")
        if not dry_run:
            _write(prefix / name, wanted[name])
    _remove(prefix, stale, dry_run=dry_run)
    if not written and not stale:
        click.echo(f"All {len(wanted)} files below {prefix} are as they should be.")
    if not dry_run:
        now = {name: _digest(text) for name, text in wanted.items()}
        if now != record:
            _write(prefix / _RECORD, json.dumps(now, indent=2) + "\n")
    if _OWN_UNIT.exists():
        click.echo(f"warning: systemd uses {_OWN_UNIT} instead of this unit: remove it", err=True)
    if UNIT in written:
        click.echo(
            "Next: systemd-sysusers, then: systemctl daemon-reload\n"
            "On some hosts a daemon-reload takes the GPUs away from containers that run: "
            "`mic-supervisor doctor` says whether this is one."
        )
    return 0


@click.command(name="uninstall")
@prefix_option
@click.option("--dry-run", is_flag=True, help="Remove nothing, and show what would be removed.")
def uninstall(prefix: Path, dry_run: bool) -> int:
    """Remove what install wrote, and say what still runs and how to end it.

    Nothing is stopped. A file that was changed since stays. The file gpus.yaml, the settings and
    the state stay as well, and so does the program: that goes the way it came, as with pipx.
    """
    from mic_supervisor.doctor.host import show

    prefix = Path(os.path.abspath(prefix))  # noqa: PTH100 - as above
    record = _recorded(prefix)
    _say_what_runs()
    names = list(_unchanged(prefix, record))
    unit: dict[str, str] = {}
    if UNIT in names:
        with suppress(MicError):  # there is no systemd
            unit = show("mic.service")
    busy = unit.get("ActiveState") not in ("inactive", "failed")
    if unit.get("FragmentPath") == str(prefix / UNIT) and (
        busy or unit.get("UnitFileState") == "enabled"
    ):
        raise MicError(
            f"cannot remove {prefix / UNIT}: the daemon runs, or starts with the machine",
            hint="first: systemctl disable --now mic, which stops no instance",
        )
    _remove(prefix, names, dry_run=dry_run)
    if not record:
        click.echo(f"Nothing below {prefix} was written by `mic-supervisor install`.")
    elif not dry_run:
        _remove(prefix, [_RECORD], dry_run=False, quiet=True)
    if UNIT in names:
        click.echo(
            "Next: systemctl daemon-reload, so that systemd forgets the unit; "
            "`mic-supervisor doctor` says first whether that takes GPUs from containers."
        )
    return 0


def files(program: str) -> dict[str, str]:
    """Path below the prefix -> text, for an installation whose command is `program`."""
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.schema import json_schema

    unit = (_SHARE / "mic.service").read_text(encoding="utf-8").replace(_PACKAGED, program)
    schema = json.dumps(json_schema(Registry()), indent=2, ensure_ascii=False)
    examples = _SHARE / "examples"
    return {
        UNIT: unit,
        "lib/sysusers.d/mic.conf": (_SHARE / "mic.sysusers").read_text(encoding="utf-8"),
        SCHEMA: schema + "\n",
        "share/man/man1/mic-supervisor.1": man_page(),
        **{path: _completion(shell) for shell, path in _SHELLS.items()},
        **{
            f"{_EXAMPLES}/{path.relative_to(examples)}": path.read_text(encoding="utf-8")
            for path in sorted(examples.rglob("*"))
            if path.is_file() and not {"__pycache__", ".pytest_cache"}.intersection(path.parts)
        },
    }


def _program() -> str:
    """The path of the command as it was called. Raises MicError for one that no unit can name."""
    path = this_program()
    if not os.access(path, os.X_OK):
        raise MicError(
            "cannot find the command mic-supervisor of this installation",
            hint="call it by its path, as in /usr/local/bin/mic-supervisor install",
        )
    if not re.fullmatch(r"[\w./+@-]+", path):
        raise MicError(
            f"cannot name {path} in a unit: it has characters that mean something to systemd",
            hint="install the program at a path of letters, digits and . / + @ _ -",
        )
    return path


# --- files ----------------------------------------------------------------------------------------


def _recorded(prefix: Path) -> dict[str, str]:
    """What install wrote below `prefix`. Raises MicError where that cannot be read."""
    path = prefix / _RECORD
    try:
        found = codec.parse(read_file(path))
        if any(".." in Path(name).parts or Path(name).is_absolute() for name in found):
            raise ValueError("it names a file outside of that directory")
        return {str(name): str(digest) for name, digest in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise MicError(
            f"cannot read {path}: {error}",
            hint="move it away, then: mic-supervisor install, which writes it anew",
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_at(path: Path) -> str | None:
    """None: there is no such file. Raises MicError."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MicError(f"cannot read {path}: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
    hint = "run as root, or name a directory of your own with --prefix"
    try:
        for directory in reversed(path.parents):
            if not directory.is_dir():
                directory.mkdir()
                directory.chmod(0o755)  # whatever root's umask is: others read what is in it
    except OSError as error:
        raise MicError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
    mode = 0o755 if text.startswith("#!") else 0o644
    write_file(path, text, mode=mode, replace=True, hint=hint)


def _unchanged(prefix: Path, record: Mapping[str, str]) -> Iterator[str]:
    """Those of the record that are there and as they were written; of a changed one it is said."""
    for name, digest in record.items():
        found = _digest_at(prefix / name)
        if found == digest:
            yield name
        elif found is not None:
            click.echo(f"warning: {prefix / name} was changed, and stays", err=True)


def _remove(prefix: Path, names: list[str], *, dry_run: bool, quiet: bool = False) -> None:
    for name in names:
        path = prefix / name
        if not quiet:
            click.echo(f"{'would remove' if dry_run else 'removes'} {path}")
        if dry_run:
            continue
        try:
            path.unlink()
        except OSError as error:
            raise MicError(
                f"cannot remove {path}: {error.strerror or error}", hint="run as root"
            ) from error
        for directory in path.parents:
            if not {"mic", "mic-supervisor"}.intersection(directory.relative_to(prefix).parts):
                break  # the system's own
            with suppress(OSError):  # something else is in it
                directory.rmdir()


# --- what runs ------------------------------------------------------------------------------------


def _say_what_runs() -> None:
    """The instances of this scope. That this machine cannot tell is said, too."""
    from mic_supervisor.cli import wiring
    from mic_supervisor.cli.apply import observe_ours
    from mic_supervisor.config.names import shown_id

    try:
        found = wiring.settings()
        observed, ours = observe_ours(wiring.machine(found, create_key=False))
    except MicError as error:
        click.echo(f"warning: cannot tell what still runs: {error.message}", err=True)
        return
    identities = [workload.identity for workload in ours]
    names = sorted({shown_id(one.instance, one.model) for one in identities})
    if not names:
        click.echo("No instance runs here.")
        return
    click.echo(f"These go on running: {', '.join(names)}")
    click.echo("To end them, once no daemon runs: mic-supervisor down")
    by_hand = {
        "docker": f"docker rm -f $(docker ps -aq --filter label=io.mic.scope={found.scope})",
        "systemd": f"systemctl stop 'mic-{found.scope}-*.service'",
    }
    used = [by_hand[v.runtime] for v in observed.runtimes if v.workloads and v.runtime in by_hand]
    if used:
        click.echo(f"When the program is gone: {'; '.join(used)}")


# --- what is made of the commands -----------------------------------------------------------------


def _completion(shell: str) -> str:
    from click.shell_completion import ShellComplete, get_completion_class

    from mic_supervisor.cli import group

    kind = get_completion_class(shell)
    assert kind is not None, shell
    complete = kind(group, {}, "mic-supervisor", "_MIC_SUPERVISOR_COMPLETE")
    # Not the class's own method: bash's asks the bash of this machine for its version.
    return ShellComplete.source(complete)


def man_page() -> str:
    """mic-supervisor(1), with a section for each command, as roff."""
    from mic_supervisor import __version__
    from mic_supervisor.cli import COMMANDS, group

    out = [
        f'.TH MIC-SUPERVISOR 1 "" "mic-supervisor {__version__}"',
        ".SH NAME\nmic-supervisor \\- keep one model per GPU running, as one YAML file says",
        ".SH SYNOPSIS\n.B mic-supervisor\n.I COMMAND\n[ARGUMENTS]",
        f".SH DESCRIPTION\n{_roff(group.help or '')}",
        ".SH COMMANDS",
    ]
    with click.Context(group, info_name="mic-supervisor") as top:
        for name in COMMANDS:
            command = group.get_command(top, name)
            assert command is not None, name
            context = click.Context(command, top, name)
            out.append(f".SS {_roff(' '.join([name, *command.collect_usage_pieces(context)]))}")
            out.append(_roff(command.help or ""))
            records = [param.get_help_record(context) for param in command.params]
            out += [f".TP\n.B {_roff(r[0])}\n{_roff(r[1])}" for r in records if r and r[1]]
    out += [
        ".SH FILES",
        ".TP\n.I /etc/mic/gpus.yaml\nWhich model runs on which GPU.",
        ".TP\n.I /etc/mic/mic.env\nThe settings of the program.",
        f".TP\n.I examples\nWhole files, in {_roff(_EXAMPLES)} below the prefix.",
    ]
    return "\n".join(out) + "\n"


def _roff(text: str) -> str:
    """Text that roff shows as it is, in paragraphs."""
    lines = cleandoc(text).replace("\\", "\\e").replace("-", "\\-").splitlines()
    return "\n".join(
        ".PP" if not line.strip() else "\\&" + line if line[0] in ".'" else line for line in lines
    )
