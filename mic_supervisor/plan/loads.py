"""What a server that runs should have loaded and has not, and the other way round."""

from __future__ import annotations

from dataclasses import dataclass

from mic_supervisor.model import LoadState, PlacementState
from mic_supervisor.plan.actions import FieldDiff, Load, Unload
from mic_supervisor.plan.assess import Assessment


@dataclass(frozen=True, slots=True)
class DueLoad:
    step: Load
    cause: str
    diff: tuple[FieldDiff, ...]


@dataclass(frozen=True, slots=True)
class DueUnload:
    step: Unload
    cause: str


def unloads(item: Assessment) -> list[DueUnload]:
    """What a server has loaded for us that the file does not have in it any more."""
    match = item.match
    if match is None or not item.started_up or item.alive:
        return []
    return [
        DueUnload(
            Unload(f"unload {one.model} from {match.name}", item.instance.id, match, one),
            f"the file no longer has {one.model} in this server",
        )
        for one in item.health.surplus
    ]


def memory_key(instance: str, model: str) -> str:
    """Under what it is remembered how loading a model of a shared server went."""
    return f"{instance}/{model}"


def loads(item: Assessment) -> list[DueLoad]:
    """Only of a server that has started up, and only where it is known what it has loaded."""
    match = item.match
    if match is None or not item.started_up:
        return []
    out = []
    for placement in item.instance.placements:
        state = item.placement(placement)
        if item.loaded(placement) or not _is_known(state):
            continue
        before, after = dict(state.summary), dict(placement.summary)
        diff = tuple(
            FieldDiff(key, before.get(key), after.get(key))
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
        )
        if state.state is LoadState.LOADED:
            changed = ", ".join(entry.path for entry in diff) or "its configuration"
            cause = f"{changed} changed"
        else:
            cause = f"the server does not have {placement.model} loaded"
        if item.instance.shared:
            cause = f"{placement.model}: {cause}"
        name = f"load {placement.model} into {match.name}"
        out.append(DueLoad(Load(name, item.instance.id, match, placement), cause, diff))
    return out


def _is_known(state: PlacementState) -> bool:
    """Whether a server's word on a model is enough to send it anew."""
    if state.state is LoadState.LOADED:
        return state.digest is not None
    return state.state in (LoadState.ABSENT, LoadState.FAILED)
