"""`${…}` in commands and environments: known names only, and every variable set."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mic_supervisor.config.diagnostics import Report, dotted, show
from mic_supervisor.config.document import Place
from mic_supervisor.config.yaml import Node

TEMPLATED = frozenset({"command", "entrypoint", "args", "env", "exec"})
"""Keys below which `${…}` is replaced, wherever they stand."""

NAMES = ("port", "gpu_uuids", "gpu_indices", "model", "instance")
PORTS = ("http", "grpc", "metrics")

_OPEN = re.compile(r"\$?\$\{(?P<body>[^{}$]*)(?P<close>\})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KNOWN = "known are ${port}, ${gpu_uuids}, ${gpu_indices}, ${model}, ${instance} and ${env:NAME}"


def check_placeholders(
    node: Node, path: str, environ: Mapping[str, str], report: Report, variables: dict[str, str]
) -> None:
    """Report each `${…}` that is unknown, unset or misplaced; `variables` collects the set ones."""
    _walk(node, path, False, environ, report, variables)


def _walk(
    node: Node,
    path: str,
    templated: bool,
    environ: Mapping[str, str],
    report: Report,
    variables: dict[str, str],
) -> None:
    if isinstance(node.value, dict):
        for key, entry in node.value.items():
            inside = templated or key in TEMPLATED
            _walk(entry.node, dotted(path, str(key)), inside, environ, report, variables)
    elif isinstance(node.value, list):
        for number, item in enumerate(node.value):
            _walk(item, dotted(path, number), templated, environ, report, variables)
    elif isinstance(node.value, str) and node.sound and "${" in node.value:
        # Each match holds one "${", so that matches and places pair off.
        for match, place in zip(_OPEN.finditer(node.value), node.places_of("${"), strict=True):
            if not templated:
                report.add(
                    place,
                    path,
                    "${…} is not replaced here",
                    hint="it is replaced in command, entrypoint, args, env and exec only",
                )
                break
            _check(match, place, path, environ, report, variables)


def _check(
    match: re.Match[str],
    place: Place,
    path: str,
    environ: Mapping[str, str],
    report: Report,
    variables: dict[str, str],
) -> None:
    body = match["body"]
    if match[0].startswith("$$"):
        report.add(
            place,
            path,
            "$${ is no escape: a text cannot hold a literal ${",
            hint="put the text into a script or into env_file, where nothing is replaced",
        )
    elif match["close"] is None:
        report.add(place, path, "the ${ that opens here is not closed", hint=_KNOWN)
    elif body.startswith("env:"):
        _check_variable(body.removeprefix("env:"), place, path, environ, report, variables)
    elif body.startswith("port:"):
        if body.removeprefix("port:") not in PORTS:
            report.add(
                place,
                path,
                f"${{{body}}} names no port",
                hint="named ports are ${port:http}, ${port:grpc} and ${port:metrics}",
            )
    elif body not in NAMES:
        hint = _KNOWN
        if _VARIABLE.fullmatch(body) and body in environ:
            hint = f"write ${{env:{body}}} for the variable of the supervisor's own environment"
        report.add(place, path, f"${{{body}}} is unknown", hint=hint)


def _check_variable(
    name: str,
    place: Place,
    path: str,
    environ: Mapping[str, str],
    report: Report,
    variables: dict[str, str],
) -> None:
    if not _VARIABLE.fullmatch(name):
        report.add(place, path, f"{show(name)} is no name of a variable")
    elif name not in environ:
        report.add(
            place,
            path,
            f"${{env:{name}}} is not set",
            hint="set it in the environment of mic-supervisor, or in /etc/mic/mic.env",
        )
    else:
        variables[name] = environ[name]
