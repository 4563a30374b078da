"""kill -9 of the supervisor while what it asked for is in flight: the engine goes on with that.

An engine has a container listed as created, or exited, until its start has come to an end. Seen
from outside, every 50 ms: no GPU has two holders, no port moves, and no specification is given up.

KILLS in the environment sets how often. A change of how starts are followed deserves 300.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator

import docker
import pytest

from tests.integration.daemon_world import (
    DaemonWorld,
    daemon_world,
    identity,
)
from tests.integration.gpu_watcher import GpuWatcher
from tests.support import scopes
from tests.support.mic import Daemon
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KILLS = int(os.environ.get("KILLS", "20"))
GPUS = 4
CONTAINERS = 3


@pytest.fixture
def world(
    tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient, busybox_image: str
) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path_factory.mktemp("starts"), engine, gpus=GPUS) as made:
        yield made


def write(world: DaemonWorld, turns: list[int]) -> None:
    """Containers that publish a port, and a process; each is another one at each of its turns."""
    models = {}
    for index, turn in enumerate(turns):
        env = f'{{HOLDS: "${{gpu_uuids}}", EYE: "{world.mic.scope}", TURN: "{turn}"}}'
        models[f"m{index}"] = (
            f'{{backend: container, image: "mic-test/busybox:1", stop_timeout: 2s, env: {env}, '
            'command: [httpd, -f, -p, "${port}"]}'
            if index < CONTAINERS
            else f'{{backend: process, command: [/bin/sleep, "100000"], env: {env}}}'
        )
    world.write(dict(enumerate(models)), **models)


def test_kills_during_starts_make_no_second_holder_of_a_gpu(world: DaemonWorld) -> None:
    """Some starts are of a new container, some of an ended one; the file may change meanwhile."""
    assert world.engine is not None
    chance = random.Random(11)
    turns = [0] * GPUS
    names = [identity(f"m{index}", index) for index in range(GPUS)]
    write(world, turns)
    world.mic.run(http=False)
    world.converged(*names)
    ports: dict[str, set[str]] = {}
    failed: list[str] = []
    caught = 0
    with GpuWatcher(f"EYE={world.mic.scope}") as eye:
        for _ in range(KILLS):
            daemon = world.mic.daemons[-1]
            begun = begins(daemon)
            if chance.random() < 0.6:
                for index in chance.sample(range(GPUS), chance.randint(1, GPUS)):
                    turns[index] += 1
                write(world, turns)
            else:
                crash(world, chance)
            end = time.monotonic() + 4
            while begins(daemon) == begun and time.monotonic() < end:
                time.sleep(0.003)
            time.sleep(chance.uniform(0.0, 0.6))
            daemon.process.kill()
            daemon.process.wait()
            caught += any(
                item["State"] == "created"
                for item in scopes.containers(world.engine, world.mic.scope)
            )
            if chance.random() < 0.3:
                turns[chance.randrange(GPUS)] += 1
                write(world, turns)
            note_ports(world, ports)
            failed += given_up(world)
            world.mic.start("run")
            until(lambda: "result" in world.mic.ask("status"), "the next daemon")
            time.sleep(chance.uniform(0.2, 1.2))
        world.converged(*names, timeout=90)
        note_ports(world, ports)
        failed += given_up(world)
    moved = {name: found for name, found in ports.items() if len(found) > 1}
    doubled, seconds = summary(eye.doubled, eye.PAUSE)
    print(
        f"{KILLS} kills, {caught} with a container listed as created, {len(eye.runs)} runs, "
        f"{eye.looks} looks; doubled {len(doubled)} times, {seconds:.1f} s in all; "
        f"ports moved: {len(moved)}; specifications given up: {len(set(failed))}"
    )
    assert doubled == []
    assert moved == {}
    assert failed == []
    assert eye.looks > KILLS
    for states in by_instance(world).values():
        assert states.count("running") == 1
        assert len(states) <= 2


def begins(daemon: Daemon) -> int:
    text = daemon.text()
    return sum(text.count(f": {verb}: ") for verb in ("create", "start", "replace", "restart"))


def crash(world: DaemonWorld, chance: random.Random) -> None:
    """Ends one or two, from outside: of those that have served, so that it is no specification's
    failure.
    """
    assert world.engine is not None
    served = {
        name
        for name, row in world.rows().items()
        if (row["phase"], row["sync"]) == ("unprobed", "in_sync")
    }
    running = [
        item["Id"]
        for item in scopes.containers(world.engine, world.mic.scope)
        if item["State"] == "running" and item["Labels"]["io.mic.instance"] in served
    ]
    for ref in chance.sample(running, min(len(running), 2)):
        try:
            world.engine.kill(ref)
        except docker.errors.APIError:
            continue  # it has just ended


def note_ports(world: DaemonWorld, ports: dict[str, set[str]]) -> None:
    assert world.engine is not None
    for item in scopes.containers(world.engine, world.mic.scope):
        labels = item["Labels"]
        ports.setdefault(labels["io.mic.instance"], set()).add(labels["io.mic.ports"])


def given_up(world: DaemonWorld) -> list[str]:
    """What the memory on disk calls failed."""
    path = world.mic.state_dir / world.mic.scope / "memory.json"
    found = json.loads(path.read_text())["instances"]
    return [
        f"{name}: {entry['failed_reason']}" for name, entry in found.items() if entry.get("failed")
    ]


def by_instance(world: DaemonWorld) -> dict[str, list[str]]:
    assert world.engine is not None
    found: dict[str, list[str]] = {}
    for item in scopes.containers(world.engine, world.mic.scope):
        found.setdefault(item["Labels"]["io.mic.instance"], []).append(item["State"])
    return found


def summary(doubled: list[str], pause: float) -> tuple[list[str], float]:
    return sorted(set(doubled)), len(doubled) * pause
