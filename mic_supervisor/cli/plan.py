"""mic-supervisor plan"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import wiring
from mic_supervisor.cli.params import targets_option
from mic_supervisor.cli.session import Alone
from mic_supervisor.daemon.client import Client

if TYPE_CHECKING:
    from mic_supervisor.config.settings import Settings

EXIT_CHANGES = 2


@click.command(name="plan")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
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
    found = wiring.settings()
    answer = _ask_daemon(found, file, targets)
    by_daemon = answer is not None
    answer = answer or Alone(found, file=file).call("plan", {"targets": targets})
    if as_json:
        click.echo(json.dumps(answer["document"], indent=2, ensure_ascii=False))
    else:
        click.echo(answer["text"], nl=False)
        if answer["busy"]:
            click.echo(f"In progress: {', '.join(answer['busy'])}.")
        if targets and by_daemon:
            click.echo("The daemon converges what is left out as well, but for removals.")
    return EXIT_CHANGES if detailed_exitcode and not answer["empty"] else 0


def _ask_daemon(
    found: Settings, file: Path | None, targets: tuple[str, ...]
) -> dict[str, Any] | None:
    """The daemon's plan for its own file as it is now; None: look without it.

    A file that the daemon has rejected, or has not read yet, is compared here: the errors, or the
    changes, are what was asked for.
    """
    if file is not None and file.resolve() != found.config.resolve():
        return None
    client = Client.connect(found.socket)
    if client is None:
        return None
    config = wiring.load_config(found, file, Registry())
    answer: dict[str, Any] = client.call("plan", {"targets": targets}, timeout=10.0)
    return answer if answer["document"]["config_hash"] == config.hash else None
