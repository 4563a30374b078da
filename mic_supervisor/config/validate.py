"""From a tree to a pydantic model: its errors, in words for people, at the locations in the file.

And `${…}` in commands and environments: known names only, and every variable set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from mic_supervisor.config import hints
from mic_supervisor.config.diagnostics import At, Located, Report, dotted, show
from mic_supervisor.config.env_file import SYSTEMD_NAME
from mic_supervisor.config.yaml import Entry, Node

M = TypeVar("M", bound=BaseModel)

_BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
_ABOUT_KEY = re.compile(r"(?P<key>\w+): (?P<message>.+)", re.DOTALL)


def validate(model: type[M], entry: Entry, report: Report) -> M | None:
    """`entry`'s map as an instance of `model`, or None after reporting why not.

    A missing key is reported where the map's own key stands. A validator that raises
    ValueError("KEY: …") is reported at KEY, where the map has it.
    """
    before = len(report)
    _check_shape(entry, report)
    try:
        result = model.model_validate(entry.node.plain())
    except ValidationError as error:
        errors = error.errors(include_url=False)
        faults = [_locate(entry, one) for one in errors]
        for fault in _best_branches([fault for fault in faults if fault.valid]):
            _report(fault, model, report)
        if len(report) == before and not _has_invalid(entry.node):
            # Every fault was a consequence of another, and yet none was reported: never go silent.
            report.add(entry, f"is not valid: {errors[0]['msg']}")
        return None
    return result if len(report) == before else None


def _has_invalid(node: Node) -> bool:
    return not (node.valid and node.whole) or any(map(_has_invalid, node.below()))


def _check_shape(at: Entry, report: Report) -> None:
    """Keys without a value, and whole numbers as keys, which no pydantic model sees as such."""
    node = at.node
    if node.value is None and node.valid:
        report.add(at, "has no value", hint="give it one, or leave the key out")
        node.valid = False
    for key, entry in node.entries.items():
        if isinstance(key, int):
            report.add(entry, "a key must be a text here", hint=f'quote it: "{key}"')
            entry.node.valid = False
        _check_shape(entry, report)
    for item in node.value if isinstance(node.value, list) else ():
        _check_shape(Entry(item.location, item), report)


@dataclass(frozen=True, slots=True)
class _Fault:
    """One pydantic error and what it concerns. `branch` is the member of a union it belongs to, and
    `fork` the path at which that union stands; `about_key`: the key itself is at fault, not its
    value."""

    error: Any
    entry: Entry
    valid: bool
    about_key: bool
    key: str
    fork: str | None = None
    branch: str | None = None

    @property
    def kind(self) -> str:
        return str(self.error["type"])

    @property
    def loc(self) -> tuple[str | int, ...]:
        loc: tuple[str | int, ...] = self.error["loc"]
        return loc

    @property
    def node(self) -> Node:
        return self.entry.node


def _locate(root: Entry, error: Any) -> _Fault:
    entry, valid, about_key = root, root.node.valid, error["type"] == "extra_forbidden"
    fork = branch = None
    key = ""
    missing = error["type"] == "missing"
    for element in error["loc"][:-1] if missing else error["loc"]:
        node, below = entry.node, entry.node.entries.get(element)
        if below is None and str(element).isdecimal():
            below = node.entries.get(int(element))
        if isinstance(node.value, list) and isinstance(element, int) and element < len(node.value):
            below = Entry(node.value[element].location, node.value[element])
        if below is not None:
            key = element if isinstance(element, str) else key
            # An unknown key is unknown whatever its value.
            entry, valid = below, valid and node.valid
        elif element == "[key]":
            about_key = True
        elif fork is None:
            fork, branch = entry.path, str(element)
    node = entry.node
    valid = valid and (node.valid or error["type"] == "extra_forbidden")
    return _Fault(error, entry, valid and (node.whole or not missing), about_key, key, fork, branch)


def _best_branches(faults: Sequence[_Fault]) -> list[_Fault]:
    """Of each union, only the member that the value was probably meant to be.

    That is the one that knows the most of its keys, then the one with the fewest errors, then the
    first. Where the value itself has the wrong type for all members, the first speaks for them.
    """
    forks: dict[str, dict[str, list[_Fault]]] = {}
    for fault in faults:
        if fault.fork is not None and fault.branch is not None:
            forks.setdefault(fault.fork, {}).setdefault(fault.branch, []).append(fault)

    def unlikely(branch: list[_Fault]) -> tuple[int, int]:
        return sum(map(_concerns_keys_of_fork, branch)), len(branch)

    chosen = {
        fork: min(branches, key=lambda name: unlikely(branches[name]))
        for fork, branches in forks.items()
    }
    return [fault for fault in faults if fault.fork is None or chosen[fault.fork] == fault.branch]


def _concerns_keys_of_fork(fault: _Fault) -> bool:
    if fault.kind == "extra_forbidden":
        return fault.entry.path == dotted(fault.fork or "", str(fault.loc[-1]))
    wrong = fault.kind == "missing" or fault.kind.endswith("_type")
    return fault.entry.path == fault.fork and wrong


def _report(fault: _Fault, model: type[BaseModel], report: Report) -> None:
    kind, entry, node = fault.kind, fault.entry, fault.entry.node
    unavailable: Mapping[str, str] = getattr(model, "unavailable", {})
    if kind == "extra_forbidden":
        known = _fields(model, fault.loc[:-1])
        hint = hints.for_key(fault.key, node.plain(), known, unavailable)
        like = None if hint is not None else (fault.key, known)
        if hint is None and 0 < len(known) <= 8:
            hint = f"known are {', '.join(known)}"
        report.add(entry, "unknown key", like=like, hint=hint)
    elif kind == "missing":
        report.add(entry, f"the key {fault.loc[-1]} is missing")
    elif kind in ("value_error", "assertion_error"):
        at, message = _own_words(fault)
        report.add(at, message)
    elif kind == "literal_error":
        words = re.split(r",| or ", str(fault.error["ctx"]["expected"]))
        words = [word.strip("' ") for word in words]
        words = [{"True": "true", "False": "false"}.get(word, word) for word in words]
        given = "" if node.branching else f"; here: {node.shown}"
        like = (str(node.value), words) if isinstance(node.value, str) else None
        report.add(node, f"must be {_listed(words)}{given}", like=like)
    else:
        message, hint, whole = _words(fault, unavailable)
        report.add(entry if fault.about_key or whole else node, message, hint=hint)


def _own_words(fault: _Fault) -> tuple[Located, str]:
    """What a validator of ours said, at the key it named."""
    message = str(fault.error.get("ctx", {}).get("error", fault.error["msg"]))
    about = _ABOUT_KEY.fullmatch(message)
    key = about["key"] if about is not None else ""
    if about is not None and key in fault.node.entries:
        return At(fault.node.entries[key].location, dotted(fault.entry.path, key)), about["message"]
    whole = isinstance(fault.node.value, dict) or fault.about_key
    return (fault.entry if whole else fault.node), message


def _words(fault: _Fault, unavailable: Mapping[str, str]) -> tuple[str, str | None, bool]:
    """A message and a hint for an error of pydantic's own, and whether they are about the entry."""
    kind, node = fault.kind, fault.node
    number = isinstance(node.value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", node.value)
    unquote = "remove the quotes" if number else None
    wanted = {
        "string_type": ("a text", _quoted(node)),
        "bool_type": ("true or false", None),
        "bool_parsing": ("true or false", None),
        **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), ("a whole number", unquote)),
        **dict.fromkeys(("float_type", "float_parsing"), ("a number", unquote)),
        **dict.fromkeys(("list_type", "tuple_type", "set_type"), ("a list", None)),
        **dict.fromkeys(
            ("dict_type", "model_type", "mapping_type", "model_attributes_type"), ("a map", None)
        ),
    }
    if kind in wanted:
        what, hint = wanted[kind]
        whole = False
        if hint is None:
            hint, whole = hints.for_value(fault.key, node.plain(), what, unavailable)
        return f"must be {what}, not {node.shown}", hint, whole
    return _bounds(fault), None, False


