"""A run whose record cannot be believed keeps its GPUs, is told of, and has its record mended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import ObservedWorkload, RunState
from mic_supervisor.runtimes.keeper.records import Record
from tests.support.waiting import until
from tests.unit.runtimes.process_world import World, python, runs

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")


def text(content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content

    def write(path: Path) -> None:
        (path / "record.json").write_bytes(data)

    return write


def members(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "record.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def identity(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        record = json.loads((path / "record.json").read_text())
        members(identity={**record["identity"], **changes})(path)

    return change


def cut(path: Path) -> None:
    file = path / "record.json"
    file.write_bytes(file.read_bytes()[:100])


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "record.json").unlink()
        make(path / "record.json")

    return damage


def emptied(path: Path) -> None:
    for entry in path.iterdir():
        entry.unlink()


def made_anew(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def over(path: Path) -> None:
    """The record and the exit status of an earlier run, as from a backup."""
    members(run_id="earlier", keeper=None, child=None)(path)
    ended = {"run_id": "earlier", "exit_code": 0, "signal": None, "finished_at": 1.0}
    (path / "exit.json").write_text(json.dumps(ended))


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def hidden(path: Path) -> None:
    path.rename(path.with_name(f".{path.name}"))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": text(""),
    "cut": cut,
    "NUL bytes": text(b"\0" * 4096),
    "no JSON": text("{"),
    "nested too deep": text("[" * 100_000),
    "another shape": text('["record"]'),
    "version 2": members(version=2),
    "run of a wrong type": members(run_id=7),
    "time that is no number": members(created_at=float("nan")),
    "PID of a wrong type": members(child={"pid": "12", "start_time": 3}),
    "GPUs of a wrong type": identity(gpus="GPU-1"),
    "ports of a wrong type": identity(ports={"http": "20000"}),
    "another machine": identity(host="another"),
    "another scope": identity(scope="another"),
    "missing": replaced(lambda path: None),
    "a directory": replaced(lambda path: path.mkdir()),
    "a pipe": replaced(os.mkfifo),
    "a link": replaced(lambda path: path.symlink_to("elsewhere")),
    "an earlier run": over,
    "PIDs of nobody": members(
        keeper={"pid": 4194300, "start_time": 1}, child={"pid": 4194301, "start_time": 1}
    ),
    "emptied directory": emptied,
    "deleted directory": shutil.rmtree,
    "directory made anew": made_anew,
    "hidden directory": hidden,
    "cleared run directory": lambda path: shutil.rmtree(path.parent),
    "a file in its place": a_file,
}


def one_of(world: World, **options: Any) -> ObservedWorkload:
    view = world.make(**options).observe()
    assert (view.error, view.foreign_workloads) == (None, ())
    (found,) = view.workloads
    return found


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("keeper", [True, False], ids=["kept", "unkept"])
def test_a_damaged_record_costs_nothing_and_is_mended(
    world: World, damage: Callable[[Path], None], keeper: bool
) -> None:
    seen = world.start("one", ("sleep", "60"))
    if not keeper:
        world.kill_keeper("one")
    damage(world.directory / "one")
    if damage is DAMAGES["a file in its place"]:
        # Nothing can be written there; it is told of all the same.
        assert one_of(world, repairs=True).doubt is not None
        (world.directory / "one").unlink()

    found = one_of(world)
    assert (found.state, found.pid, found.identity) == (RunState.UNKNOWN, seen.pid, seen.identity)
    assert found.doubt is not None
    assert f"PID {seen.pid} runs, and is left as it is" in found.doubt.reason
    assert found.doubt.hint.startswith("start the daemon, or run `mic-supervisor apply`")
    for name in ("one", "two"):  # of the same GPUs
        with pytest.raises(RuntimeRefused, match=rf"PID {seen.pid} runs for one"):
            world.runtime.start(world.launch(name, ("sleep", "61")))
    assert world.alive() == [seen.pid]

    repaired = one_of(world, repairs=True)
    assert (repaired.state, repaired.pid, repaired.identity) == (
        RunState.RUNNING,
        seen.pid,
        seen.identity,
    )
    assert repaired.doubt is None
    assert one_of(world) == repaired
    world.runtime.start(world.launch("one", ("sleep", "61")))  # it runs already
    assert world.alive() == [seen.pid]
    world.make().stop(repaired, signal="SIGTERM", grace=5)
    assert world.alive() == []
    ended = one_of(world)
    assert (ended.state, ended.exit_code) == (RunState.EXITED, 143 if keeper else None)
    world.make().remove(ended)
    assert world.make().observe().workloads == ()


def test_a_record_that_lost_its_pids_ends_nothing(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    world.kill_keeper("one")
    members(keeper=None, child=None)(world.directory / "one")
    with pytest.raises(RuntimeRefused, match=f"PID {seen.pid}, which runs"):
        world.make().remove(seen)
    assert one_of(world).doubt is not None
    assert (one_of(world, repairs=True).pid, world.alive()) == (seen.pid, [seen.pid])


@ROOT
@pytest.mark.parametrize("part", ["record.json", "."])
def test_what_another_user_owns_is_mended(world: World, part: str) -> None:
    seen = world.start("one", ("sleep", "60"))
    os.chown(world.directory / "one" / part, 12345, 12345)
    found = one_of(world, repairs=True)
    assert (found.pid, found.doubt) == (seen.pid, None)
    assert (world.directory / "one" / "record.json").stat().st_uid == 0


DAMAGED_EXITS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "another shape": lambda path: path.write_text("[]"),
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("damage", DAMAGED_EXITS.values(), ids=DAMAGED_EXITS.keys())
def test_a_damaged_exit_status_says_nothing_of_the_run(
    world: World, damage: Callable[[Path], object]
) -> None:
    seen = world.start("one", ("sleep", "60"))
    damage(world.directory / "one" / "exit.json")
    assert one_of(world) == seen
    world.kill_keeper("one")
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGKILL)
    ended = world.await_state("one", "exited")
    assert ended.error is not None
    assert ended.error.startswith("its exit status is lost: exit.json ")
    again = world.start("one", ("sleep", "60"))
    assert (again.state, world.alive()) == (RunState.RUNNING, [again.pid])


@pytest.mark.parametrize(("member", "value"), [("exit_code", "0"), ("signal", "x")])
def test_an_exit_status_of_a_wrong_type_is_lost(world: World, member: str, value: str) -> None:
    world.start("one", ("true",))
    world.await_state("one", "exited")
    path = world.directory / "one" / "exit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), member: value}))
    ended = one_of(world)
    assert ended.state is RunState.EXITED
    assert ended.error is not None
    assert f"exit.json is incomplete: {member}: Input should be a valid integer" in ended.error


def test_a_damaged_record_of_nobody_holds_nothing(world: World) -> None:
    world.start("one", ("true",))
    world.await_state("one", "exited")
    text("")(world.directory / "one")
    until(lambda: not world.make().observe().workloads, "the keeper's end")
    (foreign,) = world.make(repairs=True).observe().foreign_workloads
    assert (foreign.name, foreign.running) == ("one", False)


def test_a_directory_that_somebody_else_holds_may_run(world: World) -> None:
    path = world.directory / "mic-x-MAM-51000000-0123abcd"
    path.mkdir(parents=True)
    holder = subprocess.Popen(["flock", str(path), "sleep", "60"], start_new_session=True)
    try:
        until(lambda: world.make().observe().workloads != (), "the lock")
        found = one_of(world, repairs=True)
        assert found.doubt is not None
        assert f"PID {holder.pid} holds {path}" in found.doubt.reason
        assert "record.json is missing" in found.doubt.reason
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


def test_a_directory_under_another_name_is_still_the_runs(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    (world.directory / "one").rename(world.directory / "moved")
    found = one_of(world)
    assert (found.name, found.pid, found.identity) == ("moved", seen.pid, seen.identity)
    text("{")(world.directory / "moved")
    assert one_of(world).doubt is not None
    repaired = one_of(world, repairs=True)
    assert (repaired.name, repaired.pid, repaired.doubt) == ("one", seen.pid, None)
    assert not (world.directory / "moved").exists()


@pytest.mark.parametrize("name", ["another", "two"])
def test_a_copied_directory_is_no_second_run(world: World, name: str) -> None:
    seen = world.start("one", ("sleep", "60"))
    shutil.copytree(world.directory / "one", world.directory / name)
    view = world.make(repairs=True).observe()
    assert view.workloads == (seen,)
    (foreign,) = view.foreign_workloads
    assert foreign.name == name
    assert foreign.reason == "it is a copy of one: both name one run"
    text("")(world.directory / "one")  # now only the copy says whose the run is, and rightly
    (found,) = (one for one in world.make().observe().workloads if one.pid == seen.pid)
    assert found.identity == seen.identity
    assert world.alive() == [seen.pid]


def test_a_copied_environment_is_no_run_of_its_own(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    assert seen.pid is not None
    environment = procfs.environ(seen.pid)
    assert environment is not None
    shell = subprocess.Popen(["sleep", "62"], env=environment, start_new_session=True)
    try:
        shutil.rmtree(world.directory)
        assert one_of(world).pid == seen.pid
        assert one_of(world, repairs=True).pid == seen.pid
        world.kill_keeper("one")
        os.kill(seen.pid, signal.SIGKILL)
        until(lambda: not runs(seen.pid or 0), "the end")
        shutil.rmtree(world.directory)
        view = world.make(repairs=True).observe()
        assert view.workloads == ()
        assert [one.ref for one in view.foreign_workloads] == [f"PID {shell.pid}"]
    finally:
        shell.kill()
        shell.wait()


# Says of itself that it is the main process of a run, which anybody may.
CLAIM = """
import json, os, sys
environment, user, program = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
os.setgroups([])
os.setresuid(user, user, user)
start = open('/proc/self/stat').read().rpartition(')')[2].split()[19]
environment['MIC_MAIN'] = f'{os.getpid()}:{start}:4194300:1'
os.execve(program[0], program, environment)
"""


@ROOT
@pytest.mark.parametrize(("user", "believed"), [(0, True), (12345, False)])
def test_only_who_could_be_ours_is_believed(world: World, user: int, believed: bool) -> None:
    seen = world.start("one", ("sleep", "60"))
    environment = procfs.environ(seen.pid or 0)
    world.runtime.stop(seen, signal="SIGTERM", grace=5)
    shutil.rmtree(world.directory)
    command = [sys.executable, "-c", CLAIM, json.dumps(environment), str(user)]
    other = subprocess.Popen([*command, "/bin/sleep", "63"])
    try:
        until(lambda: "MIC_MAIN" in (procfs.environ(other.pid) or {}), "the program")
        workloads = world.make().observe().workloads
        assert [one.pid for one in workloads] == ([other.pid] if believed else [])
        for name, spec in (("one", {}), ("one", {"user": "12345"})):
            runtime = world.make()
            if believed or spec:  # the model's user may be the one that it runs as
                with pytest.raises(RuntimeRefused, match=f"PID {other.pid} runs for one"):
                    runtime.start(world.launch(name, ("sleep", "64"), **spec))
            else:
                runtime.start(world.launch(name, ("sleep", "64"), **spec))
                runtime.stop(world.look("one"), signal="SIGTERM", grace=5)
    finally:
        other.kill()
        other.wait()


def test_a_keeper_of_an_earlier_version_is_believed_by_its_child(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mic_supervisor.runtimes.keeper import program, run

    def earlier(record: Record) -> dict[str, str]:
        found = {"MIC_SCOPE": world.scope, "MIC_INSTANCE": "one", "MIC_SPEC_HASH": "0badcafe"}
        return {**found, "MIC_IDENTITY": "none yet", "MIC_RUN_ID": record.run_id}

    monkeypatch.setattr(run, "_variables", earlier)
    before = shutil.copy(program.__file__, tmp_path / "keeper.py")  # as the program was called
    monkeypatch.setattr(program, "__file__", str(before))
    devices = (("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2"),)
    seen = world.start("one", ("sleep", "60"), env=devices)
    shutil.rmtree(world.directory)
    found = one_of(world, repairs=True)
    assert (found.pid, found.doubt, found.identity.spec) == (seen.pid, None, None)
    assert (found.identity.instance, found.identity.gpus) == ("one", ("GPU-1", "GPU-2"))


def test_a_program_that_overwrites_its_environment_is_known_by_its_keeper(world: World) -> None:
    scope = f"{{'MIC_SCOPE': {world.scope!r}}}"
    bare = f"import os; os.execve('/bin/sleep', ['sleep', '60'], {scope})"
    seen = world.start("one", python(bare))
    until(lambda: "MIC_RUN_ID" not in (procfs.environ(seen.pid or 0) or {}), "the program")
    shutil.rmtree(world.directory)
    found = one_of(world, repairs=True)
    assert (found.pid, found.doubt, found.identity) == (seen.pid, None, seen.identity)
