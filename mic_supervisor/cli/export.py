"""mic-supervisor export"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

_NOT_YET = ("loading", "backoff")  # phases in which a model of a server is not served
_NOT_IN_WORDS = re.compile(r"[^\w.:%-]")  # what else may end a word, or a line, of a proxy
_FORMATS = ("nginx", "haproxy", "litellm")


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
    "sources",
    type=click.File("r"),
    multiple=True,
    help="What `status --json` printed, or a document as the hook on_endpoints_change gets it; "
    "- is standard input. Several times for several hosts.",
)
@click.option(
    "--openai",
    "spoken",
    multiple=True,
    metavar="MODEL[=NAME]",
    help="For litellm: this model speaks OpenAI's API, too, and is called NAME there.",
)
@click.option(
    "--api-key",
    default="none",
    show_default=True,
    help="For litellm: what it gives the servers; os.environ/NAME is a variable of LiteLLM's.",
)
def command(
    form: str,
    port: str,
    output: Path | None,
    sources: Sequence[Any],
    spoken: Sequence[str],
    api_key: str,
) -> None:
    """Print who serves each model now: an upstream for nginx or haproxy, a model list for litellm.

    A model that nobody serves has an upstream, too, which answers at once that it has none. In
    LiteLLM's list stand the instances with an API like OpenAI's, as far as that is known.
    """
    from mic_supervisor.views.endpoints import FORMATS, litellm

    found = wiring.settings()
    served = _together([_given(one) for one in sources] or [_parsed(ask("endpoints"))])
    if form == "litellm":
        names = served.names | _spoken(spoken, served.endpoints)
        text = litellm(served.endpoints, names, port=port, scope=found.scope, api_key=api_key)
    else:
        text = FORMATS[form](served.endpoints, port=port, scope=found.scope)
    if output is None:
        click.echo(text, nl=False)
        return
    changed = _write(output, text)
    click.echo(f"{output}: {'written' if changed else 'as it was'}", err=True)


@dataclass(frozen=True, slots=True)
class Served:
    """Who serves what on a host. `names` are those in OpenAI's API, by instance."""

    host: str
    endpoints: Endpoints
    names: dict[str, str]


def _spoken(given: Sequence[str], endpoints: Endpoints) -> dict[str, str]:
    """The names in OpenAI's API of the models that a person says speak it."""
    names: dict[str, str] = {}
    for model, _, name in (text.partition("=") for text in given):
        if model not in endpoints:
            known = ", ".join(sorted(endpoints)) or "no model"
            raise MicError(
                f"cannot export {model}: there is no such model", hint=f"there is {known}"
            )
        names |= dict.fromkeys(endpoints[model], name or model)
    return names


def _given(source: Any) -> Served:
    name = getattr(source, "name", "-")
    try:
        return _checked(_parsed(codec.parse(source.read())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MicError(
            f"cannot read the endpoints in {name}: it is neither a status nor what "
            "on_endpoints_change is given",
            hint="give it what `mic-supervisor status --json` prints, or the hook's standard input",
        ) from error


def _parsed(document: Any) -> Served:
    if "instances" in document:
        document = _of_status(document)
    endpoints = {
        str(model): {
            str(one["instance"]): {str(k): str(v) for k, v in one["endpoints"].items()}
            for one in instances
        }
        for model, instances in document["models"].items()
    }
    names = {
        str(one["instance"]): str(one["openai_model"])
        for instances in document["models"].values()
        for one in instances
        if one.get("openai_model")  # an earlier version does not say
    }
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", str(document.get("host", "")))
    return Served(host or "unknown", endpoints, names)


def _of_status(document: dict[str, Any]) -> dict[str, Any]:
    """The same of a status: who serves is who is said to, and is not about to be loaded."""
    models: dict[str, list[dict[str, Any]]] = {}
    for row in document["instances"]:
        for one in ({**row, **inside} for inside in row.get("models") or [{}]):
            if one["backend"]:
                instances = models.setdefault(one["model"], [])
                if one["serving"] and one["endpoints"] and one["phase"] not in _NOT_YET:
                    instances.append({**one, "instance": one["id"]})
    return {"host": document["host"], "models": models}


def _together(hosts: Sequence[Served]) -> Served:
    """All in one. Of several hosts an instance has its host's name before its own. Raises MicError
    where the addresses of two are each only its own.
    """
    if len(hosts) == 1:
        return hosts[0]
    if twice := [name for name, count in Counter(one.host for one in hosts).items() if count > 1]:
        raise MicError(
            f"cannot put them together: several are of host {twice[0]}",
            hint="give one document of each host; hosts need different names",
        )
    own = [one.host for one in hosts if any(map(_is_loopback, _urls(one.endpoints)))]
    if len(own) > 1:
        raise MicError(
            f"cannot put {' and '.join(own)} together: models of each listen on 127.0.0.1, where "
            "no other host reaches them",
            hint="set `listen` of these models, or below `defaults`, to an address of their host",
        )
    endpoints: dict[str, dict[str, Mapping[str, str]]] = {}
    names: dict[str, str] = {}
    for one in hosts:
        for model, instances in one.endpoints.items():
            at = endpoints.setdefault(model, {})
            at |= {f"{one.host}-{instance}": urls for instance, urls in instances.items()}
        names |= {f"{one.host}-{instance}": name for instance, name in one.names.items()}
    return Served("", endpoints, names)


def _urls(endpoints: Endpoints) -> Iterator[str]:
    for instances in endpoints.values():
        for urls in instances.values():
            yield from urls.values()


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _checked(served: Served) -> Served:
    """Raises ValueError where a text is none that a daemon gives, and could end a line of ours."""
    for model, instances in served.endpoints.items():
        if not all(map(str.isprintable, (model, *served.names.values()))):
            raise ValueError("it cannot be shown")
        if any(map(_NOT_IN_WORDS.search, instances)):
            raise ValueError("it is no instance")
    for url in _urls(served.endpoints):
        address = urlsplit(url)
        if not url.isprintable() or address.port is None:
            raise ValueError("it has no address")
        if _NOT_IN_WORDS.search(address.hostname or " "):
            raise ValueError("it has no address")
    return served


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
