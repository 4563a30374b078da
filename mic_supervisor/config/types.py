"""The scalar types of gpus.yaml: durations, sizes, signals; each says what it accepts."""

from __future__ import annotations

import ipaddress
import re
import signal
from typing import Annotated, Any, NoReturn

from pydantic import BeforeValidator, WithJsonSchema

_DURATION = r"[0-9]{1,9}(\.[0-9]{1,9})?(ms|s|m|h)"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = r"[0-9]{1,15}(\.[0-9]{1,9})?(b|k|m|g|t|KiB|MiB|GiB|TiB)?"
_BYTES = {"b": 1} | {
    unit: 1 << (10 * power)
    for power, units in enumerate((("k", "KiB"), ("m", "MiB"), ("g", "GiB"), ("t", "TiB")), 1)
    for unit in units
}

MAX_DURATION = 365 * 24 * 3600.0
MAX_SIZE = 1 << 50


def parse_duration(value: Any) -> float:
    """Seconds from "500ms", "30s", "5m" or "1h"; ValueError for all else, a bare number too."""
    match = re.fullmatch(_DURATION, value) if isinstance(value, str) else None
    if match is None:
        form = "write a number and a unit, as in 30s or 5m"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            form = f"a number needs a unit, as in {value}s or {value}m"
        _refuse(value, f"is not a duration: {form}")
    seconds = float(value.removesuffix(match[2])) * _SECONDS[match[2]]
    if seconds > MAX_DURATION:
        raise ValueError(f"{value} is more than a year")
    return seconds


def parse_positive_duration(value: Any) -> float:
    """As parse_duration, and more than nothing."""
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError(f"{value} is no time at all: write a longer one, as in 30s or 5m")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back: "5m", "90s", "500ms"."""
    for unit in ("h", "m", "s"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{int(seconds / _SECONDS[unit])}{unit}"
    number, unit = (seconds, "s") if seconds >= 1 or not seconds else (seconds * 1000, "ms")
    return f"{number:.6f}".rstrip("0").rstrip(".") + unit


def parse_size(value: Any) -> int:
    """Bytes from "512m", "2g", "20GiB" or a plain integer. ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        size = value
    else:
        match = re.fullmatch(_SIZE, value) if isinstance(value, str) else None
        if match is None:
            _refuse(value, "is not a size: write a number and a unit, as in 512m or 20GiB")
        unit = match[2] or ""
        size = int(float(value.removesuffix(unit)) * _BYTES[unit or "b"])
    if size > MAX_SIZE:
        raise ValueError(f"{value} is more than any machine has")
    return size


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


def _size_schema(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, _text(pattern)]})


_DURATION_SCHEMA = WithJsonSchema(_text(_DURATION))
Duration = Annotated[float, BeforeValidator(parse_duration), _DURATION_SCHEMA]
PositiveDuration = Annotated[float, BeforeValidator(parse_positive_duration), _DURATION_SCHEMA]
ListenAddress = Annotated[
    str, BeforeValidator(_parse_address), WithJsonSchema({"type": "string", "minLength": 2})
]
Size = Annotated[int, BeforeValidator(parse_size), _size_schema(_SIZE)]
Memlock = Annotated[int, BeforeValidator(_parse_memlock), _size_schema(f"(unlimited|{_SIZE})")]
SignalName = Annotated[
    str, BeforeValidator(_parse_signal), WithJsonSchema(_text("([Ss][Ii][Gg])?[A-Za-z0-9]+"))
]
