"""Upstreams for a proxy, from what serves now. Equal endpoints give equal texts.

Checked with nginx 1.22 and HAProxy 2.6. The supervisor knows who serves: so a server that is listed
is never taken out by the proxy over a single error, and a model that nobody serves is answered at
once (502 by nginx, 503 by HAProxy) instead of being unknown to the configuration around it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping

from mic_supervisor.plan.endpoints import Address, Endpoints, addresses

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
        lines.append(f"# {model}\n")
        lines += [f"{line}\n" for line in section(name_of(model), addresses(instances, port), port)]
        lines.append("\n")
    return "".join(lines).rstrip("\n") + "\n"


def _nginx(name: str, found: list[Address], _port: str) -> list[str]:
    servers = [f"    server {one.text} max_fails=0;  # {one.instance}" for one in found]
    # A block without any server is an error of the configuration.
    return [f"upstream {name} {{", *(servers or ["    server 127.0.0.1:1 down;"]), "}"]


def _haproxy(name: str, found: list[Address], port: str) -> list[str]:
    over = " proto h2" if port == "grpc" else ""
    servers = [f"    server {one.instance} {one.text}{over}" for one in found]
    return [f"backend {name}", "    mode http", "    balance leastconn", *servers]
