"""Whose a workload is: what a host process carries, and which of those that carry it are copies.

Pure. An identity holds no secret: a unit's `Environment` can be read by every user of the machine
over D-Bus, and every process of a workload inherits its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mic_supervisor import codec
from mic_supervisor.model import Doubt, Identity, ObservedWorkload, RunState, RuntimeView

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

    A `spec` that cannot be read is None; whatever else is missing makes it foreign.
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


def in_doubt(
    runtime: str, name: str, ref: str, identity: Identity, doubt: Doubt
) -> ObservedWorkload:
    """What may run, and cannot be told for certain."""
    return ObservedWorkload(
        runtime, name, ref, identity, RunState.UNKNOWN, error=doubt.reason, doubt=doubt
    )


# --- copies -------------------------------------------------------------------------------------


# Labels say whose a workload is, and everybody copies labels: a "duplicate" button, a run script or
# a compose file written from `docker inspect`. A name cannot be copied while the original is there,
# and the engine gives out an id once. So ours is what has the name that we gave it, and what was
# seen under that name and renamed since.

GivenName = Callable[[Identity], str]
"""The name that a workload with an identity is created with."""


def copies(
    found: Iterable[ObservedWorkload], given_name: GivenName, known: Mapping[str, bool]
) -> dict[str, str]:
    """Why each copy is one, by its ref.

    `known` maps the refs of what was there before to whether it was ours. It may hold names, too:
    before refs were remembered, names were.
    """
    found = [*found]
    renamed = {given_name(one.identity): one.name for one in found if known.get(one.ref)}
    out: dict[str, str] = {}
    for one in found:
        name = given_name(one.identity)
        if known.get(one.ref, known.get(one.name)):
            continue
        if one.name != name:
            out[one.ref] = f"it has the labels of {name}, and another name: it is a copy"
        elif name in renamed:
            out[one.ref] = f"it has the former name of {renamed[name]}, which is ours"
        elif one.ref in known:
            out[one.ref] = "it took the name of one of ours that was renamed, and is gone"
    return out


def known_from(view: RuntimeView) -> dict[str, bool]:
    """What `copies` has to know next time of what is there now."""
    ours = {workload.ref: True for workload in view.workloads}
    return ours | {foreign.ref: False for foreign in view.foreign_workloads if foreign.has_our_name}
