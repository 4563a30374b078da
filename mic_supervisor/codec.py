"""One way in and out for every document that is written and read: state, labels, the socket.

A document is the JSON of a data class. Members that this version does not know are dropped, since
a newer version may have written it; a member that is missing has its default, since an older one
may. One that is wrong makes the whole document a `BadDocument`, or with `salvage` is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

_DEEPEST = 100  # documents of ours have a fifth of it; what follows it by recursion can, too


class BadDocument(ValueError):
    """What was read is not what it should be. The text says where and why, on one line."""

    def __init__(self, text: str, location: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.location = location


def parse(text: str | bytes) -> Any:
    """JSON of unknown origin, nested within reason. Raises BadDocument.

    An infinite number, or one that is none, is None.
    """
    try:
        value = json.loads(text, parse_int=_known, parse_float=_known, parse_constant=_known)
    except RecursionError:
        raise BadDocument("nested too deeply") from None
    except ValueError as error:
        raise BadDocument(f"not JSON: {error}") from error
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > _DEEPEST:
            raise BadDocument("nested too deeply")
        maps = [child for item in level if isinstance(item, dict) for child in item.values()]
        level = maps + [child for item in level if isinstance(item, list) for child in item]
    return value


def decode(kind: type[T], data: Any) -> T:
    """What `parse` gave, as a `kind`. Raises BadDocument."""
    value, wrong = _validated(kind, data)
    if wrong is not None:
        raise wrong
    return value


def salvage(kind: type[T], data: Any, *, whole: Collection[str] = ()) -> tuple[T, list[str]]:
    """What of it is right, and the locations of what was not: that is taken out of `data`.

    A member called one of `whole` is taken out with all that it holds. Raises BadDocument where
    nothing is right.
    """
    lost: list[str] = []
    while True:
        value, wrong = _validated(kind, data)
        if wrong is None:
            return value, lost
        holder, name, known = None, "", []
        at = data
        for part in wrong.location:
            if name in whole or not isinstance(at, dict) or part not in at:
                break  # else what is wrong is that it is missing
            holder, name, at = at, part, at[part]
            known.append(part)
        if holder is None:
            raise wrong
        del holder[name]
        lost.append(".".join(known))


def encode(value: Any) -> Any:
    """A data class as plain maps, sequences and values, without what is None."""
    return _adapter(cast(Hashable, type(value))).dump_python(value, exclude_none=True)


def canonical(value: Any, *, ensure_ascii: bool = False) -> str:
    """Equal values give equal texts."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=ensure_ascii, default=dict
    )


@cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cast(Any, kind))


def _validated(kind: type[T], data: Any) -> tuple[T, BadDocument | None]:
    """The value, or else the first thing that is wrong."""
    from pydantic import ValidationError

    # From JSON, where a list may become a tuple. A half surrogate is no text of any other program.
    text = json.dumps(data, ensure_ascii=False).encode(errors="replace")
    try:
        return _adapter(cast(Hashable, kind)).validate_json(text, strict=True), None
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)[0]
        location = tuple(map(str, wrong["loc"]))
        where = f"{'.'.join(location)}: " if location else ""
        nothing: Any = None
        return nothing, BadDocument(f"{where}{wrong['msg']}, not {wrong['input']!r:.80}", location)


def _known(text: str) -> int | float | None:
    """A finite number; None for what is none, as for what is not known."""
    value = float(text)
    if not isfinite(value):
        return None
    return int(text) if text.lstrip("-").isdigit() else value
