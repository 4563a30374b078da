"""Who gets which GPUs of those that the file hands over: claims, their turns and their ends. Pure.

| what happens | what becomes of the claim |
|---|---|
| somebody asks | it waits its turn, and gets GPUs by the rules below |
| its holder goes | one that waits is forgotten; one that has GPUs keeps them for the grace |
| its holder comes back, or another claim of the model and size comes | goes on with what runs |
| the grace is over | it ends: what runs is drained and stopped |
| its holder releases it | it ends in the same way |
| the file takes its GPUs back | it waits again, before all others |
| the file has no such model, or no such number of GPUs, any more | it ends |

A claim that waits gets, in the order in which they asked:

1. what it had, as its holder says, where that still runs and nobody came back for it;
2. what a claim of the same model and size has whose holder vanished: it runs on as it is;
3. GPUs that the file hands over in its size, that no claim has, and on which nothing of ours is any
   more; those that nothing speaks against come first.

Nothing new is given while a runtime cannot be read: who knows what runs there. What runs for a
claim when the supervisor comes is kept for whoever had it for `RECONNECT`, then for anybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from mic_supervisor.desired.bind import instance_id
from mic_supervisor.model import Claim, Ending, FleetEntry

ORIGIN = "claim"
"""The origin of what runs for a claim."""

RECONNECT = 10.0  # seconds; a holder asks again every second, and a machine may be busy

Claims = tuple[Claim, ...]


class Running(NamedTuple):
    """A workload of ours that is there, alive or not."""

    instance: str
    model: str
    gpus: tuple[str, ...]
    origin: str
    alive: bool


@dataclass(frozen=True, slots=True)
class Ground:
    """One look at the file and at the machine, as far as claims go by it.

    `models` may be claimed. `named` are the UUIDs that the file says anything of. `confirmed`: what
    the file no longer names may be taken back. `running` None: it cannot be read. Something speaks
    against GPUs that are `avoided`. `now` is steady, `grace` seconds. A file that waits for a word
    has `coming` entries, and `coming_models` that may be claimed then.
    """

    entries: tuple[FleetEntry, ...]
    models: Collection[str]
    named: Collection[str]
    running: tuple[Running, ...] | None
    now: float
    grace: float
    confirmed: bool = True
    avoided: Collection[str] = ()
    coming: tuple[FleetEntry, ...] = ()
    coming_models: Collection[str] = ()


# --- what holders do --------------------------------------------------------------------------


def ask(claims: Claims, new: Claim) -> Claims:
    """With a claim that somebody holds from now on; of a token that is known, the same claim."""
    known = _of(claims, new.token)
    if known is None:
        return (*claims, new)
    return _with(claims, replace(known, by=new.by, holder=new.holder, vanished_at=None))


def vanish(claims: Claims, token: str, now: float) -> Claims:
    """Its holder is gone, and asked for nothing. One that ended goes its way without a holder."""
    known = _of(claims, token)
    if known is None:
        return claims
    if known.gpus is None and known.ending is None:
        return _without(claims, token)
    return _with(claims, replace(known, vanished_at=now))


def end(claims: Claims, token: str, ending: Ending) -> Claims:
    """It is over, unless it was before. What it has is taken away, and only then is it gone."""
    known = _of(claims, token)
    if known is None or known.ending is not None:
        return claims
    return _with(claims, replace(known, ending=ending))


def gone(claims: Claims, tokens: Collection[str]) -> Claims:
    """Without those of which nothing is left."""
    return tuple(claim for claim in claims if claim.token not in tokens)


def is_over(claim: Claim) -> bool:
    """Whether it ended, and there is nothing to take away, nor to look for."""
    return claim.ending is not None and claim.gpus is None and claim.instance is None


def refusal(
    model: str, size: int, known: Collection[str], models: Collection[str], sizes: Iterable[int]
) -> Ending | None:
    """Why this can never be had here, however often it is asked for; None: it can.

    `known` are the models of the file, `models` those of them that may be claimed.
    """
    offered = sorted({*sizes})
    if model not in known:
        there = f"it has {', '.join(sorted(known))}" if known else "it has none"
        text, hint = f"the file has no model {model}", f"describe it under models:; {there}"
    elif model not in models:
        text = f"{model} is part of a server of several models, which the file alone gives GPUs to"
        hint = "give its backend a server for each GPU, or put the model under gpus:"
    elif not offered:
        text = "the file hands no GPU over"
        hint = "hand one over under gpus:, as in `0: fleet`"
    elif size not in offered:
        has = " or ".join(map(str, offered))
        text = f"the file hands over {has} at a time, not {size}"
        hint = f"claim {has}, or hand over single GPUs" if size < 2 else _group(size)
    else:
        return None
    return Ending("refused", f"cannot claim {model}: {text}", hint)


def _group(size: int) -> str:
    return f'hand them over together, as in `"{",".join(map(str, range(size)))}": fleet`'


# --- what one look changes ----------------------------------------------------------------------


def follow(claims: Claims, ground: Ground, *, ended: bool = False) -> Claims:
    """The claims after one look. `ended`: what ran for a claim and ended is found as well."""
    moved = [_on_its_entry(_expired(claim, ground), ground) for claim in claims]
    # Nobody waits for one whose GPUs were taken back while its holder is away.
    claims = tuple(one for one in moved if one.gpus or one.ending or one.vanished_at is None)
    return _given((*claims, *_found(claims, ground, ended=ended)), ground)


def turn(claims: Claims, claim: Claim) -> tuple[int, int]:
    """The how manieth it is of how many that wait for so many GPUs."""
    queue = [one for one in _queue(claims) if one.size == claim.size]
    return queue.index(claim) + 1, len(queue)


def _expired(claim: Claim, ground: Ground) -> Claim:
    away = None if claim.vanished_at is None else ground.now - claim.vanished_at
    if claim.ending is not None or away is None or away < ground.grace:
        return claim
    return replace(claim, ending=Ending("vanished", f"its holder vanished {away:.0f} s ago"))


def _on_its_entry(claim: Claim, ground: Ground) -> Claim:
    """As the file has it now: its GPUs may have been taken back, and its model be gone."""
    if (gpus := claim.gpus) is not None:
        entry = _entry_of(gpus, ground)
        if entry is not None:
            claim = replace(claim, gpus=entry.gpus, instance=_instance(claim.model, entry))
        elif ground.confirmed or not {*gpus}.isdisjoint(ground.named):
            claim = replace(
                claim, gpus=None, instance=None, got_at=None, down_since=None, first=True
            )
    # What the file merely lacks waits for a word; that it took the GPUs back is one.
    if claim.ending is not None or not (ground.confirmed or claim.first):
        return claim
    sizes = [entry.size for entry in ground.entries]
    if claim.gpus is not None:
        sizes.append(claim.size)
    why = refusal(claim.model, claim.size, ground.models, ground.models, sizes)
    if why is None or _may_come(claim, ground):
        return claim
    return replace(claim, ending=why)


def _may_come(claim: Claim, ground: Ground) -> bool:
    """Whether it waits for what a file gives that waits itself."""
    fits = any(entry.size == claim.size for entry in ground.coming)
    return claim.gpus is None and fits and claim.model in ground.coming_models


def _found(claims: Claims, ground: Ground, *, ended: bool) -> list[Claim]:
    """What runs for claims that nobody knows of: the supervisor has just come.

    It is where the file hands GPUs over, or where the file lacks them and nobody confirmed that.
    """
    had = {uuid for claim in claims for uuid in claim.gpus or ()}
    there = [one for one in ground.running or () if one.origin == ORIGIN and (one.alive or ended)]
    found = []
    for one in sorted(there, key=lambda one: (not one.alive, one.instance)):
        entry = _entry_of(one.gpus, ground)
        lacks = not ground.confirmed and {*one.gpus}.isdisjoint(ground.named)
        if not one.gpus or not had.isdisjoint(one.gpus) or (entry is None and not lacks):
            continue
        had |= {*one.gpus}
        found.append(
            Claim(
                token=f"of {one.instance}",
                model=one.model,
                size=len(one.gpus),
                asked_at=ground.now,
                gpus=one.gpus if entry is None else entry.gpus,
                instance=one.instance if entry is None else _instance(one.model, entry),
                got_at=ground.now,
                vanished_at=ground.now,
                found=True,
            )
        )
    return found


def _given(claims: Claims, ground: Ground) -> Claims:
    """With GPUs for those whose turn it is."""
    if ground.running is None:
        return claims
    for claim in _queue(claims):
        vanished = (one for one in claims if _fits(one, claim))
        own = next((one for one in vanished if one.instance == claim.instance), None)
        if own is not None:
            claims = _taken_over(claims, claim, own)
        elif claim.instance is not None:
            claims = _with(claims, replace(claim, instance=None))
    for claim in _queue(claims):
        if claim.ending is not None:
            continue
        left = [one for one in claims if _fits(one, claim) and _is_abandoned(one, ground)]
        if left:
            first = min(left, key=lambda one: (one.vanished_at, one.token))
            claims = _taken_over(claims, claim, first)
        elif claim.model not in ground.models:
            continue  # a word on the file may bring it
        elif (entry := _free(claims, claim.size, ground)) is not None:
            instance = _instance(claim.model, entry)
            given = replace(claim, gpus=entry.gpus, instance=instance, got_at=ground.now)
            claims = _with(claims, replace(given, first=False))
    return claims


def _queue(claims: Claims) -> list[Claim]:
    """Those that wait, whose turn is next first. What ended may still look for what it had."""
    waiting = [one for one in claims if one.gpus is None and not is_over(one)]
    return sorted(waiting, key=lambda one: (not one.first, one.asked_at, one.token))


def _fits(one: Claim, claim: Claim) -> bool:
    """Whether the one vanished, and has what the other waits for."""
    away = one.vanished_at is not None and one.gpus is not None and one.ending is None
    return away and (one.model, one.size) == (claim.model, claim.size)


def _is_abandoned(claim: Claim, ground: Ground) -> bool:
    entry = _entry_of(claim.gpus or (), ground)
    if entry is not None and entry.trouble is not None:
        return False  # of use to nobody but who has it
    away = ground.now - (claim.vanished_at or ground.now)
    return not claim.found or away >= RECONNECT


def _taken_over(claims: Claims, claim: Claim, other: Claim) -> Claims:
    has = replace(claim, gpus=other.gpus, instance=other.instance, got_at=other.got_at, first=False)
    return _with(_without(claims, other.token), has)


def _free(claims: Claims, size: int, ground: Ground) -> FleetEntry | None:
    had = {uuid for claim in claims for uuid in claim.gpus or ()}
    had |= {uuid for one in ground.running or () for uuid in one.gpus}
    free = [
        entry
        for entry in ground.entries
        if entry.trouble is None and entry.size == size and had.isdisjoint(entry.gpus)
    ]
    avoided = {*ground.avoided}
    return min(free, key=lambda entry: not avoided.isdisjoint(entry.gpus), default=None)


def _entry_of(gpus: tuple[str, ...], ground: Ground) -> FleetEntry | None:
    return next((entry for entry in ground.entries if {*entry.gpus} == {*gpus}), None)


def _instance(model: str, entry: FleetEntry) -> str:
    return instance_id(model, entry.digits)


def _of(claims: Claims, token: str) -> Claim | None:
    return next((claim for claim in claims if claim.token == token), None)


def _with(claims: Claims, changed: Claim) -> Claims:
    return tuple(changed if claim.token == changed.token else claim for claim in claims)


def _without(claims: Claims, token: str) -> Claims:
    return tuple(claim for claim in claims if claim.token != token)
