"""How claims fare: what becomes of one whose instance does not get ready, and when one is gone.

A claim is given up when its own instance cannot be served within the budget of a start, so that
whoever schedules it looks elsewhere. Until then the supervisor tries, as it does for the file.

| its instance | the claim |
|---|---|
| was never ready, and a start of it failed | ends |
| was ready, and failed | goes on: the supervisor starts it again; ends when that fails, too |
| is kept from starting for longer than its `start_timeout` | ends |
| is paused | goes on, for as long as the pause lasts |
| may run, and its runtime cannot be read | goes on: nobody knows how it is |
| has no host any more: it is drained | ends |

What a claim that ends had is taken away first. It is gone when nothing of it runs any more and the
driver has its memory back, as before a start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mic_supervisor.config.document import CONFIRM
from mic_supervisor.desired.claims import Claims, is_over, turn
from mic_supervisor.model import Claim, DesiredState, Ending, ObservedWorkload
from mic_supervisor.plan.assess import is_alive, workloads
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.look import Look
from mic_supervisor.plan.memory import InstanceMemory
from mic_supervisor.plan.release import Released, Waiting, check_release
from mic_supervisor.plan.selection import drained
from mic_supervisor.plan.status import InstanceStatus

ClaimState = Literal["waiting", "starting", "ready", "vanished", "releasing"]

_START_TIMEOUT = 300.0  # seconds, where it is not known which one the file gives
_HELD_UP = frozenset({Phase.BLOCKED, Phase.BACKOFF, Phase.WAITING_VRAM, Phase.STUCK_STOPPING})
# Between two tries it is in one of these: nothing has come of it.
_TRYING = frozenset({Phase.PENDING, Phase.STOPPING})
_UP = frozenset({Phase.READY, Phase.UNPROBED})
# It serves, or something of it does, or a person wants it to be left alone.
_AS_IT_IS = _UP | {Phase.DEGRADED, Phase.PAUSED, Phase.DRAINED}


@dataclass(frozen=True, slots=True)
class Standing:
    """How a claim stands, for its holder and for who looks. `reason` is why it is not ready."""

    state: ClaimState
    phase: str | None = None  # of its instance
    reason: str | None = None


def fared(claims: Claims, look: Look, busy: Collection[str]) -> tuple[Claims, set[str]]:
    """The claims after a round, and the tokens of those of which nothing is left."""
    rows = {row.id: row for row in look.statuses}
    limits = {item.id: item.start_timeout for item in look.desired.instances}
    changed = tuple(_gone(_fared(claim, rows, limits, look), look, busy) for claim in claims)
    over = {claim.token for claim in changed if is_over(claim)}
    return changed, over


def unseen(claim: Claim, look: Look) -> bool:
    """Whether what it has may run, and its runtime cannot be read: nobody knows how it is."""
    return _may_run(look, lambda one: one.identity.instance == claim.instance)


def standing(
    claims: Claims, claim: Claim, rows: Mapping[str, InstanceStatus], desired: DesiredState
) -> Standing:
    """As people are told. `rows` are of the instances, by their ids."""
    row = rows.get(claim.instance or "")
    phase, reason = (None, None) if row is None else (row.phase.value, row.reason)
    if claim.ending is not None:
        return Standing("releasing", phase, claim.ending.text or reason)
    if claim.gpus is None:
        if not desired.config_hash:
            return Standing("waiting", None, "a valid file: none was accepted yet")
        if claim.model not in desired.claimable:
            lacks = f"the file to describe {claim.model}, or a word on it: {CONFIRM}"
            return Standing("waiting", None, lacks)
        if not any(entry.size == claim.size for entry in desired.fleet):
            lacks = f"the file to hand over {claim.size} at a time, or a word on it: {CONFIRM}"
            return Standing("waiting", None, lacks)
        at, count = turn(claims, claim)
        return Standing("waiting", None, f"a GPU: it is number {at} of {count} in the queue")
    if claim.vanished_at is not None:
        return Standing("vanished", phase, reason)
    ready = row is not None and row.phase in _UP
    return Standing("ready" if ready else "starting", phase, reason)


def _fared(
    claim: Claim, rows: Mapping[str, InstanceStatus], limits: Mapping[str, float], look: Look
) -> Claim:
    if claim.ending is not None:
        return claim
    if look.memory.drained is not None and not look.desired.down:
        why = drained(look.memory.drained, look.at)
        text = f"cannot serve {claim.model}: {why}"
        ending = Ending("drained", text, why.hint)
        return replace(claim, ending=ending, instance=claim.instance if claim.gpus else None)
    row = rows.get(claim.instance or "")
    if claim.gpus is None or row is None:
        return claim
    if unseen(claim, look):
        return claim
    limit = limits.get(row.id, _START_TIMEOUT)
    down_since = claim.down_since
    if row.phase in _HELD_UP:
        down_since = look.now if down_since is None else down_since
    elif row.phase not in _TRYING:
        down_since = None
    claim = replace(claim, down_since=down_since)
    if row.phase in _AS_IT_IS:
        return claim
    why_not = _failure(look.memory.of(row.id))
    if why_not is None and down_since is not None and look.now - down_since >= limit:
        why_not = f"it could not start for its start_timeout of {limit:g} s: {row.reason}"
    if why_not is None:
        return claim
    return replace(claim, ending=Ending("failed", f"cannot serve {claim.model}: {why_not}"))


def _failure(entry: InstanceMemory) -> str | None:
    """Why its starts are given up; None: they are not."""
    if entry.failures < (1 if entry.ready is None else 2):
        return None
    again = "" if entry.ready is None else "after it had been ready, "
    return f"{again}its start failed: {entry.reason}"


def _gone(claim: Claim, look: Look, busy: Collection[str]) -> Claim:
    """A claim that ends, without its GPUs once nothing is left on them."""
    if claim.ending is None or claim.gpus is None:
        return claim
    others = {uuid for item in look.desired.instances for uuid in item.gpus}
    if not others.isdisjoint(claim.gpus):
        return claim  # decided before it ended
    inventory = look.observed.inventory
    there = {gpu.uuid: gpu for gpu in inventory.gpus}
    if inventory.error is None and not {*claim.gpus} <= there.keys():
        return replace(claim, gpus=None, instance=None)  # nobody can do anything on such a GPU
    has = {*claim.gpus}

    def is_there(one: ObservedWorkload) -> bool:
        return not has.isdisjoint(one.identity.gpus)

    alive = any(is_alive(one) and is_there(one) for one in workloads(look.observed))
    if alive or _may_run(look, is_there) or claim.instance in busy:
        return replace(claim, gone_since=None)
    if all(uuid in there and there[uuid].simulated for uuid in claim.gpus):
        return replace(claim, gpus=None, instance=None)
    waited = None if claim.gone_since is None else look.now - claim.gone_since
    found = check_release(claim.gpus, look.memory.floors, None, inventory, 0.0, waited)
    if isinstance(found, Released):
        return replace(claim, gpus=None, instance=None)
    if isinstance(found, Waiting) and found.for_memory:
        return replace(claim, gone_since=look.now if claim.gone_since is None else claim.gone_since)
    return replace(claim, gone_since=None)


def _may_run(look: Look, what: Callable[[ObservedWorkload], bool]) -> bool:
    """Whether such a workload may run unseen, of a runtime that cannot be read."""
    return any(
        view.error is not None and (view.last is None or any(map(what, view.last)))
        for view in look.observed.runtimes
    )
