"""What must hold once it is quiet.

- It converged within BOUND, and what runs is what the file says, seen from outside.
- At no time did an instance run twice, or a GPU have two owners.
- Nothing foreign was touched.
- Nothing of ours is left over: no container, no process.
- What was neither edited nor killed runs on, as the same process.
- The history has the beginning of each change, and none of what did not change.
- What was paused was not started, stopped or replaced before it was resumed.
- The daemon neither ended nor wrote a traceback.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from tests.chaos.machine import Machine, environment, instance, keyed
from tests.chaos.script import FIRST, SLOTS, Assignment, Entry, Storm
from tests.integration.daemon_world import Mark
from tests.support import scopes
from tests.support.waiting import until

BOUND = 90.0
"""Seconds until it has converged; an engine that hangs is given up after 15 s."""


@dataclass(frozen=True)
class Quiet:
    """What there was when it was quiet the last time."""

    assignment: Assignment
    marks: dict[str, Mark]
    foreign: list[object]
    events: frozenset[str]


def first(machine: Machine) -> Quiet:
    """What there is before any storm."""
    converge(machine, Storm(0, (), FIRST))
    events = keyed(machine.world.mic.ask("history", timeout=30)["result"])
    return Quiet(FIRST, machine.world.marks(), machine.foreign_marks(), frozenset(events))


def wanted(assignment: Assignment) -> dict[str, Entry]:
    return {
        instance(slot, entry): entry for slot, entry in enumerate(assignment) if entry is not None
    }


def tags(marks: Mapping[str, Mark]) -> dict[str, str | None]:
    """Which edit each instance runs by, seen from outside."""
    return {name: environment(mark[2]).get("TAG") for name, mark in marks.items()}


def expected(storm: Storm) -> dict[str, str]:
    return {name: str(entry.tag) for name, entry in wanted(storm.last).items()}


def converge(machine: Machine, storm: Storm) -> float:
    """Seconds until everything is as desired. It does what only a person may: resume, retry,
    and after a loss of the memory reload.
    """
    begun, asked = time.monotonic(), 0.0
    names = sorted(wanted(storm.last))

    def look() -> bool:
        nonlocal asked
        daemon = machine.world.mic.daemons[-1]
        assert daemon.process.poll() is None, f"the daemon ended by itself:\n{machine.log()}"
        status = machine.world.mic.ask("status").get("result")
        if status is None:
            return False
        if time.monotonic() - asked > 1:
            asked = time.monotonic()
            for one in status["paused"]:
                machine.world.mic.ask("resume", timeout=3, names=[str(one["gpu"]["index"])])
            if storm.has("damage the memory", "lose the memory"):
                machine.world.mic.ask("reload", timeout=3)
            for row in status["instances"]:
                # A start that the storm killed counts as a failed one, where the memory is lost.
                if row["phase"] in ("backoff", "degraded"):
                    machine.world.mic.ask("retry", timeout=1, name=row["id"])
        return (
            sorted(row["id"] for row in status["instances"]) == names
            and all(
                row["phase"] == "unprobed" and row["sync"] == "in_sync"
                for row in status["instances"]
            )
            # An edit that was made a moment ago may not have been read yet.
            and tags(machine.world.marks()) == expected(storm)
        )

    try:
        until(look, "everything to be as desired", timeout=BOUND, period=0.1)
    except AssertionError as error:
        status = machine.world.mic.ask("status").get("result", {})
        keys = ("id", "phase", "sync", "reason")
        rows = [[row[key] for key in keys] for row in status.pop("instances", ())]
        status.pop("gpus", None)
        error.add_note(f"wanted: {names}; there are: {rows}; {json.dumps(status)}")
        raise
    return time.monotonic() - begun


def paused(machine: Machine, storm: Storm) -> None:
    """Before anything is undone: what is paused is what it was, or was killed."""
    if storm.has("fill the disk", "damage the memory", "lose the memory"):
        return  # a pause that could not be kept
    for slot, before in machine.paused.items():
        for run in machine.on_slot(slot):
            assert run in before, f"{SLOTS[slot]} is paused, and {run} was started"


def judge(machine: Machine, storm: Storm, before: Quiet) -> Quiet:
    """Raises AssertionError with what does not hold."""
    world, driver = machine.world, machine.driver
    assert driver.doubled == [], "two owners at a time"
    assert driver.looks_on, "the machine was not looked at any more"
    foreign = machine.foreign_marks()
    assert foreign == before.foreign, "what is foreign was touched"

    marks = world.marks()
    assert tags(marks) == expected(storm), f"{tags(marks)} runs, not {expected(storm)}"
    # What has ended is removed in the round after everything is as desired.
    left = partial(leftovers, machine, marks)
    until(lambda: not left(), f"an end of what is left over: {left()}", timeout=10)

    touched = storm.touched(before.assignment)
    for slot, entry in enumerate(before.assignment):
        if entry is not None and slot not in touched:
            name = instance(slot, entry)
            assert marks[name] == before.marks[name], f"{name} was restarted, and did not change"

    events = keyed(world.mic.ask("history", timeout=30)["result"])
    kinds: dict[str, Counter[str]] = {"begin": Counter(), "done": Counter()}
    for key, event in events.items():
        if key not in before.events and event["kind"] in kinds:
            kinds[event["kind"]][str(event["instance"])] += 1
    begun, done = kinds["begin"], kinds["done"]
    changed = {
        name
        for name in marks.keys() | before.marks.keys()
        if marks.get(name) != before.marks.get(name)
    }
    if not storm.has("fill the disk"):  # what a full disk did not take is told by no history
        # What was killed, and is not wanted any more, may be over before anybody looked at it.
        killed = {act.slot for act in storm.acts if act.kind == "kill an instance"}
        ended = {instance(n, one) for n, one in enumerate(before.assignment) if one and n in killed}
        unexplained = changed - begun.keys() - done.keys() - (ended - marks.keys())
        assert not unexplained, f"the history does not say why these changed: {unexplained}"
    # The end of a change may come after the last look at the history: what it removed was gone.
    of_touched = {instance(slot, Entry(runtime, 0)) for slot in touched for runtime in ("c", "p")}
    assert begun.keys() <= of_touched, f"the history has changes of what did not change: {begun}"
    for daemon in world.mic.daemons[-20:]:
        assert "Traceback" not in daemon.text(), f"{daemon.log} has a traceback"
    return Quiet(storm.last, marks, foreign, frozenset(events))


def leftovers(machine: Machine, marks: dict[str, Mark]) -> list[str]:
    """What of ours there is but what runs, and one ended predecessor of each at most."""
    world, found = machine.world, list[str]()
    assert world.engine is not None
    running = {mark[0] for mark in marks.values()}
    ended = Counter[str]()
    for item in scopes.containers(world.engine, world.mic.scope):
        name = item["Labels"]["io.mic.instance"]
        if item["Id"] not in running:
            ended[name] += 1
            if name not in marks or ended[name] > 1:
                found.append(f"a container of {name}: {item['State']}")
    pids = {mark[2] for mark in marks.values()}
    for pid in scopes.processes(world.mic.scope):
        if "TAG" in environment(pid) and scopes.runs(pid) and pid not in pids:
            found.append(f"PID {pid}: {environment(pid)}")
    return found
