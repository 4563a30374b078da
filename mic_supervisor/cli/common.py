"""What several commands have in common: options, and how a result is printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mic_supervisor.errors import MicError
from mic_supervisor.host.files import hint_to_replace

if TYPE_CHECKING:
    from rich.table import Table

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

Command = TypeVar("Command", bound=Callable[..., Any])
Kind = Literal["models", "instances", "gpus", "profiles"]


def completes(*kinds: Kind) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """For `shell_complete`: what there is of these kinds, in the file and on the machine."""

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        from mic_supervisor.cli.session import known_names

        there = known_names()
        return [name for kind in kinds for name in there[kind] if name.startswith(incomplete)]

    return complete


def name_argument(metavar: str, *, required: bool = True) -> Callable[[Command], Command]:
    """An instance, a model or a GPU."""
    return click.argument(
        "name",
        metavar=metavar if required else f"[{metavar}]",
        required=required,
        shell_complete=completes("models", "instances", "gpus"),
    )


targets_option = click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="GPU|MODEL|INSTANCE",
    shell_complete=completes("models", "instances", "gpus"),
    help="This one only; may be said several times. Removes nothing that the file merely lacks.",
)


class Duration(click.ParamType[float]):
    """Seconds, from "500ms", "30s", "5m" or "1h"."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        from mic_supervisor.config.types import parse_duration

        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Whole(click.IntRange):
    """A whole number between two, and said to be one where something else is given."""

    name = "whole number"


EXIT_DECLINED = 130  # as after Ctrl-C


def confirm(question: str, *, yes: bool, otherwise: str) -> None:
    """Ask, unless `yes`. Where the answer is no, say `otherwise` and end the command.

    Raises MicError.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise MicError("cannot ask whether to go on: this is no terminal", hint="say --yes")
    if not click.confirm(question):
        click.echo(otherwise, err=True)
        raise click.exceptions.Exit(EXIT_DECLINED)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_rows(headers: str, rows: Sequence[tuple[str, ...]], *, gives: str) -> None:
    """A table on a terminal, see `table`; in a pipe a line for each row, parted by tabs."""
    from mic_supervisor.text import printable

    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(map(printable, row)))
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    shown = [tuple(cell or "-" for cell in row) for row in rows]
    console.print(table(headers, shown, gives=gives, width=console.width))


def table(headers: str, rows: Sequence[tuple[str, ...]], *, gives: str, width: int) -> Table:
    """A table `width` cells wide at most, at the cost of column `gives`; ">" aligns right.

    rich alone would cut every column a little, numbers too.
    """
    from rich.cells import cell_len
    from rich.table import Table

    from mic_supervisor.text import printable

    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = [tuple(map(printable, row)) for row in rows]
    names = [header.removeprefix(">") for header in headers.split()]
    widths = {
        name: max(map(cell_len, (name, *column)))
        for name, *column in zip(names, *cells, strict=True)
    }
    gap = 2
    room = width - sum(widths.values()) - gap * (len(names) - 1) + widths[gives]
    widths[gives] = max(len(gives), min(widths[gives], room))
    for name, header in zip(names, headers.split(), strict=True):
        table.add_column(
            name,
            no_wrap=True,
            overflow="ellipsis",
            justify="left" if name == header else "right",
            width=widths[name],
        )
    for row in cells:
        table.add_row(*row)
    return table


def write_file(path: Path, text: str, *, mode: int, replace: bool, hint: str) -> None:
    """All of it or nothing; without `replace` never over what came meanwhile. Raises MicError."""
    import tempfile

    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                os.fchmod(handle, mode)
                file.write(text)
            if replace:
                Path(scratch).replace(path)
            else:
                os.link(scratch, path)
        finally:
            Path(scratch).unlink(missing_ok=True)
    except FileExistsError as error:
        raise MicError(
            f"cannot write {path}: it is there already", hint="replace it with: --force"
        ) from error
    except OSError as error:
        hint = hint_to_replace(path, error) or hint
        raise MicError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
