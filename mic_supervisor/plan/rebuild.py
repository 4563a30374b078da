"""How a host process can be started again by the specification that it was ready with.

Nothing of an ended process remains but what is remembered here: the record it carried. In that its
secrets stand as digests. A secret whose digest is the same in the file as it is now is known again;
where one has changed, or is gone, there is no way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mic_supervisor.model import Launch, Limits, Pairs, Port, ProcessSpec
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.assess import Assessment
from mic_supervisor.plan.launch import fill
from mic_supervisor.plan.memory import Recorded

_SECRETS = ("env", "file_env", "variables")
_NOT_OF_THE_PROCESS = frozenset({"kind", "drain"})


def rebuilt(record: Recorded | None, item: Assessment) -> ProcessSpec | None:
    """The specification that it was ready with; None: it is not known in full."""
    if record is None or record.runtime != item.runtime:
        return None
    identity, instance = record.identity, item.instance
    if (identity.gpus, identity.model) != (instance.gpus, instance.model):
        return None
    spec = {k: v for k, v in specs.mapping(identity.spec).items() if k not in _NOT_OF_THE_PROCESS}
    if not spec or {*spec} - {known.name for known in fields(ProcessSpec)}:
        return None  # a later version's
    try:
        secrets: dict[str, Any] = {name: _known(name, spec, item) for name in _SECRETS}
        return ProcessSpec(**{name: _value(name, spec[name]) for name in spec} | secrets)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def relaunch(record: Recorded, spec: ProcessSpec, indices: Mapping[str, int]) -> Launch:
    """What to start: the same in every respect, on the ports that it had."""
    identity = record.identity
    numbers = ",".join(str(indices[uuid]) for uuid in identity.gpus if uuid in indices)
    return Launch(record.name, record.runtime, identity, fill(spec, identity.ports, numbers))


def _known(name: str, spec: Mapping[str, Any], item: Assessment) -> Pairs:
    """The values of what was recorded as digests. Raises KeyError where one is not known."""
    now = specs.mapping(item.spec.get(name))
    values = dict(getattr(item.instance.workload, name))
    out = []
    for key, digest in specs.mapping(spec.get(name)).items():
        if now[key] != digest:
            raise KeyError(key)
        out.append((str(key), values[key]))
    return tuple(out)


def _value(name: str, value: Any) -> Any:
    if name == "ports":
        return tuple(Port(port, **numbers) for port, numbers in value.items())
    if name == "limits":
        return Limits(**value)
    return tuple(value) if isinstance(value, list) else value
