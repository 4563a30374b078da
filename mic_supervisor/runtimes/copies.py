"""Which of the workloads that carry our labels are copies. Pure.

Labels say whose a workload is, and everybody copies labels: a "duplicate" button, a run script or a
compose file written from `docker inspect`. A name cannot be copied while the original is there, and
the engine gives out an id once. So ours is what has the name that we gave it, and what was seen
under that name and renamed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mic_supervisor.model import Identity, ObservedWorkload, RuntimeView

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
    return ours | {stranger.ref: False for stranger in view.strangers if stranger.usurps}
