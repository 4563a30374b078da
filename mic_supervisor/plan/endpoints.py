"""Where clients find each model: the addresses of the instances that serve it now.

It serves whose probes pass, be it paused, rolled back or waiting for its turn. An unprobed one is
never said to, nor is one that is about to be stopped. Of what was not asked yet nothing is known:
then it stays what it was last said to be, or every restart of the supervisor would empty the lists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

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
            continue  # an entry in trouble, or a GPU that is kept empty
        instances = found.setdefault(row.model, {})
        if row.id in withdrawn or not row.endpoints:  # none: it is not alive
            continue
        said = before.get(row.model, {}).get(row.id) == row.endpoints
        if _serves(row) or (row.serving is None and said and row.phase is not Phase.UNPROBED):
            instances[row.id] = dict(row.endpoints)
    return {model: dict(sorted(found[model].items())) for model in sorted(found)}


def addresses(endpoints: Mapping[str, Mapping[str, str]], port: str) -> list[Address]:
    """Of one model, by instance; those that have no port of this name are left out."""
    found = []
    for instance, urls in sorted(endpoints.items()):
        url = urlsplit(urls.get(port, ""))
        if url.hostname is not None and url.port is not None:
            found.append(Address(instance, url.hostname, url.port))
    return found


@dataclass(frozen=True, slots=True)
class ServingInstance:
    instance: str
    endpoints: dict[str, str]


@dataclass(frozen=True, slots=True)
class EndpointsDocument:
    """A model that nobody serves has an empty list."""

    version: Literal[1]
    host: str
    models: dict[str, list[ServingInstance]]


def document(endpoints: Endpoints, host: str) -> dict[str, Any]:
    """What `/api/v1/endpoints` answers, and what the hook gets on its standard input."""
    models = {
        model: [
            ServingInstance(instance, dict(urls)) for instance, urls in sorted(instances.items())
        ]
        for model, instances in sorted(endpoints.items())
    }
    return asdict(EndpointsDocument(version=1, host=host, models=models))


def _serves(row: InstanceStatus) -> bool:
    """Of one model of a server that has several: it is loaded, too."""
    return row.serving is True and row.phase not in (Phase.LOADING, Phase.BACKOFF)
