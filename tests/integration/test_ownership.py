"""Copies of our containers and processes: named, left alone, and never in the way of the original.

Every copy here is made as people make one: committed, run from a script with the same labels,
renamed, or restored under the old name.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.integration.daemon_world import DaemonWorld, container, daemon_world, identity, process
from tests.integration.docker_world import docker as client
from tests.support import scopes
from tests.support.waiting import until

pytestmark = pytest.mark.engine

C0 = identity("c", 0)
P0 = identity("p", 0)
ROUNDS = 4


@pytest.fixture
def world(tmp_path: Path, engine: docker.APIClient, busybox_image: str) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path, engine) as made:
        made.write({0: "c"}, c=container())
        made.mic.run(http=False)
        made.converged(C0)
        yield made


def one(world: DaemonWorld) -> dict[str, Any]:
    """What the engine lists of the only container of the scope."""
    assert world.engine is not None
    (found,) = scopes.containers(world.engine, world.mic.scope)
    return found


def name_of(item: dict[str, Any]) -> str:
    return str(item["Names"][0]).removeprefix("/")


def everything(world: DaemonWorld) -> dict[str, tuple[str, str]]:
    """Id -> (name, when it was started) of every running container of the scope."""
    assert world.engine is not None
    found = {}
    for item in scopes.containers(world.engine, world.mic.scope):
        try:
            looked = world.engine.inspect_container(item["Id"])
        except docker.errors.NotFound:
            continue  # removed since it was listed
        if looked["State"]["Running"]:
            found[item["Id"]] = (name_of(item), looked["State"]["StartedAt"])
    return found


def rounds(world: DaemonWorld) -> None:
    """Has the daemon look at the machine several times, by applying the same file."""
    for _ in range(ROUNDS):
        world.mic("apply", rc=0)


@contextmanager
def committed(ref: str, tag: str) -> Iterator[str]:
    client("commit", ref, tag)
    try:
        yield tag
    finally:
        subprocess.run(["docker", "rmi", "-f", tag], check=False, capture_output=True, timeout=60)


def labels_of(item: dict[str, Any]) -> list[str]:
    return [f"--label={key}={value}" for key, value in item["Labels"].items()]


def planned_for_none(world: DaemonWorld) -> str:
    """The plan for a file that the daemon does not watch: it would act at once."""
    path = world.mic.home / "other.yaml"
    path.write_text(world.text({0: "none"}))
    return world.mic("plan", path, rc=0).stdout


def warnings(world: DaemonWorld) -> list[str]:
    found: list[str] = world.mic("plan", "--json", rc=0).json()["warnings"]
    return found


def test_a_committed_copy_is_named_and_nothing_else(world: DaemonWorld) -> None:
    """The serving container stays, under the daemon, for the command line and for `none`."""
    original = one(world)
    with committed(original["Id"], f"mic-test/{world.mic.scope}:1") as image:
        copy = client("run", "-d", "--init", "--name", f"{world.mic.scope}-copy",
                      "--entrypoint", "/bin/sh", image, "-c", "sleep 600")  # fmt: skip
        before = everything(world)
        assert {*before} == {original["Id"], copy}
        rounds(world)
        assert everything(world) == before
        world.converged(C0)
        said = (
            f"docker {world.mic.scope}-copy looks like ours and is not: "
            "its labels are those of its image, which was made from a container of ours"
        )
        plan = world.mic("plan", rc=0).stdout
        assert f"warning: {said}\n" in plan
        assert "No changes" in plan
        assert copy not in world.mic("gpus", "--json", rc=0).stdout
        # The operator's own container outlives the entry.
        planned = planned_for_none(world)
        assert f"    removes {name_of(original)}\n" in planned
        assert "-copy\n" not in planned
        world.write({0: "none"})
        world.mic("apply", rc=0)
        rounds(world)
        assert everything(world) == {copy: before[copy]}
        # And a container of ours comes back beside it.
        world.write({0: "c"})
        world.mic("apply", rc=0)
        assert everything(world)[copy] == before[copy]
        assert len(everything(world)) == 2


def test_a_copy_under_the_very_name_is_neither_adopted_nor_started_nor_removed(
    world: DaemonWorld,
) -> None:
    original = one(world)
    with committed(original["Id"], f"mic-test/{world.mic.scope}:2") as image:
        world.write({0: "none"})
        world.mic("apply", rc=0)
        copy = client("run", "-d", "--init", "--name", name_of(original),
                      "--entrypoint", "/bin/sh", image, "-c", "sleep 600")  # fmt: skip
        before = everything(world)
        world.write({0: "c"})
        done = world.mic("apply")
        assert done.rc != 0
        assert f"the name {name_of(original)} is taken" in done.stdout + done.stderr, done
        rounds_ = [world.mic("apply").rc for _ in range(ROUNDS)]
        assert 0 not in rounds_
        assert everything(world) == before
        client("rename", copy, f"{world.mic.scope}-mine")
        world.converged(C0)
        assert everything(world)[copy][1] == before[copy][1]


def test_a_copied_run_script_is_named_and_nothing_else(world: DaemonWorld) -> None:
    original = one(world)
    copy = client("run", "-d", "--init", "--name", f"{world.mic.scope}-script",
                  *labels_of(original), "mic-test/busybox:1", "sleep", "600")  # fmt: skip
    before = everything(world)
    rounds(world)
    assert everything(world) == before
    assert (
        f"docker {world.mic.scope}-script looks like ours and is not: it has the labels of "
        f"{name_of(original)}, and another name: it is a copy"
    ) in warnings(world)
    world.mic.daemons[-1].stop()
    # Nor is it by a daemon that remembers nothing.
    for path in world.mic.state_dir.rglob("memory.json"):
        path.unlink()
    world.mic.run(http=False)
    world.converged(C0)
    rounds(world)
    assert everything(world) == before
    assert {*before} == {original["Id"], copy}


def test_what_somebody_renames_is_still_ours(world: DaemonWorld) -> None:
    original = one(world)
    began = everything(world)[original["Id"]][1]
    client("rename", original["Id"], f"{world.mic.scope}-renamed")
    rounds(world)
    world.converged(C0)
    # A copy that takes the name does not take its place.
    copy = client("run", "-d", "--init", "--name", name_of(original),
                  *labels_of(original), "mic-test/busybox:1", "sleep", "600")  # fmt: skip
    before = everything(world)
    rounds(world)
    world.mic.daemons[-1].stop()
    world.mic.run(http=False)
    world.converged(C0)
    rounds(world)
    assert everything(world) == before
    assert before[original["Id"]] == (f"{world.mic.scope}-renamed", began)
    assert (
        f"docker {name_of(original)} looks like ours and is not: it has the former name of "
        f"{world.mic.scope}-renamed, which is ours"
    ) in warnings(world)
    assert copy in before
    # What the plan removes stands in it by its name of today.
    planned = planned_for_none(world)
    assert f"    removes {world.mic.scope}-renamed\n" in planned
    world.write({0: "none"})
    world.mic("apply", rc=0)
    assert everything(world) == {copy: before[copy]}


def test_one_of_ours_may_run_an_image_that_was_committed_from_it(world: DaemonWorld) -> None:
    """Its image carries our labels, its own say more."""
    tag = f"mic-test/{world.mic.scope}:3"
    with committed(one(world)["Id"], tag):
        mine = container().replace("mic-test/busybox:1", tag)
        world.write({0: "c"}, c=mine)
        world.mic("apply", rc=0)
        world.converged(C0)
        # The same tag anew: now all that the labels say is what the image says.
        running = next(iter(everything(world)))
        client("commit", running, tag)
        client("rm", "-f", running)
        until(lambda: [*everything(world)] not in ([], [running]), "another one to run")
        world.converged(C0)
        before = everything(world)
        rounds(world)
        assert everything(world) == before
        assert len(before) == 1


def test_what_an_earlier_version_made_is_adopted(world: DaemonWorld) -> None:
    """It has no label of its making, and nothing was written down of it."""
    original = one(world)
    world.mic.daemons[-1].stop()
    client("rm", "-f", original["Id"])
    labels = [text for text in labels_of(original) if "io.mic.made" not in text]
    old = client("run", "-d", "--init", "--name", name_of(original), *labels,
                 "mic-test/busybox:1", "sleep", "100000")  # fmt: skip
    for path in world.mic.state_dir.rglob("memory.json"):
        path.unlink()
    before = everything(world)
    world.mic.run(http=False)
    world.converged(C0)
    rounds(world)
    assert everything(world) == before
    assert {*before} == {old}


def test_a_process_with_a_copied_environment_is_left_alone(tmp_path: Path) -> None:
    with daemon_world(tmp_path, None) as world:
        world.write({0: "p"}, p=process())
        world.mic.run(http=False)
        world.converged(P0)
        ours = world.marks()[P0][2]
        text = Path(f"/proc/{ours}/environ").read_bytes().decode()
        copied = dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
        mine = subprocess.Popen(["/bin/sh", "-c", "sleep 600 & wait"], env=copied)
        try:
            world.write({0: "none"})
            world.mic("apply", rc=0)
            assert not Path(f"/proc/{ours}").exists()
            assert mine.poll() is None
        finally:
            world.mic.daemons[-1].stop()
            mine.send_signal(signal.SIGKILL)
            mine.wait(60)


def test_a_copied_record_is_left_alone(tmp_path: Path) -> None:
    with daemon_world(tmp_path, None) as world:
        world.write({0: "p"}, p=process())
        world.mic.run(http=False)
        world.converged(P0)
        before = world.marks()
        (record,) = world.mic.run_dir.rglob("record.json")
        copy = record.parent.with_name("backup")
        subprocess.run(["cp", "-r", record.parent, copy], check=True, timeout=10)
        rounds(world)
        assert world.marks() == before
        assert (
            "subprocess backup looks like ours and is not: it is a copy of the record of "
            f"{record.parent.name}"
        ) in warnings(world)
        world.write({0: "none"})
        world.mic("apply", rc=0)
        assert json.loads((copy / "record.json").read_text())
        assert not record.exists()
