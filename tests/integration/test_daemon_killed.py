"""kill -9 of the supervisor, again and again, in the middle of what it does.

Most of the kills come between the beginning and the end of an action, while the file changes. Seen
from outside, all the time: no GPU has two holders, nothing is left over, and what did not change
runs on as it was.

KILLS in the environment sets how often. A change of the loop or of a runtime deserves 50.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import docker
import pytest

from tests.integration.daemon_world import (
    DaemonWorld,
    container,
    daemon_world,
    identity,
    process,
)
from tests.integration.gpu_watcher import Watcher
from tests.support import scopes
from tests.support.mic import Daemon
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KILLS = int(os.environ.get("KILLS", "15"))
IN_FLIGHT = KILLS * 3 // 5
SECONDS = 8.0 * KILLS  # more rounds than KILLS are made where the aim was bad, but not for longer

STEADY = {0: "c", 1: "p"}
KEPT = [identity("c", 0), identity("p", 1)]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient, busybox_image: str
) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path_factory.mktemp("killed"), engine) as made:
        made.models = {"p": process(), "c": container("stop_timeout: 2s")}
        yield made


def in_flight(daemon: Daemon) -> bool:
    """Whether its log has the beginning of an action and not its end."""
    open_: dict[str, int] = {}
    for line in daemon.text().splitlines():
        words = line.split()
        if len(words) < 5 or words[2] not in ("INFO", "WARNING"):
            continue
        instance, verb, rest = words[3].rstrip(":"), words[4].rstrip(":"), words[5:6]
        if verb not in ("create", "start", "restart", "replace", "remove", "stop"):
            continue
        if rest and rest[0] in ("done", "failed"):
            open_[instance] = open_.get(instance, 0) - 1
        else:
            open_[instance] = open_.get(instance, 0) + 1
    return any(count > 0 for count in open_.values())


def test_kills_cost_no_instance(world: DaemonWorld) -> None:
    chance = random.Random(7)
    world.write({**STEADY, 2: "c", 3: "p"})
    world.mic.run(http=False)
    names = [*KEPT, identity("c", 2), identity("p", 3)]
    world.converged(*names)
    before = world.marks()
    kills = caught = 0
    end = time.monotonic() + SECONDS
    with Watcher(world) as watcher:
        while (kills < KILLS or caught < IN_FLIGHT) and time.monotonic() < end:
            turn = kills
            models = chance.choice([("c", "p"), ("p", "c"), ("a", "b"), ("b", "a"), ("none", "a")])
            world.write(
                {**STEADY, 2: models[0], 3: models[1]},
                a=container("stop_timeout: 2s", f"env: {{TURN: '{turn}'}}"),
                b=process().replace("100000", str(100000 + turn)),
            )
            daemon = world.mic.daemons[-1]
            wait_for_an_action(daemon, chance)
            daemon.process.kill()
            daemon.process.wait()
            kills += 1
            caught += in_flight(daemon)
            world.mic.start("run")
        print(f"{kills} kills, {caught} of them in an action, {watcher.looks} looks")

        # Without help it comes to rest, and is then as the file says.
        final = {**STEADY, 2: "a", 3: "b"}
        world.write(final)
        until(lambda: "result" in world.mic.ask("status"), "the last daemon")
        began = time.monotonic()
        world.converged(*KEPT, identity("a", 2), identity("b", 3), timeout=60)
        print(f"at rest {time.monotonic() - began:.1f} s after the last edit")
    assert kills >= KILLS
    assert caught >= IN_FLIGHT
    assert watcher.doubled == []
    assert watcher.looks > kills

    after = world.marks()
    assert {name: after[name] for name in KEPT} == {name: before[name] for name in KEPT}
    assert len(after) == 4
    no_orphans(world)


def wait_for_an_action(daemon: Daemon, chance: random.Random) -> None:
    """Until something is being done, and a little longer; by chance, not even so long."""
    if chance.random() < 0.15:
        time.sleep(chance.uniform(0.3, 2.0))
        return
    end = time.monotonic() + 8
    while not in_flight(daemon) and daemon.process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(chance.choice([0.0, 0.01, 0.03, 0.08, 0.15, 0.3]))


def no_orphans(world: DaemonWorld) -> None:
    """Nothing of ours is there but what runs, and an ended predecessor at most."""
    assert world.engine is not None
    engine, wanted = world.engine, {identity("c", 0), identity("a", 2)}

    def there() -> set[str]:
        found = scopes.containers(engine, world.mic.scope)
        return {one["Labels"]["io.mic.instance"] for one in found}

    # One that has ended and is not desired has no row, while it is removed.
    until(lambda: there() == wanted, "an end of what is left over")
    containers = scopes.containers(engine, world.mic.scope)
    by_instance: dict[str, list[str]] = {}
    for item in containers:
        by_instance.setdefault(item["Labels"]["io.mic.instance"], []).append(item["State"])
    assert sorted(by_instance) == sorted([identity("c", 0), identity("a", 2)])
    for states in by_instance.values():
        assert states.count("running") == 1
        assert len(states) <= 2
    assert [name for _, name in foreign_workloads(world)] == []


def foreign_workloads(world: DaemonWorld) -> list[tuple[int, str]]:
    """Processes of the scope that are neither the daemon, nor a keeper's, nor an instance's."""
    running = {mark[2] for mark in world.marks().values()}
    found = []
    for pid in scopes.processes(world.mic.scope):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123 - may be gone
                command = file.read().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if (
            pid not in running | {os.getpid(), world.mic.daemons[-1].pid}
            and "/bin/sleep" in command
        ):
            found.append((pid, command))
    return found
