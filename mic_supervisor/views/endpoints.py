"""Where clients find each model: the addresses of the instances that serve it now.

It serves whose probes pass, be it paused, rolled back or waiting for its turn. An unprobed one is
never said to, nor is one that is about to be stopped. Of what was not asked yet nothing is known:
then it stays what it was last said to be, or every restart of the supervisor would empty the lists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field

from mic_supervisor.config.names import shown_id
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.status import InstanceStatus, by_model

Endpoints = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Model to instance to URLs by the port's name. A model that nobody serves has no instances."""


@dataclass(frozen=True, slots=True)
class Address:
    """One instance of a model, for whoever forwards requests."""

    instance: str
    host: str  # an IPv6 address without brackets
    port: int
    called: str = ""  # the id as people are shown it

    @property
    def comment(self) -> str:
        """Behind the instance, where people are shown another name."""
        return f"  # {self.called}" if self.called != self.instance else ""

    @property
    def text(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def serving(
    rows: Iterable[InstanceStatus], withdrawn: Collection[str], before: Endpoints
) -> Endpoints:
    """Who serves which model. `before` is what was said last, `withdrawn` are about to stop."""
    found: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in (one for whole in rows for one in by_model(whole)):
        if not row.backend:
            continue  # an unsatisfiable entry, or a GPU that is kept empty
        instances = found.setdefault(row.model, {})
        if row.id in withdrawn or not row.endpoints:  # none: it is not alive
            continue
        said = before.get(row.model, {}).get(row.id) == row.endpoints
        if _serves(row) or (row.serving is None and said and row.phase is not Phase.UNPROBED):
            instances[row.id] = dict(row.endpoints)
    return {model: dict(sorted(found[model].items())) for model in sorted(found)}


def addresses(model: str, endpoints: Mapping[str, Mapping[str, str]], port: str) -> list[Address]:
    """Of one model, by instance; those that have no port of this name are left out."""
    found = []
    for instance, urls in sorted(endpoints.items()):
        url = urlsplit(urls.get(port, ""))
        if url.hostname is not None and url.port is not None:
            called = shown_id(instance, model)
            found.append(Address(instance, url.hostname, url.port, called))
    return found


@dataclass(frozen=True, slots=True)
class ServingInstance:
    instance: str
    endpoints: dict[str, str]
    openai_model: Annotated[
        str | None, Field(description="its name in OpenAI's API; null: it has no such API")
    ] = None


@dataclass(frozen=True, slots=True)
class EndpointsDocument:
    """A model that nobody serves has an empty list."""

    version: Literal[1]
    host: str
    models: dict[str, list[ServingInstance]]


def document(
    endpoints: Endpoints, host: str, rows: Iterable[InstanceStatus] = ()
) -> dict[str, Any]:
    """What `/api/v1/endpoints` answers, and what the hook gets on its standard input.

    The rows have the names in OpenAI's API.
    """
    names = {row.id: row.openai_model for row in rows}
    models = {
        model: [
            ServingInstance(instance, dict(urls), names.get(instance))
            for instance, urls in sorted(instances.items())
        ]
        for model, instances in sorted(endpoints.items())
    }
    return asdict(EndpointsDocument(version=1, host=host, models=models))


def _serves(row: InstanceStatus) -> bool:
    """Of one model of a server that has several: it is loaded, too."""
    return row.serving is True and row.phase not in (Phase.LOADING, Phase.BACKOFF)


# --- for a proxy --------------------------------------------------------------------------------
#
# Checked with nginx 1.22 and HAProxy 2.6. The supervisor knows who serves: so a server that is
# listed is never taken out by the proxy over a single error, and a model that nobody serves is
# answered at once (502 by nginx, 503 by HAProxy) instead of being unknown to the configuration
# around it. Equal endpoints give equal texts.

_HEAD = (
    "# Written by mic-supervisor, scope {scope}: the instances of each model that serve on port\n"
    "# {port} now. What is changed here by hand is lost when they change.\n"
)


def nginx(endpoints: Endpoints, *, port: str, scope: str) -> str:
    """An `upstream` block for each model, for the `http` or `stream` context."""
    return _text(endpoints, port, scope, _nginx)


def haproxy(endpoints: Endpoints, *, port: str, scope: str) -> str:
    """A `backend` section for each model."""
    return _text(endpoints, port, scope, _haproxy)


FORMATS: Mapping[str, Callable[..., str]] = {"nginx": nginx, "haproxy": haproxy}


def litellm(
    endpoints: Endpoints, names: Mapping[str, str], *, port: str, scope: str, api_key: str
) -> str:
    """A `model_list` with an entry for each instance; LiteLLM spreads requests over equal names.

    `names` are those in OpenAI's API, by instance; who has none is left out, in a comment.
    """
    lines, entries = [_HEAD.format(scope=scope, port=port)], []
    for model, instances in sorted(endpoints.items()):
        found = addresses(model, instances, port)
        if not found:
            lines.append(f"# {model}: nobody serves it\n")
        elif not any(one.instance in names for one in found):
            lines.append(f"# {model}: left out, unless --openai says that it speaks OpenAI's API\n")
        for one in found:
            if one.instance in names:
                params = {
                    "model": f"openai/{names[one.instance]}",
                    "api_base": f"http://{one.text}/v1",
                    "api_key": api_key,
                }
                info = {"id": one.instance}
                entry = {"model_name": model, "litellm_params": params, "model_info": info}
                entries.append(entry)
    given = {"model_list": entries}
    return "".join(lines) + yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)


def name_of(model: str) -> str:
    """What a model's upstream is called: its name as far as every proxy takes it.

    Where that is not all of it, a digest keeps two models apart.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", model)
    if plain == model:
        return f"mic_{model}"
    return f"mic_{plain}_{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _text(
    endpoints: Endpoints,
    port: str,
    scope: str,
    section: Callable[[str, list[Address], str], list[str]],
) -> str:
    lines = [_HEAD.format(scope=scope, port=port)]
    for model, instances in sorted(endpoints.items()):
        found = addresses(model, instances, port)
        lines.append(f"# {model}\n")
        lines += [f"{line}\n" for line in section(name_of(model), found, port)]
        lines.append("\n")
    return "".join(lines).rstrip("\n") + "\n"


def _nginx(name: str, found: list[Address], _port: str) -> list[str]:
    servers = [f"    server {one.text} max_fails=0;  # {one.called}" for one in found]
    # A block without any server is an error of the configuration.
    return [f"upstream {name} {{", *(servers or ["    server 127.0.0.1:1 down;"]), "}"]


def _haproxy(name: str, found: list[Address], port: str) -> list[str]:
    over = " proto h2" if port == "grpc" else ""
    servers = [f"    server {one.instance} {one.text}{over}{one.comment}" for one in found]
    return [f"backend {name}", "    mode http", "    balance leastconn", *servers]