def _quoted(node: Node) -> str | None:
    if node.branching:
        return None
    start, end = node.span
    return f'quote it: "{node.text[start:end].strip()[:64]}"'  # as it is spelt: 1.10 stays 1.10


def _bounds(fault: _Fault) -> str:
    kind, context, node = fault.kind, fault.error.get("ctx", {}), fault.node
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"must be {words} {context[bound]:g}; here: {node.shown}"
    if kind in ("string_too_short", "too_short") and context.get("min_length") == 1:
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        if context.get("pattern") == "^/":
            return f"must begin with /; here: {node.shown}"
        return f"{node.shown} does not have the form {context.get('pattern')}"
    message = re.sub(r"^(Input|String|List|Value|Dictionary) should ", "must ", fault.error["msg"])
    return message[:1].lower() + message[1:]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _fields(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """The keys known at `loc`, for "did you mean"; empty where any key goes."""
    models: list[type[BaseModel]] = [model]
    for element in loc:
        below: list[type[BaseModel]] = []
        for one in models:
            if element in one.model_fields:
                below += _models_in(one.model_fields[str(element)].annotation)
            elif one.__name__ in str(element):
                below = [one]
                break
            else:
                below.append(one)  # a list's index, a map's key
        models = below
    return list(dict.fromkeys(name for one in models for name in one.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


# --- ${…} in texts --------------------------------------------------------------------------------

TEMPLATED = frozenset({"command", "entrypoint", "args", "env", "exec", "prepare"})
"""Keys below which `${…}` is replaced, wherever they stand."""

NAMES = ("port", "gpu_uuids", "gpu_indices", "model", "instance")
PORTS = ("http", "grpc", "metrics")

_OPEN = re.compile(r"\$?\$\{(?P<body>[^{}$]*)(?P<close>\})?")
_KNOWN = "known are ${port}, ${gpu_uuids}, ${gpu_indices}, ${model}, ${instance} and ${env:NAME}"
_NOT_HERE = (
    "${…} is not replaced here",
    "it is replaced in command, entrypoint, args, env, exec and prepare only",
)


def check_placeholders(
    node: Node, environ: Mapping[str, str], report: Report, variables: dict[str, str]
) -> None:
    """Report each `${…}` that is unknown, unset or misplaced; `variables` collects the set ones."""
    for text, templated in _texts(node, False):
        # Each match holds one "${", so that matches and locations pair off.
        matches = _OPEN.finditer(str(text.value))
        for match, location in zip(matches, text.locations_of("${"), strict=True):
            problem, hint = _problem(match, environ, variables) if templated else _NOT_HERE
            if problem:
                report.add(At(location, text.path), problem, hint=hint)
            if not templated:
                break


def _texts(node: Node, templated: bool) -> Iterator[tuple[Node, bool]]:
    """Every text with a placeholder, and whether placeholders are replaced in it."""
    if isinstance(node.value, str) and node.valid and "${" in node.value:
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
        if not SYSTEMD_NAME.fullmatch(name):
            return f"{show(name)} is no name of a variable", None
        if name not in environ:
            where = "set it in the environment of mic-supervisor, or in /etc/mic/mic.env"
            return f"${{env:{name}}} is not set", where
        variables[name] = environ[name]
        return "", None
    if SYSTEMD_NAME.fullmatch(body) and body in environ:
        hint = f"write ${{env:{body}}} for the variable of the supervisor's own environment"
        return f"${{{body}}} is unknown", hint
    return f"${{{body}}} is unknown", _KNOWN
