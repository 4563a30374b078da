"""The types of gpus.yaml: durations, sizes, signals, each says what it accepts; `Strict`."""

from __future__ import annotations

import ipaddress
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

_DURATION = r"[0-9]{1,9}(\.[0-9]{1,9})?(ms|s|m|h)"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
# As Docker and Compose read sizes: 2g, 2gb, 2GB and 2GiB are all 2 * 1024^3 bytes.
_SIZE = r"([0-9]{1,16}(?:\.[0-9]{1,9})?) ?([KkMmGgTt][Ii]?[Bb]?|[Bb])"
_BYTES = {unit: 1 << (10 * power) for power, unit in enumerate("bkmgt")}

MAX_DURATION = 365 * 24 * 3600.0
MAX_SIZE = 1 << 50


def parse_duration(value: Any) -> float:
    """Seconds from "500ms", "30s", "5m" or "1h"; ValueError for all else, a bare number too."""
    match = re.fullmatch(_DURATION, value) if isinstance(value, str) else None
    if match is None:
        form = "write a number and a unit, as in `30s` or `5m`"
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", str(value)):
            form = f"a number needs a unit: write `{value}s` or `{value}m`"
        _refuse(value, f"is not a duration: {form}")
    seconds = float(value.removesuffix(match[2])) * _SECONDS[match[2]]
    if seconds > MAX_DURATION:
        raise ValueError(f"{value} is more than a year")
    return seconds


def parse_positive_duration(value: Any) -> float:
    """As parse_duration, and more than nothing."""
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError(f"{value} is no time at all: write a longer one, as in `30s` or `5m`")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back: "5m", "90s", "500ms"."""
    for unit in ("h", "m", "s"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{int(seconds / _SECONDS[unit])}{unit}"
    number, unit = (seconds, "s") if seconds >= 1 or not seconds else (seconds * 1000, "ms")
    return f"{number:.6f}".rstrip("0").rstrip(".") + unit


def parse_size(value: Any) -> int:
    """Bytes from "512m", "2gb" or "20GiB". ValueError for all else, a bare number too."""
    match = re.fullmatch(_SIZE, value) if isinstance(value, str) else None
    if match is None:
        form = "write a number and a unit, as in `512m` or `20GiB`"
        if re.fullmatch("[0-9]{1,16}", str(value)) and int(value) <= MAX_SIZE:
            form = f"a number needs a unit: write {_with_unit(int(value))}"
        _refuse(value, f"is not a size: {form}")
    size = int(float(match[1]) * _BYTES[match[2][0].lower()])
    if size > MAX_SIZE:
        raise ValueError(f"{value} is more than any machine has")
    return size


def format_size(size: int) -> str:
    """The shortest text that `parse_size` reads back: "2g", "1536m", "1000b"."""
    return next(
        f"{size // factor}{unit}"
        for unit, factor in reversed(_BYTES.items())
        if factor == 1 or (size >= factor and size % factor == 0)
    )


def _with_unit(number: int) -> str:
    """The sizes that a number without a unit was probably meant to be."""
    if number < 1024:
        return f"`{number}m` or `{number}g`"
    return f"`{number}m`" if number < 1 << 20 else f"`{format_size(number)}`"


def _refuse(value: Any, why: str) -> NoReturn:
    shown = repr(value) if isinstance(value, str) else str(value)
    if isinstance(value, (list, dict)):
        shown = "a list" if isinstance(value, list) else "a map"
    raise ValueError(f"{shown} {why}") from None


def _parse_address(value: Any) -> str:
    """An IP address to listen on."""
    try:
        ipaddress.ip_address(value if isinstance(value, str) else "")
    except ValueError:
        _refuse(value, "is not an IP address: write one, as in 127.0.0.1 or 0.0.0.0")
    return str(value)


def _parse_memlock(value: Any) -> int:
    if value in (-1, "-1"):
        _refuse(value, "is not a size: write `unlimited`")
    return -1 if value == "unlimited" else parse_size(value)


def _parse_signal(value: Any) -> str:
    """A signal's name, with its SIG."""
    name = value.upper() if isinstance(value, str) else ""
    name = name if name.startswith("SIG") else f"SIG{name}"
    if name not in signal.Signals.__members__:
        _refuse(value, "is not a signal: write a name, as in SIGTERM or SIGINT")
    return name


def _text(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^{pattern}$"}


_DURATION_SCHEMA = WithJsonSchema(_text(_DURATION))
Duration = Annotated[float, BeforeValidator(parse_duration), _DURATION_SCHEMA]
PositiveDuration = Annotated[float, BeforeValidator(parse_positive_duration), _DURATION_SCHEMA]
ListenAddress = Annotated[
    str, BeforeValidator(_parse_address), WithJsonSchema({"type": "string", "minLength": 2})
]
Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema(_text(_SIZE))]
Memlock = Annotated[
    int, BeforeValidator(_parse_memlock), WithJsonSchema(_text(f"(unlimited|{_SIZE})"))
]
SignalName = Annotated[
    str, BeforeValidator(_parse_signal), WithJsonSchema(_text("([Ss][Ii][Gg])?[A-Za-z0-9]+"))
]


# --- what every part of the file is read by ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Advice:
    """A warning about the key `key`, or about the whole where that is not given."""

    key: str
    message: str
    hint: str


class Strict(BaseModel):
    """Unknown keys are errors; nothing is coerced between strings, numbers and booleans.

    A validator of several keys raises ValueError("KEY: why"): the error is shown at KEY's location.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    def advice(self) -> Iterable[Advice]:
        """What `check` warns of, although it is valid."""
        return ()
