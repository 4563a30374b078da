"""Keeps what is secret out of what is served.

The interface may be open to more people than the machine is. Values of environments and the
arguments of commands have no place in it, wherever a sentence picked them up: a log line that a
reason quotes, a line of the file that a configuration error shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mic_supervisor.model import ContainerSpec

if TYPE_CHECKING:
    from mic_supervisor.model import DesiredState, Workload

HIDDEN = "(hidden)"
SHORTEST = 6  # characters; what is shorter is "true" or "8192" far more often than a secret

_FREE_TEXT = frozenset(
    {"reason", "hint", "error", "cause", "waits", "warnings", "unreadable", "text", "detail"}
)
_PRIVATE = re.compile(r"(command|entrypoint|env|args|file_env|variables)(?=[.\[]|$)")
_PRIVATE_KEY = re.compile(r"\.(env|args|command|entrypoint|exec)(?=[.\[:])")
_HEADLINE = re.compile(r"(?P<place>.*?: error: )(?P<rest>.*)")


class Scrubber:
    """Replaces what the desired workloads hold in confidence by "(hidden)"."""

    def __init__(self, desired: DesiredState | None) -> None:
        found = {
            secret
            for instance in (desired.instances if desired is not None else ())
            for secret in _secrets(instance.workload)
            if len(secret) >= SHORTEST
        }
        # The longest first: a secret may begin with another one.
        ordered = sorted(found, key=lambda item: (-len(item), item))
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def text(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(HIDDEN, text)

    def document(self, value: Any, key: str = "") -> Any:
        """A JSON document with its sentences scrubbed; names, ids and addresses stay."""
        if isinstance(value, dict):
            return {name: self.document(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self.document(item, key) for item in value]
        if isinstance(value, str) and key in _FREE_TEXT:
            return self.text(value)
        return value


def _secrets(workload: Workload) -> Iterator[str]:
    for pairs in (workload.env, workload.file_env, workload.variables):
        yield from (value for _, value in pairs)
    command = workload.command
    # A container's whole command is arguments; a process's begins with its program.
    arguments = command if isinstance(workload, ContainerSpec) else command[1:]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        word = value if equals and name.startswith("-") else argument
        # Options and paths are what a reason has to name to be of use.
        if not word.startswith(("-", "/", "${")):
            yield word


def plan_document(document: dict[str, Any]) -> dict[str, Any]:
    """A plan without the commands and values that its diffs show."""
    actions = [{**action, "diff": [_diff(d) for d in action["diff"]]} for action in _all(document)]
    return {**document, "actions": actions}


def _all(document: dict[str, Any]) -> Iterable[dict[str, Any]]:
    actions: list[dict[str, Any]] = document["actions"]
    return actions


def _diff(diff: dict[str, Any]) -> dict[str, Any]:
    if not _PRIVATE.match(str(diff["path"])):
        return diff
    return {
        "path": diff["path"],
        "before": None if diff["before"] is None else HIDDEN,
        "after": None if diff["after"] is None else HIDDEN,
    }


def config_error(report: str | None) -> str | None:
    """The report on a broken file: places and sentences, without the lines of the file itself."""
    if report is None:
        return None
    return "\n".join(_headline(line) for line in report.splitlines() if line[:1] != " ")


def _headline(line: str) -> str:
    match = _HEADLINE.fullmatch(line)
    if match is None:
        return line
    private = _PRIVATE_KEY.search(match["rest"])
    if private is None:
        return line
    path, _, _ = match["rest"].partition(": ")
    return f"{match['place']}{path}: is not valid; `mic-supervisor check` says why"
