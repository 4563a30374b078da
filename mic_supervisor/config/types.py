"""The scalar types of gpus.yaml: durations, sizes, signals; each says what it accepts."""

from __future__ import annotations

import re
import signal
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>b|k|m|g|t|KiB|MiB|GiB|TiB)?")
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


def parse_duration(value: Any) -> float:
    """Seconds from "500ms", "30s", "5m" or "1h". ValueError for anything else, a bare number too."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a duration: write a number and a unit, as in 30s or 5m")
    return float(match["number"]) * _SECONDS[match["unit"]]


def parse_size(value: Any) -> int:
    """Bytes from "512m", "2g", "20GiB" or a plain integer. ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a size: write a number and a unit, as in 512m or 20GiB")
    return int(float(match["number"]) * _BYTES[match["unit"] or "b"])


def _parse_memlock(value: Any) -> int:
    return -1 if value == "unlimited" else parse_size(value)


def _parse_signal(value: Any) -> str:
    """A signal's name, with its SIG."""
    name = value.upper() if isinstance(value, str) else ""
    name = name if name.startswith("SIG") else f"SIG{name}"
    if name not in signal.Signals.__members__:
        raise ValueError(f"{value!r} is not a signal: write a name, as in SIGTERM or SIGINT")
    return name


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)?(ms|s|m|h)$"}),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?(b|k|m|g|t|KiB|MiB|GiB|TiB)?$"},
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
                {"type": "string", "pattern": r"^(unlimited|\d+(\.\d+)?(b|k|m|g|t|KiB|MiB|GiB|TiB)?)$"},
            ]
        }
    ),
]
SignalName = Annotated[
    str,
    BeforeValidator(_parse_signal),
    WithJsonSchema({"type": "string", "pattern": "^(SIG)?[A-Z0-9]+$"}),
]
