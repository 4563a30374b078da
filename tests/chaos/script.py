"""Which disturbances come, in which order. It depends on the seed and on nothing else.

So a seed that failed gives the same storms again. What the machine makes of them differs: when a
kill comes, an action may have ended that was under way the last time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

SLOTS = ("0", "1", "2", "3,4")
"""Keys of the file: two indices, and one instance over two GPUs."""

Kind = Literal[
    "kill the daemon",
    "kill an instance",
    "edit",
    "edit to one that fails",
    "break the file",
    "cut the file",
    "pause",
    "foreign process",
    "lose a GPU",
    "hang the driver",
    "set the clock",
    "fill the disk",
    "damage the memory",
    "lose the memory",
    "cut the engine",
    "slow the engine",
    "hold the engine",
    "have the engine answer 500",
]

_WEIGHTS: dict[Kind, int] = {
    "kill the daemon": 6,
    "kill an instance": 6,
    "edit": 8,
    "edit to one that fails": 2,
    "break the file": 2,
    "cut the file": 2,
    "pause": 3,
    "foreign process": 3,
    "lose a GPU": 2,
    "hang the driver": 1,
    "set the clock": 2,
    "fill the disk": 2,
    "damage the memory": 2,
    "lose the memory": 1,
    "cut the engine": 3,
    "slow the engine": 2,
    "hold the engine": 3,
    "have the engine answer 500": 2,
}
HELD_CALLS = (
    "GET .*/containers/json",
    "GET .*/containers/[^/]+/json",
    "POST .*/containers/create",
    "POST .*/start",
    "POST .*/stop",
    "DELETE .*/containers/",
)
"""What "hold the engine" picks from, by its place."""


@dataclass(frozen=True)
class Entry:
    """What runs on a slot: a container ("c") or a host process ("p"), of one specification."""

    runtime: Literal["c", "p"]
    tag: int
    fails: bool = False


Assignment = tuple[Entry | None, ...]
"""For each slot; None keeps it empty."""


@dataclass(frozen=True)
class Act:
    """One disturbance.

    `slot` is whom it meets, by its place in SLOTS. `to` is the whole assignment after an edit.
    `amount` is seconds, or the place in a list; `after` are seconds until the next one comes.
    """

    kind: Kind
    slot: int
    amount: int
    after: float
    to: Assignment | None = None

    def __str__(self) -> str:
        where = {
            "kill an instance": f" on {SLOTS[self.slot]}",
            "pause": f" {SLOTS[self.slot]}",
            "foreign process": f" on {SLOTS[self.slot]}",
            "lose a GPU": f" {SLOTS[self.slot]}",
            "hold the engine": f" at {HELD_CALLS[self.amount % len(HELD_CALLS)]}",
        }.get(self.kind, "")
        to = "" if self.to is None else f" {SLOTS[self.slot]} to {_shown(self.to[self.slot])}"
        return f"{self.kind}{where}{to}, {self.after:.2f} s"


@dataclass(frozen=True)
class Storm:
    """`last` is the assignment that the file has when everything is undone."""

    number: int
    acts: tuple[Act, ...]
    last: Assignment

    def has(self, *kinds: Kind) -> bool:
        return any(act.kind in kinds for act in self.acts)

    def touched(self, before: Assignment) -> frozenset[int]:
        """The slots whose instances may be other ones afterwards: edited, or killed."""
        edited = {act.slot for act in self.acts if act.to is not None}
        killed = {act.slot for act in self.acts if act.kind == "kill an instance"}
        changed = {slot for slot, entry in enumerate(self.last) if entry != before[slot]}
        return frozenset(edited | killed | changed)


def _shown(entry: Entry | None) -> str:
    return "none" if entry is None else f"{entry.runtime}{entry.tag}{'!' * entry.fails}"


FIRST: Assignment = (Entry("c", 0), Entry("p", 0), Entry("c", 0), Entry("p", 0))


def storms(seed: int) -> Iterator[Storm]:
    """For ever. Slot 0 is edited in no storm of three, so that something is always to be kept."""
    chance = random.Random(seed)
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    now, tag, number = FIRST, 0, 0
    while True:
        number += 1
        acts: list[Act] = []
        for kind in chance.choices(kinds, weights, k=chance.randint(3, 7)):
            slot, amount = chance.randrange(len(SLOTS)), chance.randrange(1000)
            after = chance.choice([0.0, 0.05, 0.2, 0.5, 1.0, 2.0])
            empty, runtime = chance.random() < 0.15, chance.choice(["c", "p"])
            to = None
            if kind in ("edit", "edit to one that fails"):
                slot = slot if slot or number % 3 == 0 else 1
                tag += 1
                entry = Entry(
                    "c" if runtime == "c" else "p", tag, fails=kind == "edit to one that fails"
                )
                now = to = _with(now, slot, None if empty and not entry.fails else entry)
            acts.append(Act(kind, slot, amount, after, to))
        for slot, found in enumerate(now):
            if found is not None and found.fails:
                tag += 1
                now = _with(now, slot, replace(found, tag=tag, fails=False))
        yield Storm(number, tuple(acts), now)


def _with(assignment: Assignment, slot: int, entry: Entry | None) -> Assignment:
    return (*assignment[:slot], entry, *assignment[slot + 1 :])
