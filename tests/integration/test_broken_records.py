"""Records of host processes that are damaged or lost, under a daemon and without one.

Whatever becomes of a record: the process runs on, nothing runs beside it, everybody is told, and
whoever converges next has it back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.daemon_world import DaemonWorld, daemon_world, identity, process
from tests.support.waiting import until

P = identity("p", 1)


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path_factory.mktemp("records"), None) as made:
        made.mic.env["MIC_RESYNC"] = "300ms"
        made.models = {"p": process(), "q": process("limits: {nofile: 512}")}
        made.write({1: "p"})
        yield made


def directory(world: DaemonWorld) -> Path:
    (found,) = (world.mic.run_dir / "processes" / world.mic.scope).glob("mic-*")
    return found


def recorded(world: DaemonWorld, pid: int) -> bool:
    try:
        path = directory(world) / "record.json"
        # Reading a pipe would wait for ever.
        return path.is_file() and f'"pid": {pid}' in path.read_text()
    except (OSError, ValueError):
        return False


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "record.json").unlink()
        make(path / "record.json")

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: (path / "record.json").write_bytes(b""),
    "cut": lambda path: os.truncate(path / "record.json", 50),
    "NUL bytes": lambda path: (path / "record.json").write_bytes(b"\0" * 512),
    "version 2": lambda path: (path / "record.json").write_text('{"version": 2}'),
    "another shape": lambda path: (path / "record.json").write_text(
        '{"version": 1, "identity": 1}'
    ),
    "missing": lambda path: (path / "record.json").unlink(),
    "a directory": replaced(Path.mkdir),
    "a pipe": replaced(os.mkfifo),
    "deleted directory": shutil.rmtree,
    "hidden directory": lambda path: path.rename(path.with_name(".hidden")),
    "cleared run directory": lambda path: shutil.rmtree(path.parent.parent),
}


def test_a_daemon_has_every_damaged_record_back(world: DaemonWorld) -> None:
    daemon = world.mic.run()
    world.converged(P)
    before = world.marks()
    pid = before[P][2]
    for damage in DAMAGES.values():
        damage(directory(world))
        until(lambda: recorded(world, pid), "the record")
        world.converged(P)
        assert world.rows()[P]["pid"] == pid
        assert world.marks() == before
    daemon.stop()
    assert world.marks() == before

    for name in ("empty", "a pipe", "cleared run directory"):  # nobody is there when it happens
        DAMAGES[name](directory(world))
        daemon = world.mic.run()
        world.converged(P)
        assert world.marks() == before
        daemon.stop()
    assert world.mic("down", "--yes", rc=0).stdout.splitlines()[-1] == "Removed 1."
    assert world.marks() == {}


@pytest.mark.parametrize("name", ["empty", "cleared run directory"])
def test_without_a_daemon_plan_and_status_tell_and_apply_adopts(
    world: DaemonWorld, name: str
) -> None:
    world.mic("apply", rc=0)
    before = world.marks()
    pid = before[P][2]
    DAMAGES[name](directory(world))
    why = (
        "its record is gone"
        if name.startswith("cleared")
        else (
            "its record cannot be believed: record.json is not JSON: "
            "Expecting value: line 1 column 1 (char 0)"
        )
    )
    told = f"{why}; PID {pid} runs, and is left as it is"
    plan = world.mic("plan", rc=0).stdout
    assert f"blocked  {P} on GPU 1: {told}" in plan
    assert "hint: start the daemon, or run `mic-supervisor apply`: it writes the record" in plan
    (row,) = world.mic("status", "--json", rc=3).json()["instances"]
    assert (row["pid"], row["phase"], row["reason"]) == (pid, "degraded", told)
    # Another specification has another name, and another model the same GPU.
    for gpus, models in (({1: "p"}, {"p": process("limits: {nofile: 256}")}), ({1: "q"}, {})):
        world.write(gpus, **models)
        assert f"PID {pid} runs" in world.mic("plan", rc=0).stdout
        assert "No changes" in world.mic("plan", rc=0).stdout
    world.models["p"] = process()
    world.write({1: "p"})
    world.mic("apply", rc=0)
    assert world.marks() == before
    assert world.mic("plan", rc=0).stdout == "No changes.\n"


def test_down_ends_what_it_can_verify(world: DaemonWorld) -> None:
    world.mic("apply", rc=0)
    shutil.rmtree(world.mic.run_dir / "processes")
    assert world.mic("down", "--yes", rc=0).stdout.splitlines()[-1] == "Removed 1."
    assert world.marks() == {}


def test_down_names_what_it_cannot_end(world: DaemonWorld) -> None:
    world.mic("apply", rc=0)
    before = world.marks()
    pid = before[P][2]
    path = directory(world)
    shutil.rmtree(path)
    path.touch()  # so that no record can be written
    done = world.mic("down", "--yes", rc=1)
    told = f"its record is gone; PID {pid} runs, and is left as it is"
    assert f"error: cannot remove {P}: {told}\n" in done.stderr
    assert f"kill {pid}" in done.stderr
    assert "Removed" not in done.stdout
    world.mic("apply", rc=1)
    assert world.marks() == before
    path.unlink()
    world.mic("apply", rc=0)
    assert world.marks() == before
