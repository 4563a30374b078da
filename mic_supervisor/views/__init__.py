"""The documents that leave: what `--json` prints, the socket sends and HTTP answers.

Each shape is defined once, as the data class that builds it. HTTP derives its OpenAPI description
from these classes. The order of the fields is the order in the document. A later version may add
fields, so clients ignore those that they do not know.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def view(kind: type[T], source: object, **given: Any) -> T:
    """A `kind`: what is not given is called the same in `source`."""
    names = (field.name for field in fields(kind) if field.name not in given)  # type: ignore[arg-type]
    return kind(**{name: getattr(source, name) for name in names}, **given)
