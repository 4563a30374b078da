"""mic-supervisor plan"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mic_supervisor.cli.common import completes, json_option, print_json, targets_option
from mic_supervisor.cli.session import Alone, daemon

EXIT_CHANGES = 2
_PULL_TIMEOUT = 300.0  # seconds: an engine waits longer for a registry than a person for an answer


@click.command(name="plan")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@json_option
@targets_option
@click.option(
    "--profile",
    metavar="NAME",
    shell_complete=completes("profiles"),
    help="As if this profile of the file was on; `none` for no profile.",
)
@click.option(
    "--pull", is_flag=True, help="Ask the registries for newer images; nothing is downloaded."
)
@click.option(
    "--detailed-exitcode",
    is_flag=True,
    help="Exit with 0 when there is nothing to do, 2 when there is, 1 on an error.",
)
def command(
    file: Path | None,
    as_json: bool,
    targets: tuple[str, ...],
    profile: str | None,
    pull: bool,
    detailed_exitcode: bool,
) -> int:
    """Show what apply would do, and why.

    Where the daemon runs it is asked, so that backoff and work in flight count. FILE is compared
    instead of the configured file, and nothing else changes by that. --target as for apply.
    --profile shows what a switch to that profile would do.
    """
    params: dict[str, Any] = {
        "path": str(file.absolute()) if file is not None else None,
        "targets": targets,
        "pull": pull,
    }
    client, alone = daemon(), Alone(file=file)
    if profile is not None:
        from mic_supervisor.backends.registry import Registry
        from mic_supervisor.cli import wiring
        from mic_supervisor.config.names import composed

        config = wiring.load_config(wiring.settings(), file, Registry(), composed(profile))
        # It is asked about, so that nothing speaks against it.
        client, alone, params = None, Alone(config=config), params | {"hash": config.hash}
    # A file that the daemon does not follow as it is now is compared here: the errors, or the
    # changes, are what was asked for.
    timeout = _PULL_TIMEOUT if pull else 10.0
    answer = client.call("plan", params, timeout=timeout) if client is not None else None
    by_daemon = answer is not None
    answer = answer or alone.call("plan", params)
    if as_json:
        print_json(answer["document"])
    else:
        click.echo(answer["text"], nl=False)
        if answer["busy"]:
            click.echo(f"In progress: {', '.join(answer['busy'])}.")
        if targets and by_daemon:
            click.echo("The daemon converges what is left out as well, but for removals.")
    return EXIT_CHANGES if detailed_exitcode and not answer["empty"] else 0
