"""What is said of pauses to who wants to act in spite of one, or to end one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from mic_supervisor.errors import MicError
from mic_supervisor.plan.memory import Pause, Paused
from mic_supervisor.plan.selection import Names, Selection, select
from mic_supervisor.plan.words import Code, Reason, because, moment


def since(pause: Pause, now: float) -> Reason:
    """ "paused since 12:04:10 (a new riser)"; with the date where that was not today."""
    note = f" ({pause.reason})" if pause.reason else ""
    return because(Code.PAUSED, since=moment(pause.since, now), note=note)


def resume(names: Iterable[str]) -> str:
    """The way out of pauses."""
    return "; ".join(f"mic-supervisor resume {name}" for name in names)


def to_resume(names: Collection[str], there: Names, paused: Paused) -> Selection:
    """What these names mean that is paused; no name is everything. Raises MicError."""
    if not names:
        return Selection(frozenset(paused.models), frozenset(paused.gpus))
    action = f"resume {' '.join(names)}"
    chosen = select(names, there, action)
    indices = {gpu.uuid: gpu.index for gpu in there.inventory.gpus}
    free = Selection(chosen.models - paused.models.keys(), chosen.gpus - paused.gpus.keys())
    if free.models or free.gpus:
        known = Selection(frozenset(paused.models), frozenset(paused.gpus)).called(indices)
        which = free.called(indices)
        raise MicError(
            f"cannot {action}: {', '.join(which)} {'is' if len(which) == 1 else 'are'} not paused",
            hint=f"paused {'is' if len(known) == 1 else 'are'} {', '.join(known)}"
            if known
            else "nothing is paused",
        )
    return chosen


def held_by(
    paused: Paused,
    model: str,
    gpus: Collection[str],
    indices: Mapping[str, int],
    now: float,
) -> tuple[str, str] | None:
    """("GPU 3 is paused since 12:04:10", the way out) for who would act on these; None: free."""
    held = [uuid for uuid in gpus if uuid in paused.gpus]
    if model in paused.models:
        return f"{model} is {since(paused.models[model], now)}", resume([model])
    if held:
        (name,) = Selection(gpus=frozenset(held[:1])).called(indices)
        out = resume(str(indices.get(uuid, uuid)) for uuid in held)
        return f"{name} is {since(paused.gpus[held[0]], now)}", out
    return None


def free_of_pauses(
    found: Iterable[tuple[str, str, Collection[str]]],
    paused: Paused,
    action: str,
    indices: Mapping[str, int],
    now: float,
) -> list[str]:
    """Of instances, as (id, model, GPUs), the ids of those that are not paused.

    Raises MicError "cannot ACTION: …" where all of them are.
    """
    free: list[str] = []
    reasons: list[tuple[str, str]] = []
    for instance, model, gpus in found:
        held = held_by(paused, model, gpus, indices, now)
        if held is None:
            free.append(instance)
        else:
            reasons.append(held)
    if reasons and not free:
        reason, out = reasons[0]
        raise MicError(f"cannot {action}: {reason}", hint=out)
    return free
