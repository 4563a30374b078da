"""What a request says beside its method."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field

from mic_supervisor import codec
from mic_supervisor.errors import Unserviceable

T = TypeVar("T")
E = TypeVar("E")


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Of all methods of a session: a name means the same in each."""

    command: str | None = None  # as it was typed; a command of an earlier version does not say
    path: str | None = None  # of the file
    hash: str = ""  # of the document that the command has just written
    targets: tuple[str, ...] = ()  # models and GPUs
    pull: bool = False
    rebind: bool = False
    name: str | None = None  # of a model, an instance or a GPU
    names: tuple[str, ...] = ()
    all: bool = False
    reason: str | None = None
    until_reboot: bool = False
    lines: Annotated[int, Field(ge=0)] | None = None
    previous: bool = False
    pid: str = ""  # "PID 4121", of a process that a command has ended
    text: str = ""
    gpus: tuple[str, ...] = ()


def read(kind: type[T], params: Mapping[str, Any]) -> T:
    """As this data class; what it does not name is left out. Raises Unserviceable where something
    is of another type.
    """
    names = {field.name for field in fields(cast(Any, kind))}
    known = {name: value for name, value in params.items() if name in names}
    try:
        found: Any = codec.decode(kind, known)
    except codec.BadDocument as error:
        raise Unserviceable(f"cannot answer: {error}") from None
    # The codec has no half surrogate, which the name of a file may hold.
    texts = {name: value for name, value in known.items() if isinstance(value, str)}
    return cast(T, replace(found, **texts))


def typed(
    method: Callable[[Params, E], Awaitable[Any]],
) -> Callable[[Mapping[str, Any], E], Awaitable[Any]]:
    """The method for parameters as a request has them, which are read before anything is done."""

    async def call(params: Mapping[str, Any], emit: E) -> Any:
        return await method(read(Params, params), emit)

    return call
