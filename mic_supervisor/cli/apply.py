"""mic-supervisor apply"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import Duration, json_option, print_json, targets_option
from mic_supervisor.cli.progress import show, tell_left_out
from mic_supervisor.cli.session import order


@click.command(name="apply")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@json_option
@targets_option
@click.option("--rebind", is_flag=True, help="Bind the file's GPU numbers to today's GPUs anew.")
@click.option(
    "--lock-timeout",
    type=Duration(),
    default=30.0,
    metavar="DURATION",
    help="How long to wait for another writer; 30s.",
)
def command(
    file: Path | None, as_json: bool, targets: tuple[str, ...], rebind: bool, lock_timeout: float
) -> int:
    """Converge once, with progress, and wait until everything is ready.

    Where the daemon runs it does the work, and this command follows; FILE must then be the
    daemon's own. Exits with 0 when all is ready, 3 when some instance failed and others did not,
    1 when all failed or nothing could be done.

    With --target only the instances of that model, or on that GPU, are changed, and whatever has
    to leave their GPUs; the rest is told as left out, and counts for nothing. A daemon converges
    the rest all the same: then --target says what is waited for, and confirms no removal.
    """
    found = wiring.settings()
    # First of all: a file with errors should be told at once, whoever converges.
    config = wiring.load_config(found, file, Registry())
    params = {"path": str(config.path), "targets": targets, "rebind": rebind}
    document = order(
        "apply", params, command="apply", config=config, patience=lock_timeout, quiet=as_json
    )
    if as_json:
        print_json(document)
    else:
        _report(document, limited=bool(targets))
    return int(document["exit_code"])


def _report(document: dict[str, Any], *, limited: bool) -> None:
    rows = document["instances"]
    show(rows, document)
    tell_left_out(document)
    if limited and document["through_daemon"]:
        click.echo("The daemon converges everything else as well; --target chose what to wait for.")
    for text in document["remaining"]["warnings"]:
        click.echo(f"warning: {text}")
    bad = sum(not row["as_desired"] for row in rows)
    good = len(rows) - bad
    if limited and not rows:
        click.echo("Apply: the file asks for no instance there.")
        return
    click.echo(f"Apply: {good} as desired, {bad} not." if bad else f"Apply: {good} as desired.")
