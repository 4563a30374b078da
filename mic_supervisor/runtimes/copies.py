"""Which of the workloads that carry our labels are copies. Pure.

Labels say whose a workload is, and everybody copies labels: a "duplicate" button, a run script or a
compose file written from `docker inspect`. A name cannot be copied while the original is there, and
the engine gives out an id once. So ours is what has the name that we gave it, and what was seen
under that name and renamed since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from mic_supervisor.model import Identity, ObservedWorkload

GivenName = Callable[[Identity], str]
"""The name that a workload with an identity is created with."""


def copies(
    found: Iterable[ObservedWorkload], given_name: GivenName, known: Collection[str]
) -> dict[str, str]:
    """Why each copy is one, by its ref. `known` are the refs of what was seen to be ours before.

    It may hold names, too: before refs were remembered, names were.
    """
    found = [*found]
    renamed = {given_name(one.identity): one.name for one in found if one.ref in known}
    out: dict[str, str] = {}
    for one in found:
        name = given_name(one.identity)
        if one.ref in known or one.name in known:
            continue
        if one.name != name:
            out[one.ref] = f"it has the labels of {name}, and another name: it is a copy"
        elif name in renamed:
            out[one.ref] = f"it has the former name of {renamed[name]}, which is ours"
    return out
