"""mic-supervisor edit: gpus.yaml in an editor, and in its place only once it is valid and wanted.

A copy is edited, beside the file and of its own name: whatever ends this command, the text is there
to be found. No lock is held meanwhile, since an editor may stay open for a day; that the file is
still the one that was copied is looked at when the text is put in its place.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mic_supervisor.cli import wiring
from mic_supervisor.cli.apply import report
from mic_supervisor.cli.edit import hint_at_apply
from mic_supervisor.cli.session import Alone, order, reach
from mic_supervisor.errors import ConfigError, MicError

if TYPE_CHECKING:
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.document import Config
    from mic_supervisor.config.settings import Settings

_KEEP = {"e": "(e)dit again", "k": "(k)eep the text for later", "d": "(d)iscard it"}
_APPLY = {"y": "(y)es", **_KEEP}


@click.command(name="edit")
@click.option("--yes", is_flag=True, help="Apply without asking, where the text is valid.")
def command(yes: bool) -> int:
    """Edit gpus.yaml, see what that would change, and apply it.

    A copy is edited, with $VISUAL or $EDITOR, else `editor` or `vi`. When the editor ends, errors
    lead back into it; else the plan is shown. Only a yes to it puts the text in the file's place,
    and applies it. A text that is not put there is kept, unless you discard it. Exits as apply
    does; with 1 when nothing was applied, and 0 when nothing was changed.
    """
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.edit import locked

    found, registry = wiring.settings(), Registry()
    if not (yes or sys.stdin.isatty()):
        raise MicError("cannot ask whether to go on: this is no terminal", hint="say --yes")
    reach()
    with locked(found.config) as file:
        before = file.data
    _print_notes(found.config)
    with _copy(found.config, before) as copy:
        while True:
            _open_editor(copy, found.config)
            data = _text(copy)
            if data == before:
                click.echo(f"Nothing was changed: {found.config} is as it was.")
                return 0
            if data and not data.endswith(b"\n"):
                data += b"\n"  # a file without it may have been cut
            config = _checked(found, registry, data, ask=sys.stdin.isatty())
            if config is not None:
                # It was asked for: what a daemon may doubt is what the question is about.
                answer = Alone(config=config).call("plan", {"hash": config.hash})
                click.echo(answer["text"], nl=False)
            choice = "y" if yes and config is not None else _choice(valid=config is not None)
            if choice == "y" and config is not None:
                _put(found, registry, before, data, config)
                copy.unlink()
                break
            if choice == "d":
                copy.unlink()
            if choice != "e":
                click.echo(f"Not applied: {found.config} is as it was.")
                return 1
    params = {"path": str(found.config)}
    with hint_at_apply():
        document = order("apply", params, command="edit", config=config)
    report(document, limited=False)
    return int(document["exit_code"])


@contextmanager
def _copy(path: Path, data: bytes) -> Iterator[Path]:
    """A copy to edit. At the end it is removed if nothing was changed in it, else said to be there.

    Ctrl-C and every error included: nothing that was typed is lost.
    """
    try:
        handle, name = tempfile.mkstemp(f"{path.suffix}", f"{path.stem}.edit-", path.parent)
        copy = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError as error:
        raise MicError(
            f"cannot make a copy of {path} to edit: {error.strerror}",
            hint="run as root, or as the user that the file belongs to",
        ) from error
    try:
        yield copy
    finally:
        if copy.exists():
            if _text(copy) == data:
                copy.unlink()
            else:
                click.echo(f"Your text is kept in {copy}.", err=True)
                click.echo(f"To use it: cp {copy} {path}, then: mic-supervisor apply", err=True)


def _print_notes(path: Path) -> None:
    for other in sorted(path.parent.glob(f"{path.stem}.edit-*{path.suffix}")):
        click.echo(f"note: {other} has the text of another edit", err=True)
    for drop_in in sorted(path.with_name(f"{path.name}.d").glob("*.yaml")):
        click.echo(f"note: what {drop_in} sets wins over this file", err=True)


def _open_editor(copy: Path, path: Path) -> None:
    """Returns when the editor has ended well. Raises MicError."""
    named = (os.environ.get(name, "").strip() for name in ("VISUAL", "EDITOR"))
    editor = next(filter(None, named), None) or shutil.which("editor") or "vi"
    # Ctrl-C is the editor's own while it runs. An ignored signal would be ignored in it, too.
    own = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        click.edit(filename=str(copy), editor=editor)
    except (click.ClickException, ValueError) as error:
        why = error.message if isinstance(error, click.ClickException) else f"{editor}: {error}"
        raise MicError(
            f"cannot edit {path}: {why}", hint="name an editor that works in VISUAL or EDITOR"
        ) from error
    finally:
        signal.signal(signal.SIGINT, own)


def _text(copy: Path) -> bytes:
    """What the editor left."""
    from mic_supervisor.host.files import read_file

    try:
        return read_file(copy)
    except OSError as error:
        raise MicError(f"cannot read what the editor left in {copy}: {error.strerror}") from error


def _checked(found: Settings, registry: Registry, data: bytes, *, ask: bool) -> Config | None:
    """The configuration; None where it has errors: they are shown, or raised if nobody is there."""
    from mic_supervisor.config.load import load

    try:
        return load(found.config, registry, environ=found.environ, data=data)
    except ConfigError as error:
        if not ask:
            raise
        click.echo(error.rendered.rstrip("\n"), err=True)
        return None


def _choice(*, valid: bool) -> str:
    choices = _APPLY if valid else _KEEP
    question = f"{'Apply it' if valid else 'What now'}? {', '.join(choices.values())}"
    kind = click.Choice([*choices], case_sensitive=False)
    return str(click.prompt(question, type=kind, show_choices=False))


def _put(found: Settings, registry: Registry, before: bytes, data: bytes, config: Config) -> None:
    """Put the text in the file's place, if everything is as it was when it was shown."""
    from mic_supervisor.config.edit import locked
    from mic_supervisor.config.load import load

    with locked(found.config) as file:
        changed = found.config if file.data != before else None
        if load(found.config, registry, environ=found.environ, data=data).hash != config.hash:
            changed = changed or found.config.with_name(f"{found.config.name}.d")
        if changed is not None:
            raise MicError(
                f"cannot put the text in the place of {found.config}: "
                f"somebody has changed {changed} meanwhile",
                hint="compare the two, and run `mic-supervisor edit` again",
            )
        file.replace(data)
