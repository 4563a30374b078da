"""mic-supervisor plan"""

from __future__ import annotations

from pathlib import Path

import click

from mic_supervisor.cli.common import json_option, print_json, targets_option
from mic_supervisor.cli.session import Alone, daemon

EXIT_CHANGES = 2


@click.command(name="plan")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@json_option
@targets_option
@click.option(
    "--detailed-exitcode",
    is_flag=True,
    help="Exit with 0 when there is nothing to do, 2 when there is, 1 on an error.",
)
def command(
    file: Path | None, as_json: bool, targets: tuple[str, ...], detailed_exitcode: bool
) -> int:
    """Show what apply would do, and why.

    Where the daemon runs it is asked, so that backoff and work in flight count. FILE is compared
    instead of the configured file, and nothing else changes by that. --target as for apply.
    """
    params = {"path": str(file.absolute()) if file is not None else None, "targets": targets}
    client = daemon()
    # A file that the daemon does not follow as it is now is compared here: the errors, or the
    # changes, are what was asked for.
    answer = client.call("plan", params, timeout=10.0) if client is not None else None
    by_daemon = answer is not None
    answer = answer or Alone(file=file).call("plan", params)
    if as_json:
        print_json(answer["document"])
    else:
        click.echo(answer["text"], nl=False)
        if answer["busy"]:
            click.echo(f"In progress: {', '.join(answer['busy'])}.")
        if targets and by_daemon:
            click.echo("The daemon converges what is left out as well, but for removals.")
    return EXIT_CHANGES if detailed_exitcode and not answer["empty"] else 0
