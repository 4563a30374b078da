"""From a tree to a pydantic model: its errors, in words for people, at the places in the file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from mic_supervisor.config.diagnostics import Report, dotted, show
from mic_supervisor.config.document import Place
from mic_supervisor.config.yaml import Node

if TYPE_CHECKING:
    from pydantic import BaseModel

M = TypeVar("M", bound="BaseModel")

_ABOUT_KEY = re.compile(r"(?P<key>\w+): (?P<message>.+)", re.DOTALL)


def validate(model: type[M], node: Node, place: Place, path: str, report: Report) -> M | None:
    """`node` as an instance of `model`, or None after reporting why not.

    `place` is where the map's own key stands: that is where a missing key is reported. A validator
    that raises ValueError("KEY: …") is reported at KEY, where the map has it.
    """
    from pydantic import ValidationError

    before = len(report)
    _check_shape(node, place, path, report)
    try:
        result = model.model_validate(node.plain())
    except ValidationError as error:
        faults = [_locate(node, place, path, one) for one in error.errors(include_url=False)]
        for fault in _best_branches([fault for fault in faults if fault.sound]):
            _report(fault, model, report)
        if len(report) == before and not _has_unsound(node):
            # Every fault was a consequence of another, and yet none was reported: never go silent.
            report.add(place, path, f"is not valid: {error.errors(include_url=False)[0]['msg']}")
        return None
    return result if len(report) == before else None


def _has_unsound(node: Node) -> bool:
    return not (node.sound and node.whole) or any(_has_unsound(child) for child in _children(node))


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node.value, list):
        yield from node.value
    for entry in node.entries.values():
        yield entry.node


def _check_shape(node: Node, place: Place, path: str, report: Report) -> None:
    """Keys without a value, and whole numbers as keys, which no pydantic model sees as such."""
    if node.value is None and node.sound:
        report.add(place, path, "has no value", hint="give it one, or leave the key out")
        node.sound = False
    for key, entry in node.entries.items():
        below = dotted(path, str(key))
        if isinstance(key, int):
            report.add(entry.place, below, "a key must be a text here", hint=f'quote it: "{key}"')
            entry.node.sound = False
        _check_shape(entry.node, entry.place, below, report)
    if isinstance(node.value, list):
        for number, item in enumerate(node.value):
            _check_shape(item, item.place, dotted(path, number), report)


@dataclass(frozen=True, slots=True)
class _Fault:
    """One pydantic error, placed. `branch` is the member of a union it belongs to, and `fork` the
    path at which that union stands; `about_key`: the key itself is at fault, not its value."""

    kind: str
    context: dict[str, Any]
    message: str
    loc: tuple[str | int, ...]
    node: Node
    key_place: Place
    path: str
    sound: bool
    about_key: bool
    fork: str | None = None
    branch: str | None = None


def _locate(root: Node, place: Place, path: str, error: Any) -> _Fault:
    node, key_place, sound, about_key = root, place, root.sound, False
    fork = branch = None
    kind = error["type"]
    loc: tuple[str | int, ...] = error["loc"]
    for element in loc[:-1] if kind == "missing" else loc:
        entry = node.entries.get(element) if isinstance(node.value, dict) else None
        if entry is None and isinstance(node.value, dict) and str(element).isdecimal():
            entry = node.entries.get(int(element))
        if entry is not None:
            # An unknown key is unknown whatever its value.
            sound = sound and node.sound
            node, key_place, path = entry.node, entry.place, dotted(path, str(element))
        elif (
            isinstance(node.value, list) and isinstance(element, int) and element < len(node.value)
        ):
            sound = sound and node.sound
            node, path = node.value[element], dotted(path, element)
            key_place = node.place
        elif element == "[key]":
            about_key = True
        elif fork is None:
            fork, branch = path, str(element)
    return _Fault(
        kind=kind,
        context=error.get("ctx", {}),
        message=error["msg"],
        loc=loc,
        node=node,
        key_place=key_place,
        path=path,
        sound=sound
        and (node.sound or kind == "extra_forbidden")
        and (node.whole or kind != "missing"),
        about_key=about_key or kind == "extra_forbidden",
        fork=fork,
        branch=branch,
    )


def _best_branches(faults: Sequence[_Fault]) -> list[_Fault]:
    """Of each union, only the member that the value was probably meant to be.

    That is the one that knows the most of its keys, then the one with the fewest errors, then the
    first. Where the value itself has the wrong type for all members, the first speaks for them.
    """
    forks: dict[str, dict[str, list[_Fault]]] = {}
    for fault in faults:
        if fault.fork is not None and fault.branch is not None:
            forks.setdefault(fault.fork, {}).setdefault(fault.branch, []).append(fault)
    chosen = {
        fork: min(
            branches,
            key=lambda name: (
                sum(_concerns_keys_of(fork, fault) for fault in branches[name]),
                len(branches[name]),
            ),
        )
        for fork, branches in forks.items()
    }
    return [fault for fault in faults if fault.fork is None or chosen[fault.fork] == fault.branch]


def _concerns_keys_of(fork: str, fault: _Fault) -> bool:
    if fault.kind == "extra_forbidden":
        return fault.path == dotted(fork, str(fault.loc[-1]))
    return fault.path == fork and (fault.kind == "missing" or fault.kind.endswith("_type"))


def _report(fault: _Fault, model: type[BaseModel], report: Report) -> None:
    kind = fault.kind
    if kind == "extra_forbidden":
        known = _fields(model, fault.loc[:-1])
        hint = f"known are {', '.join(known)}" if 0 < len(known) <= 8 else None
        word = str(fault.loc[-1])
        report.add(fault.key_place, fault.path, "unknown key", like=(word, known), hint=hint)
    elif kind == "missing":
        report.add(fault.key_place, fault.path, f"the key {fault.loc[-1]} is missing")
    elif kind in ("value_error", "assertion_error"):
        _report_words(fault, report)
    elif kind == "literal_error":
        words = [word.strip("' ") for word in re.split(r",| or ", str(fault.context["expected"]))]
        words = [{"True": "true", "False": "false"}.get(word, word) for word in words]
        text = _listed(words)
        given = "" if _is_branching(fault.node) else f"; here: {_shown(fault.node)}"
        like = (str(fault.node.value), words) if isinstance(fault.node.value, str) else None
        report.add(fault.node.place, fault.path, f"must be {text}{given}", like=like)
    else:
        message, hint = _words(fault)
        place = fault.key_place if fault.about_key else fault.node.place
        report.add(place, fault.path, message, hint=hint)


def _report_words(fault: _Fault, report: Report) -> None:
    """What a validator of ours said, at the key it named."""
    message = str(fault.context.get("error", fault.message))
    place = fault.node.place
    path = fault.path
    about = _ABOUT_KEY.fullmatch(message)
    if about is not None and about["key"] in fault.node.entries:
        place = fault.node.entries[about["key"]].place
        path, message = dotted(path, about["key"]), about["message"]
    elif isinstance(fault.node.value, dict) or fault.about_key:
        place = fault.key_place
    report.add(place, path, message)


def _words(fault: _Fault) -> tuple[str, str | None]:
    """A message and a hint for an error of pydantic's own."""
    kind, context, node = fault.kind, fault.context, fault.node
    value = node.value
    branching = _is_branching(node)
    if kind == "string_type":
        if branching:
            return f"must be a text, not {_shown(node)}", None
        return f"must be a text, not {_shown(node)}", f'quote it: "{_source(node)}"'
    if kind in ("int_type", "int_parsing", "int_from_float", "float_type", "float_parsing"):
        what = "a number" if kind.startswith("float") else "a whole number"
        quoted = isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value)
        return f"must be {what}, not {_shown(node)}", "remove the quotes" if quoted else None
    if kind in ("bool_type", "bool_parsing"):
        return f"must be true or false, not {_shown(node)}", None
    if kind in ("list_type", "tuple_type", "set_type"):
        hint = f"write [{_source(node)}]" if not branching else None
        return f"must be a list, not {_shown(node)}", hint
    if kind in ("dict_type", "model_type", "mapping_type", "model_attributes_type"):
        return f"must be a map, not {_shown(node)}", None
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
        for short, text in words.items():
            if short in context:
                return f"must be {text} {context[short]:g}; here: {_shown(node)}", None
    if kind in ("string_too_short", "too_short") and context.get("min_length") == 1:
        return "must not be empty", None
    if kind == "string_pattern_mismatch":
        if context.get("pattern") == "^/":
            return f"must begin with /; here: {_shown(node)}", None
        return f"{_shown(node)} does not have the form {context.get('pattern')}", None
    message = re.sub(r"^(Input|String|List|Value|Dictionary) should ", "must ", fault.message)
    return message[:1].lower() + message[1:], None


def _is_branching(node: Node) -> bool:
    return isinstance(node.value, (list, dict))


def _shown(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a map"
    if isinstance(node.value, list):
        return "a list"
    return show(node.value)


def _source(node: Node) -> str:
    """A scalar as the file spells it: 1.10 stays 1.10."""
    start, end = node.span
    return node.text[start:end].strip()[:64]


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
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]
