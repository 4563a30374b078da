"""mic-supervisor export"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from mic_supervisor import codec
from mic_supervisor.cli import wiring
from mic_supervisor.cli.common import write_file
from mic_supervisor.cli.session import ask
from mic_supervisor.errors import MicError
from mic_supervisor.host.files import read_text

if TYPE_CHECKING:
    from mic_supervisor.views.endpoints import Endpoints

_NOT_IN_HOSTS = re.compile(r"[^\w.:%-]")  # what else may end a word, or a line, of a proxy
_FORMATS = ("nginx", "haproxy")


@click.command(name="export")
@click.argument("form", type=click.Choice(_FORMATS))
@click.option(
    "--port",
    type=click.Choice(("http", "grpc", "metrics")),
    default="http",
    show_default=True,
    help="Which port of each instance.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write it there, at once or not at all; an equal file is left alone.",
)
@click.option(
    "--from",
    "source",
    type=click.File("r"),
    help="A document as the hook on_endpoints_change gets it; - is standard input.",
)
def command(form: str, port: str, output: Path | None, source: Any) -> None:
    """Print an upstream for each model with the instances that serve it now, for nginx or haproxy.

    A model that nobody serves has an upstream, too, which answers at once that it has none.
    """
    from mic_supervisor.views.endpoints import FORMATS

    found = wiring.settings()
    endpoints = _given(source) if source is not None else _parsed(ask("endpoints"))
    text = FORMATS[form](endpoints, port=port, scope=found.scope)
    if output is None:
        click.echo(text, nl=False)
        return
    changed = _write(output, text)
    click.echo(f"{output}: {'written' if changed else 'as it was'}", err=True)


def _given(source: Any) -> Endpoints:
    name = getattr(source, "name", "-")
    try:
        return _checked(_parsed(codec.parse(source.read())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MicError(
            f"cannot read the endpoints in {name}: it is not what on_endpoints_change is given",
            hint="give its standard input on, or a copy of /api/v1/endpoints",
        ) from error


def _parsed(document: Any) -> Endpoints:
    return {
        str(model): {
            str(one["instance"]): {str(k): str(v) for k, v in one["endpoints"].items()}
            for one in instances
        }
        for model, instances in document["models"].items()
    }


def _checked(endpoints: Endpoints) -> Endpoints:
    """Raises ValueError where a text is none that a daemon gives, and could end a line of ours."""
    for model, instances in endpoints.items():
        for instance, urls in instances.items():
            for text in (model, instance, *urls.values()):
                if not text.isprintable():
                    raise ValueError("it cannot be shown")
            for url in map(urlsplit, urls.values()):
                if url.port is None or _NOT_IN_HOSTS.search(url.hostname or " "):
                    raise ValueError("it has no address")
    return endpoints


def _write(path: Path, text: str) -> bool:
    """Whether the file had to be written. Who reads it sees the old one or the new one."""
    try:
        if read_text(path) == text:
            return False
    except (OSError, UnicodeDecodeError):
        pass  # it is written then, and that says what is wrong
    hint = "below mic.service a directory is writable where ReadWritePaths= names it"
    write_file(path, text, mode=0o644, replace=True, hint=hint)
    return True
