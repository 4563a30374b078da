"""`${…}` in commands and environments: known names only, and every variable set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mic_supervisor.config.diagnostics import At, Report, show
from mic_supervisor.config.yaml import Node

TEMPLATED = frozenset({"command", "entrypoint", "args", "env", "exec"})
"""Keys below which `${…}` is replaced, wherever they stand."""

NAMES = ("port", "gpu_uuids", "gpu_indices", "model", "instance")
PORTS = ("http", "grpc", "metrics")

_OPEN = re.compile(r"\$?\$\{(?P<body>[^{}$]*)(?P<close>\})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KNOWN = "known are ${port}, ${gpu_uuids}, ${gpu_indices}, ${model}, ${instance} and ${env:NAME}"
_NOT_HERE = (
    "${…} is not replaced here",
    "it is replaced in command, entrypoint, args, env and exec only",
)


def check_placeholders(
    node: Node, environ: Mapping[str, str], report: Report, variables: dict[str, str]
) -> None:
    """Report each `${…}` that is unknown, unset or misplaced; `variables` collects the set ones."""
    for text, templated in _texts(node, False):
        # Each match holds one "${", so that matches and places pair off.
        matches = _OPEN.finditer(str(text.value))
        for match, place in zip(matches, text.places_of("${"), strict=True):
            problem, hint = _problem(match, environ, variables) if templated else _NOT_HERE
            if problem:
                report.add(At(place, text.path), problem, hint=hint)
            if not templated:
                break


def _texts(node: Node, templated: bool) -> Iterator[tuple[Node, bool]]:
    """Every text with a placeholder, and whether placeholders are replaced in it."""
    if isinstance(node.value, str) and node.sound and "${" in node.value:
        yield node, templated
    elif isinstance(node.value, list):
        for item in node.value:
            yield from _texts(item, templated)
    for key, entry in node.entries.items():
        yield from _texts(entry.node, templated or key in TEMPLATED)


def _problem(
    match: re.Match[str], environ: Mapping[str, str], variables: dict[str, str]
) -> tuple[str, str | None]:
    """What is wrong, empty if nothing is, and a hint."""
    body = match["body"]
    kind, colon, name = body.partition(":")
    if match[0].startswith("$$"):
        return (
            "$${ is no escape: a text cannot hold a literal ${",
            "put the text into a script or into env_file, where nothing is replaced",
        )
    if match["close"] is None:
        return "the ${ that opens here is not closed", _KNOWN
    if body in NAMES or (kind == "port" and name in PORTS):
        return "", None
    if kind == "port" and colon:
        known = "named ports are ${port:http}, ${port:grpc} and ${port:metrics}"
        return f"${{{body}}} names no port", known
    if kind == "env" and colon:
        if not _VARIABLE.fullmatch(name):
            return f"{show(name)} is no name of a variable", None
        if name not in environ:
            where = "set it in the environment of mic-supervisor, or in /etc/mic/mic.env"
            return f"${{env:{name}}} is not set", where
        variables[name] = environ[name]
        return "", None
    if _VARIABLE.fullmatch(body) and body in environ:
        hint = f"write ${{env:{body}}} for the variable of the supervisor's own environment"
        return f"${{{body}}} is unknown", hint
    return f"${{{body}}} is unknown", _KNOWN
