"""Whatever happens to a machine, it ends as the file says, and nothing is touched in vain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_supervisor.converge.observe import LastViews
from mic_supervisor.model import DesiredState, Instance, Port
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import Restart, Start, Step
from mic_supervisor.plan.assess import Context
from mic_supervisor.plan.memory import Memory
from tests.support.examples import examples
from tests.unit.plan.builders import (
    CONTEXT,
    container,
    desired,
    on,
    placement,
    program,
    reread,
    uuid,
)
from tests.unit.plan.world import Box, Killed, World

ROUNDS = 40
GPUS = 4
RUNTIMES = ("subprocess", "systemd")


# --- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """What a file may say of four GPUs. `slots` names a model for each, "-" for `none` and "" for
    a GPU that is not listed; a "Q" makes its GPU and the next one a group.
    """

    slots: tuple[str, str, str, str]
    version: int = 1
    count: int = 8
    bad: bool = False

    def desired(self) -> DesiredState:
        found: list[Instance] = []
        empty: list[str] = []
        index = 0
        while index < GPUS:
            name = self.slots[index]
            group = name == "Q" and index + 1 < GPUS
            if name == "-":
                empty.append(uuid(index))
            elif name:
                found.append(self._instance(name, *((index, index + 1) if group else (index,))))
            index += 2 if group else 1
        return desired(*found, kept_empty=tuple(empty))

    def _instance(self, name: str, *indices: int) -> Instance:
        image = f"{name}:{'bad' if self.bad else self.version}"
        if name == "P":
            return on(name, *indices, workload=program("/opt/p", image))
        if name == "S":
            server = on(name, *indices, workload=container("server:1"))
            return replace(server, placements=(placement("S", indices[0], self.count),))
        if name == "F":  # a fixed port fits one instance: the first GPU's
            ports = (Port("http", 9000 + indices[0] // 2),)
            return on(name, *indices, workload=container(image, ports=ports))
        return on(name, *indices, workload=container(image))


SLOT = st.sampled_from(["A", "A", "B", "S", "P", "Q", "F", "-", ""])
FILES = st.builds(
    File,
    st.tuples(SLOT, SLOT, SLOT, SLOT).filter(lambda slots: slots.count("F") < 2),
    version=st.integers(1, 2),
    count=st.sampled_from([4, 8]),
)


# --- trouble ----------------------------------------------------------------------------------


@dataclass
class Trouble:
    """Makes things fail, and keeps account of the instances that have a reason to be touched."""

    world: World
    chance: Random
    touched: set[str] = field(default_factory=set)
    rate: float = 0.0

    def fails(self, step: Step) -> str | None:
        if self.chance.random() >= self.rate:
            return None
        self.touched.add(step.instance)
        return f"{type(step).__name__} was made to fail"

    def dies(self, box: Box) -> bool:
        bad = getattr(box.launch.spec, "image", "").endswith(":bad")
        if bad or self.chance.random() < self.rate / 2:
            self.touched.add(box.instance)
            return True
        return False

    def between(self, step: Step) -> None:
        if self.rate and self.chance.random() < self.rate / 4:
            if isinstance(step, Start | Restart) and self.chance.random() < 0.7:
                self.world.fly(step)
            raise Killed
        if self.rate and self.chance.random() < self.rate / 4:
            self.hit(self.world.kill)

    def hit(self, blow: Callable[[Box], None]) -> None:
        """One of those that run, by chance."""
        running = self.world.alive()
        if running:
            box = self.chance.choice(running)
            self.touched.add(box.instance)
            blow(box)

    def touch(self, before: DesiredState, after: DesiredState) -> None:
        """Whatever is not the same in both files, or shares a GPU with what is not."""
        was = {item.id: item for item in before.instances}
        will = {item.id: item for item in after.instances}
        self.touched |= {i for i in was.keys() | will.keys() if was.get(i) != will.get(i)}


EVENTS = (
    *("kill", "erase", "hang", "no docker", "no processes", "no nvml", "stranger", "listener"),
    *("restart", "lose memory", "calm", "storm", "wait"),
)


def happen(world: World, trouble: Trouble, event: str | File) -> None:
    if isinstance(event, File):
        new = event.desired()
        trouble.touch(world.desired, new)
        world.desired = new
    elif event == "kill":
        trouble.hit(world.kill)
    elif event == "erase":
        trouble.hit(world.erase)
    elif event == "hang":
        trouble.hit(lambda box: setattr(box, "hung", True))
    elif event in ("no docker", "no processes", "no nvml"):
        name = {"no docker": "docker", "no nvml": "nvml"}.get(event, world.context.process_runtime)
        world.unreadable ^= {name}
    elif event == "stranger":
        free = [gpu.uuid for gpu in world.gpus]
        world.foreign ^= {trouble.chance.choice(free)}
    elif event == "listener":
        used = {port for box in world.alive() for port in box.launch.identity.ports.values()}
        world.listening ^= {trouble.chance.randrange(20000, 20009)} - used
    elif event == "restart":
        world.memory, world.last_views = reread(world.memory), LastViews()
    elif event == "lose memory":
        world.memory = Memory(unexplained={})
    elif event in ("calm", "storm"):
        trouble.rate = 0.3 if event == "storm" else 0.0
    else:
        world.pass_time(60.0)


def rounds(world: World, chance: Random, count: int = 1) -> None:
    for _ in range(count):
        saved = world.memory
        try:
            world.round(chance)
        except Killed:
            world.memory = saved  # what it had noted since the round began is lost
            world.last_views = LastViews()
        world.pass_time(chance.choice([0.5, 3.0, 30.0]))


def world_of(file: File, runtime: str, seed: int, rate: float = 0.0) -> tuple[World, Trouble]:
    """A machine on which nothing runs yet."""
    context: Context = replace(CONTEXT, process_runtime=runtime)
    world = World(context, desired=file.desired())
    trouble = Trouble(world, Random(seed), rate=rate)
    world.fails, world.dies, world.between = trouble.fails, trouble.dies, trouble.between
    return world, trouble


def pids(world: World) -> dict[str, int | None]:
    return {box.instance: box.pid for box in world.alive()}


def check_converged(world: World) -> None:
    """Exactly what the file names runs, once each."""
    wanted = {item.id: item for item in world.desired.instances}
    running = world.alive()
    assert sorted(box.instance for box in running) == sorted(wanted)
    for box in running:
        assert box.launch.identity.gpus == wanted[box.instance].gpus
        digests = {item.model: item.digest for item in wanted[box.instance].placements}
        assert {model: digest for model, (digest, _) in box.loaded.items()} == digests
    kept = {box.instance for box in world.boxes.values() if not box.alive}
    assert kept <= wanted.keys()
    assert len(world.boxes) <= 2 * len(wanted)


# --- tests ------------------------------------------------------------------------------------


@settings(max_examples=examples(60))
@given(FILES, st.sampled_from(RUNTIMES), st.integers(0, 2**32))
def test_an_empty_machine_converges_and_stays_so(file: File, runtime: str, seed: int) -> None:
    world, trouble = world_of(file, runtime, seed)
    assert world.converge(trouble.chance, 8) <= 4
    check_converged(world)
    before = pids(world)
    for event in ("restart", "lose memory", "wait"):
        happen(world, trouble, event)
        plan = world.round(trouble.chance)
        assert plan.count == 0
    assert pids(world) == before


@settings(max_examples=examples(150))
@given(
    FILES,
    st.lists(st.one_of(st.sampled_from(EVENTS), FILES), max_size=14),
    FILES,
    st.sampled_from(RUNTIMES),
    st.integers(0, 2**32),
)
def test_a_machine_converges_after_any_trouble(
    first: File, events: list[str | File], last: File, runtime: str, seed: int
) -> None:
    world, trouble = world_of(first, runtime, seed, rate=0.2)
    for event in events:
        happen(world, trouble, event)
        rounds(world, trouble.chance)
    trouble.rate = 0.0
    world.foreign.clear()
    world.listening.clear()
    world.unreadable.clear()
    happen(world, trouble, last)
    world.memory = ledger.explained(world.memory)  # as who applies the file says
    world.converge(trouble.chance, ROUNDS)
    check_converged(world)
    before = pids(world)
    for _ in range(3):
        world.pass_time(700.0)
        assert world.round(trouble.chance).empty
    assert pids(world) == before


@settings(max_examples=examples(150))
@given(
    FILES,
    st.lists(st.one_of(st.sampled_from(EVENTS), FILES), max_size=14),
    st.sampled_from(RUNTIMES),
    st.integers(0, 2**32),
)
def test_what_nothing_happened_to_is_never_restarted(
    first: File, events: list[str | File], runtime: str, seed: int
) -> None:
    world, trouble = world_of(first, runtime, seed)
    world.converge(trouble.chance, 6)
    before = pids(world)
    for event in events:
        happen(world, trouble, event)
        rounds(world, trouble.chance)
    after = pids(world)
    for instance in before.keys() - trouble.touched:
        assert after.get(instance) == before[instance], f"{instance} was touched in vain"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bad_version_is_rolled_back_and_the_machine_serves_on(runtime: str) -> None:
    good = File(("A", "A", "B", ""))
    world, trouble = world_of(good, runtime, 1)
    world.converge(trouble.chance, 6)
    happen(world, trouble, replace(good, bad=True))
    for _ in range(30):
        rounds(world, trouble.chance)
    plan = world.look()
    assert plan.count == 0
    assert [item.instance for item in plan.blocked] == [
        "A-aaaaaaaa",
        "A-bbbbbbbb",
        "B-cccccccc",
    ]
    assert {getattr(box.launch.spec, "image", "") for box in world.alive()} == {"A:1", "B:1"}
    happen(world, trouble, replace(good, version=2))
    world.converge(trouble.chance, ROUNDS)
    assert {getattr(box.launch.spec, "image", "") for box in world.alive()} == {"A:2", "B:2"}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_workload_that_always_crashes_is_tried_ever_more_slowly(runtime: str) -> None:
    world, trouble = world_of(File(("A", "P", "", "")), runtime, 1)
    world.dies = lambda box: True
    starts: list[float] = []
    for _ in range(2000):
        count = len(world.log)
        world.round(trouble.chance)
        starts += [world.now for line in world.log[count:] if " start mic-test-P" in line]
        world.pass_time(1.0)
    pauses = [b - a for a, b in pairwise(starts)]
    assert pauses[0] < 2.5
    assert pauses[1] == pytest.approx(6.0, abs=2.0)
    assert pauses[2] == pytest.approx(11.0, abs=2.0)
    assert pauses[-1] > 290.0
    assert len(starts) < 16


def test_one_model_rolls_one_gpu_at_a_time_and_the_others_serve_meanwhile() -> None:
    world, trouble = world_of(File(("A", "A", "A", "A")), "subprocess", 1)
    world.converge(trouble.chance, 6)
    happen(world, trouble, File(("A", "A", "A", "A"), version=2))
    for _ in range(40):
        rounds(world, trouble.chance)
        up = [
            box
            for box in world.alive()
            if box.started_at is not None and world.now - box.started_at >= 20.0
        ]
        assert len(up) >= 3
    assert {getattr(box.launch.spec, "image", "") for box in world.alive()} == {"A:2"}


def test_a_stop_that_gets_stuck_holds_its_gpu_and_nothing_else() -> None:
    world, trouble = world_of(File(("A", "B", "", "")), "subprocess", 1)
    world.converge(trouble.chance, 6)
    old = world.alive("A-aaaaaaaa")[0]
    world.fails = lambda step: "it does not end" if step.id == f"stop {old.launch.name}" else None
    happen(world, trouble, File(("B", "S", "", "")))
    for _ in range(10):
        rounds(world, trouble.chance)
    assert sorted(pids(world)) == ["A-aaaaaaaa", "S-bbbbbbbb"]
    world.fails = lambda step: None
    world.converge(trouble.chance, ROUNDS)
    check_converged(world)


def test_changes_are_made_in_place_where_they_can_be() -> None:
    world, trouble = world_of(File(("S", "", "", "")), "subprocess", 1)
    world.converge(trouble.chance, 6)
    before = pids(world)
    happen(world, trouble, File(("S", "", "", ""), count=4))
    world.converge(trouble.chance, 6)
    assert pids(world) == before
    assert world.alive()[0].loaded["S"][0] == "digest-S-4"


def test_the_file_that_is_applied_twice_changes_nothing_the_second_time() -> None:
    file = File(("Q", "Q", "P", "F"))
    world, trouble = world_of(file, "systemd", 1)
    world.converge(trouble.chance, 6)
    world.desired = file.desired()
    assert world.look().empty
