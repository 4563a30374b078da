"""The scalar types of gpus.yaml: durations, sizes, signals; each says what it accepts."""

from __future__ import annotations

import re
import signal
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

_DURATION = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,9})?)(?P<unit>ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,9})?)(?P<unit>b|k|m|g|t|KiB|MiB|GiB|TiB)?")
_BYTES = {
    "b": 1,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}


MAX_DURATION = 365 * 24 * 3600.0
MAX_SIZE = 1 << 50


def parse_duration(value: Any) -> float:
    """Seconds from "500ms", "30s", "5m" or "1h"; ValueError for all else, a bare number too."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{_shown(value)} is not a duration: {_duration_form(value)}")
    seconds = float(match["number"]) * _SECONDS[match["unit"]]
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
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(
                f"{_shown(value)} is not a size: write a number and a unit, as in 512m or 20GiB"
            )
        size = int(float(match["number"]) * _BYTES[match["unit"] or "b"])
    if size > MAX_SIZE:
        raise ValueError(f"{value} is more than any machine has")
    return size


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a map"
    return repr(value) if isinstance(value, str) else str(value)


def _duration_form(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"a number needs a unit, as in {value}s or {value}m"
    return "write a number and a unit, as in 30s or 5m"


def _parse_address(value: Any) -> str:
    """An IP address to listen on."""
    import ipaddress

    try:
        ipaddress.ip_address(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError(
            f"{_shown(value)} is not an IP address: write one, as in 127.0.0.1 or 0.0.0.0"
        ) from None
    return str(value)


def _parse_memlock(value: Any) -> int:
    return -1 if value == "unlimited" else parse_size(value)


def _parse_signal(value: Any) -> str:
    """A signal's name, with its SIG."""
    name = value.upper() if isinstance(value, str) else ""
    name = name if name.startswith("SIG") else f"SIG{name}"
    if name not in signal.Signals.__members__:
        raise ValueError(f"{_shown(value)} is not a signal: write a name, as in SIGTERM or SIGINT")
    return name


_DURATION_SCHEMA = WithJsonSchema(
    {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?(ms|s|m|h)$"}
)
Duration = Annotated[float, BeforeValidator(parse_duration), _DURATION_SCHEMA]
PositiveDuration = Annotated[float, BeforeValidator(parse_positive_duration), _DURATION_SCHEMA]
ListenAddress = Annotated[
    str, BeforeValidator(_parse_address), WithJsonSchema({"type": "string", "minLength": 2})
]
_SIZE_PATTERN = r"[0-9]{1,15}(\.[0-9]{1,9})?(b|k|m|g|t|KiB|MiB|GiB|TiB)?"
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": f"^{_SIZE_PATTERN}$"},
            ]
        }
    ),
]
Memlock = Annotated[
    int,
    BeforeValidator(_parse_memlock),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": f"^(unlimited|{_SIZE_PATTERN})$"},
            ]
        }
    ),
]
SignalName = Annotated[
    str,
    BeforeValidator(_parse_signal),
    WithJsonSchema({"type": "string", "pattern": "^([Ss][Ii][Gg])?[A-Za-z0-9]+$"}),
]
