"""Probes as they are remembered, so that what runs by an earlier specification can be asked by it.

What a later version wrote and this one does not understand is no probe: nothing is asked in its
place, and the instance is unknown rather than unhealthy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from mic_supervisor.model import (
    Check,
    EngineCheck,
    ExecCheck,
    HttpCheck,
    Probe,
    Probes,
    TcpCheck,
)

_KINDS: Mapping[str, type[Check]] = {
    "http": HttpCheck,
    "tcp": TcpCheck,
    "exec": ExecCheck,
    "engine": EngineCheck,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_json(probes: Probes) -> dict[str, Any]:
    """By purpose; those that there are not are left out."""
    out: dict[str, Any] = {}
    for purpose in ("startup", "liveness", "readiness"):
        probe: Probe | None = getattr(probes, purpose)
        if probe is not None:
            check = {"kind": _NAMES[type(probe.check)], **asdict(probe.check)}
            out[purpose] = {**asdict(probe), "check": check}
    return out


def from_json(data: Any) -> Probes | None:
    """None: it is not understood."""
    try:
        return Probes(**{str(purpose): _probe(probe) for purpose, probe in data.items()})
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def _probe(data: Mapping[str, Any]) -> Probe:
    check = {**data["check"]}
    kind = _KINDS[check.pop("kind")]
    numbers = {name: data[name] for name in ("period", "timeout", "failures")}
    if not all(isinstance(value, int | float) and value > 0 for value in numbers.values()):
        raise ValueError(f"{numbers} are no numbers")
    known = {item.name for item in fields(kind)}
    if {*check} - known:
        raise ValueError(f"{kind.__name__} has none of {sorted({*check} - known)}")
    return Probe(kind(**{name: _tuples(value) for name, value in check.items()}), **numbers)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
