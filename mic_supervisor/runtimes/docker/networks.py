"""The networks that a container joins by name, besides the engine's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from docker import APIClient

from mic_supervisor.errors import PreflightFailed, RuntimeRefused
from mic_supervisor.runtimes.docker.engine import Engine

# Drivers whose networks publish no port, and on whose addresses the host itself does not answer.
_UNPUBLISHED = ("macvlan", "ipvlan", "null")
_NONE = "there is no network {}"
_CREATE = "create it: docker network create {}; or see what there is: docker network ls"


def check(engine: Engine, what: str, names: Sequence[str]) -> None:
    """PreflightFailed unless each network is there, and one of them can publish a port: the start
    would be refused, or nobody could reach what was started.
    """
    closed = []
    for name in names:
        found = engine.network(what, name)
        if found is None:
            raise PreflightFailed(f"{what}: {_NONE.format(name)}", hint=_CREATE.format(name))
        if found.get("Scope") == "swarm" and not found.get("Attachable"):
            raise PreflightFailed(
                f"{what}: the network {name} is of a swarm, for services alone",
                hint="make one that containers may join: docker network create --driver overlay "
                "--attachable NAME",
            )
        if found.get("Internal") or found.get("Driver") in _UNPUBLISHED:
            closed.append(name)
    if names and len(closed) == len(names):
        raise PreflightFailed(
            f"{what}: its port cannot be published: {', '.join(closed)} "
            f"{'is' if len(closed) == 1 else 'are'} internal, or without the host",
            hint="add a network that is not, as `docker network create NAME` makes it",
        )


def endpoints(names: Sequence[str], aliases: Sequence[str]) -> dict[str, Any]:
    """For the creation of a container: the first one. Before API 1.44 an engine takes no more."""
    return {"EndpointsConfig": {name: {"Aliases": [*aliases]} for name in names[:1]}}


def join(engine: Engine, what: str, ref: str, names: Sequence[str], aliases: Sequence[str]) -> None:
    """Have a container that does not run in each of these networks. RuntimeRefused.

    It knows a network by the id that this had, and cannot be started once somebody made the network
    anew: then it leaves the one that is gone.
    """
    container = engine.container(what, ref) or {} if names else {}
    there = (container.get("NetworkSettings") or {}).get("Networks") or {}
    for name in names:
        network = engine.network(what, name)
        if network is None:
            raise RuntimeRefused(f"{what}: {_NONE.format(name)}", hint=_CREATE.format(name))
        known = there.get(name)
        if known is not None and known.get("NetworkID") in (None, "", network.get("Id")):
            continue

        def connect(api: APIClient, name: str = name, again: bool = known is not None) -> None:
            if again:
                api.disconnect_container_from_network(ref, name, force=True)
            api.connect_container_to_network(ref, name, aliases=[*aliases])

        engine.call(what, connect, patient=True)
