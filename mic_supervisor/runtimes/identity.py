"""Whose a host process is, as variables of its environment. Holds no secret.

A unit's `Environment` can be read by every user of the machine over D-Bus, and every process of a
workload inherits its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from mic_supervisor import codec
from mic_supervisor.model import Identity

MANAGER = "mic-supervisor"
IDENTITY = "MIC_IDENTITY"
"""Variable with the identity as JSON; see `identity_of`."""

OWN_VARIABLES = frozenset({"MIC_SCOPE", "MIC_INSTANCE", "MIC_SPEC_HASH", IDENTITY})

VERSION = 1
_FOREIGN = "its environment does not name it as ours"


def identity_variables(name: str, identity: Identity) -> dict[str, str]:
    """What tells the workload `name`, and every process in it, whose it is."""
    own = {"version": VERSION, "managed_by": MANAGER, "name": name}
    return {
        "MIC_SCOPE": identity.scope,
        "MIC_INSTANCE": identity.instance,
        "MIC_SPEC_HASH": identity.spec_hash,
        IDENTITY: codec.canonical(own | codec.encode(identity), ensure_ascii=True),
    }


def identity_of(variables: Mapping[str, str]) -> tuple[str, Identity] | str:
    """(workload's name, identity) of a process with these variables, or why it is none of ours.

    A `spec` that cannot be read is None; whatever else is missing makes it a stranger's.
    """
    text = variables.get(IDENTITY)
    if text is None:
        return _FOREIGN
    try:
        found = codec.parse(text)
        if found["managed_by"] != MANAGER:
            return _FOREIGN
        spec = found.get("spec") if isinstance(found.get("spec"), dict) else None
        return str(found["name"]), codec.decode(Identity, {**found, "spec": spec})
    except (ValueError, KeyError, TypeError) as error:
        return f"its {IDENTITY} cannot be read: {' '.join(repr(error).split())}"


def unknown_identity(scope: str, host: str, instance: str, spec_hash: str = "") -> Identity:
    """Of what no more is known of than whose it is: its model is what the id says."""
    model = instance.rpartition("-")[0] or instance
    return Identity(scope, host, instance, model, "", (), {}, None, spec_hash)
