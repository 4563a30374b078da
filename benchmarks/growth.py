"""How the work of one round grows with the machine: a whole look at 8, 64 and 512 GPUs.

A container with a probe runs on each, as the file asks: what is measured is the pure look (assess,
remember, reconcile, statuses), without the reading of Docker and NVML. Once nothing is to be done,
and once every one of them is to be replaced.
"""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random

from benchmarks._common import Options
from benchmarks.sheets import Cell, Outcome, Row, Sheet, Target
from mic_supervisor.plan.look import look
from tests.unit.plan.builders import CONTEXT, container, desired, gpus, on
from tests.unit.plan.world import BOOT, World

SIZES = (8, 64, 512)
MOST = 50.0  # milliseconds, at 512 GPUs
GROWTH = 1.5  # of 512 GPUs to 64, as a share of what 8 times would be


def running(count: int) -> World:
    """A world in which `count` containers are ready."""
    world = World(replace(CONTEXT, port_range=(20000, 29999)), gpus=gpus(count))
    world.desired = desired(*(on("a", index, workload=container("a:1")) for index in range(count)))
    chance = Random(1)
    while len(world.alive()) < count:
        world.round(chance)
        world.pass_time(2 * BOOT)
    world.round(chance)
    return world


def milliseconds(world: World, tries: int) -> Cell:
    taken = []
    seen = world.observe()
    for _ in range(tries):
        begun = time.process_time()
        look(world.desired, seen, world.memory, world.now, world.context, jitter=0.5)
        taken.append((time.process_time() - begun) * 1000)
    return Cell(tuple(taken), "ms")


def measure(options: Options) -> Outcome:
    idle, moving = list[Cell](), list[Cell]()
    for count in SIZES:
        world = running(count)
        assert not world.look().changes
        idle.append(milliseconds(world, 4 * options.tries))
        world.desired = desired(
            *(on("a", index, workload=container("a:2")) for index in range(count))
        )
        assert len(world.look().changes) == count
        moving.append(milliseconds(world, 4 * options.tries))
    rows = (Row("nothing to do", tuple(idle)), Row("all to be replaced", tuple(moving)))
    columns = tuple(f"{count} GPUs" for count in SIZES)
    title = "Processor time of one look"
    share = max(row[2].median / row[1].median / 8 for row in (idle, moving))
    return Outcome(
        [Sheet("growth", title, columns, rows, compares=False)],
        [
            Target("growth", f"{SIZES[2]} GPUs, nothing to do", idle[2].median, MOST, " ms"),
            Target("growth", f"{SIZES[2]} GPUs, of 8 times {SIZES[1]}", share, GROWTH),
        ],
    )
