"""Spec identity: whether what runs is what the file asks for.

A workload is written down *sparsely*: fields at their default are left out. So an upgrade that adds
a field with a default changes nothing, and a field that this version does not know is not compared.
Secrets stand as keyed digests. Digests made with another key are unknown, never different.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any

from mic_supervisor import codec
from mic_supervisor.model import (
    ContainerSpec,
    HttpCall,
    Instance,
    Limits,
    Mount,
    Port,
    ProcessSpec,
    Workload,
)
from mic_supervisor.plan.actions import FieldDiff

SCHEMA = 1
HIDDEN = "(hidden)"

_KINDS: dict[str, Any] = {
    "container": ContainerSpec,
    "process": ProcessSpec,
}
_SECRET = frozenset({"env", "file_env", "variables"})
# How a workload is stopped is read at the time of the stop, and when its image is pulled as one is
# created: changing these must restart nothing.
_NOT_COMPARED = frozenset({"stop_signal", "stop_timeout", "drain", "pull"})
_KEYS = {"host_devices": "devices"}  # as the file calls it
_DIGEST = "hmac-sha256"


@dataclass(frozen=True, slots=True)
class SpecKey:
    """The secret of this machine that digests in labels are keyed with."""

    value: bytes = field(repr=False)

    @property
    def id(self) -> str:
        return hashlib.sha256(b"mic key id\0" + self.value).hexdigest()[:8]

    def digest(self, text: str) -> str:
        mac = hmac.new(self.value, text.encode(), hashlib.sha256).hexdigest()
        return f"{_DIGEST}:{self.id}:{mac[:32]}"


def normalise(workload: Workload, key: SpecKey) -> dict[str, Any]:
    """The sparse, JSON-able form of a workload, as it goes into labels."""
    kind = "container" if isinstance(workload, ContainerSpec) else "process"
    out: dict[str, Any] = {"kind": kind}
    written: Any = type(workload)
    for name, default in _fields(written):
        value = getattr(workload, name)
        if value == default:
            continue
        if name in _SECRET:
            out[name] = {variable: key.digest(text) for variable, text in value}
        else:
            out[name] = _plain(value)
    return out


def of_instance(instance: Instance, key: SpecKey) -> dict[str, Any]:
    """The sparse form of an instance's workload, and how it is drained.

    That is written down because it is needed when the file no longer names the instance.
    """
    out = normalise(instance.workload, key)
    if instance.drain is not None and instance.drain_timeout > 0:
        call = asdict(instance.drain)
        out["drain"] = {"call": call, "timeout": instance.drain_timeout}
    return out


def spec_hash(spec: Mapping[str, Any]) -> str:
    """16 hex digits over what is compared."""
    compared = {name: value for name, value in spec.items() if name not in _NOT_COMPARED}
    return hashlib.sha256(codec.canonical(compared).encode()).hexdigest()[:16]


def differences(recorded: Mapping[str, Any], desired: Mapping[str, Any]) -> tuple[FieldDiff, ...]:
    """The fields that differ, by path. Empty: what was recorded is what is desired."""
    if recorded == desired:
        return ()
    if recorded.get("kind") != desired.get("kind"):
        return (FieldDiff("kind", recorded.get("kind"), desired.get("kind")),)
    out: list[FieldDiff] = []
    for name, default in _defaults(desired["kind"]):
        if name in _NOT_COMPARED or (name == "digest" and name not in desired):
            continue  # a tag that nobody asked to be pulled is as good at any digest
        before, after = recorded.get(name, default), desired.get(name, default)
        if before == after:
            continue
        if name in _SECRET:
            out.extend(_secret_differences(name, mapping(before), mapping(after)))
        else:
            out.extend(_walk(_KEYS.get(name, name), before, after))
    return tuple(out)


def keys_of(recorded: Mapping[str, Any]) -> set[str]:
    """The ids of the keys that its secrets were digested with."""
    return {_key_of(digest) for name in _SECRET for digest in mapping(recorded.get(name)).values()}


def stop_parameters(spec: Mapping[str, Any] | None) -> tuple[str, float]:
    """(signal, grace seconds) that a recorded specification asks for."""
    spec = spec or {}
    grace = spec.get("stop_timeout")
    signal = spec.get("stop_signal")
    return (
        signal if isinstance(signal, str) else "SIGTERM",
        float(grace) if isinstance(grace, int | float) else 30.0,
    )


def drain_parameters(spec: Mapping[str, Any] | None) -> tuple[HttpCall, float] | None:
    """(what to ask, for how many seconds) as recorded; None: it is not drained."""
    drain = mapping(mapping(spec).get("drain"))
    call, timeout = mapping(drain.get("call")), drain.get("timeout")
    try:
        if not isinstance(timeout, int | float):
            return None
        return HttpCall(**{str(name): value for name, value in call.items()}), float(timeout)
    except TypeError:  # a later version's, or one that was edited by hand
        return None


def listen_address(spec: Mapping[str, Any] | None) -> str:
    """The address that a recorded workload serves on."""
    address = mapping(spec).get("listen")
    return address if isinstance(address, str) else "127.0.0.1"


@cache
def _defaults(kind: str) -> tuple[tuple[str, Any], ...]:
    """The fields of a kind by name, sorted, with what stands for one that is not recorded."""
    return tuple(sorted((name, _plain(default)) for name, default in _fields(_KINDS[kind])))


@cache
def _fields(kind: Any) -> tuple[tuple[str, Any], ...]:
    """The fields of a data class by name, with their defaults."""
    return tuple((f.name, None if f.default is MISSING else f.default) for f in fields(kind))


def _plain(value: Any) -> Any:
    """Tuples become lists, nested records sparse maps; what has a name is keyed by it."""
    if isinstance(value, Limits):
        return _sparse(value)
    if isinstance(value, tuple):
        if value and all(isinstance(item, Port) for item in value):
            return {item.name: _sparse(item, "name") for item in value}
        if value and all(isinstance(item, Mount) for item in value):
            return {item.target: _sparse(item, "target") for item in value}
        if value and all(isinstance(item, tuple) for item in value):
            return dict(value)
        return [_plain(item) for item in value]
    return value


def _sparse(value: Limits | Mount | Port, key: str = "") -> dict[str, Any]:
    kind: Any = type(value)
    pairs = ((name, getattr(value, name), default) for name, default in _fields(kind))
    return {name: item for name, item, default in pairs if item != default and name != key}


def _walk(path: str, before: Any, after: Any) -> Iterator[FieldDiff]:
    if before == after or (not before and not after and before != 0 and after != 0):
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in sorted({*before, *after}):
            yield from _walk(f"{path}.{name}", before.get(name), after.get(name))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _walk(f"{path}[{index}]", old, new)
    else:
        yield FieldDiff(path, before, after)


def _secret_differences(
    path: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[FieldDiff]:
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new or (old and new and _key_of(old) != _key_of(new)):
            continue
        yield FieldDiff(f"{path}.{name}", HIDDEN if old else None, HIDDEN if new else None)


def mapping(value: Any) -> Mapping[str, Any]:
    """A label can be edited by hand, and what it then holds must not stop the planner."""
    return value if isinstance(value, Mapping) else {}


def _key_of(digest: Any) -> str:
    parts = str(digest).split(":")
    return parts[1] if len(parts) == 3 and parts[0] == _DIGEST else ""
