"""Records that cannot be believed, and records of another boot, namespace, scope or host."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor import clocks
from mic_supervisor.errors import RuntimeRefused, StopFailed
from mic_supervisor.model import ForeignWorkload, Identity, RunState
from mic_supervisor.runtimes.keeper import records
from mic_supervisor.runtimes.keeper.records import BadRecord, Exit, Record
from mic_supervisor.runtimes.keeper.runtime import KeeperRuntime
from tests.support.waiting import until
from tests.unit.runtimes.process_world import HOST, World, runs, sh


def change(world: World, name: str, **members: Any) -> None:
    path = world.directory / name / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "record.json is not JSON: "),
        ("[]", "record.json is not a JSON object"),
        ('{"version": 2}', "record.json has version 2, not 1"),
        ('{"version": 1}', "record.json is incomplete: identity: Field required"),
        ("", "record.json is not JSON: "),
    ],
)
def test_a_record_that_cannot_be_read_is_reported_and_not_touched(
    world: World, text: str, reason: str
) -> None:
    seen = world.start("one", ("sleep", "60"))
    world.start("two", ("sleep", "60"))
    record = world.directory / "one" / "record.json"
    before = record.read_text()
    record.write_text(text)
    found = {one.name: one for one in world.make().observe().workloads}
    assert sorted(found) == ["one", "two"]
    doubt = found["one"].doubt
    assert (found["one"].state, found["two"].doubt) == (RunState.UNKNOWN, None)
    assert doubt is not None
    assert doubt.reason.startswith(f"its record cannot be believed: {reason}")
    assert doubt.reason.endswith(f"; PID {seen.pid} runs, and is left as it is")
    with pytest.raises(StopFailed, match="its record is not to be trusted"):
        world.runtime.stop(seen, signal="SIGTERM", grace=1)
    with pytest.raises(RuntimeRefused, match="its record is not to be trusted"):
        world.runtime.remove(seen)
    with pytest.raises(RuntimeRefused):
        world.make(kill_timeout=0.1).run_check(seen, ("true",), 1)
    assert seen.pid is not None and runs(seen.pid)
    record.write_text(before)
    assert world.look("one") == seen


def test_a_record_in_the_way_is_not_replaced(world: World) -> None:
    path = world.directory / "one"
    path.mkdir(parents=True)
    (path / "record.json").write_text("{")
    with pytest.raises(RuntimeRefused) as raised:
        world.runtime.start(world.launch("one", ("true",)))
    assert str(raised.value).startswith("cannot start one: there is a record of that name: ")
    assert raised.value.hint == f"look at it and move it away: {path}"
    assert (path / "record.json").read_text() == "{"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_record_that_another_user_wrote_is_not_believed(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    os.chown(world.directory / "one" / "record.json", 12345, 12345)
    (found,) = world.make().observe().workloads
    assert found.doubt is not None
    assert "record.json belongs to another user; PID" in found.doubt.reason
    assert seen.pid is not None and runs(seen.pid)


def test_a_record_is_not_read_through_a_link(world: World) -> None:
    world.start("one", ("true",))
    world.await_state("one", "exited")
    path = world.directory / "one" / "record.json"
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    (foreign,) = world.make().observe().foreign_workloads
    assert foreign.reason.startswith("record.json cannot be read: ")


@pytest.mark.parametrize(
    ("member", "value", "reason"),
    [
        ("scope", "another", "it belongs to scope another"),
        ("host", "another", "it was started on another machine"),
    ],
)
def test_what_belongs_to_others_is_foreign(
    world: World, member: str, value: str, reason: str
) -> None:
    mine = {"scope": world.scope, "host": HOST, member: value}
    theirs = KeeperRuntime(
        mine["scope"],
        mine["host"],
        directory=world.directory,
        log_directory=world.logs,
        enclosing_service=lambda: None,
    )
    launch = world.launch("one", ("sleep", "60"))
    theirs.start(replace(launch, identity=replace(launch.identity, **{member: value})))
    (seen,) = theirs.observe().workloads
    view = world.make().observe()
    if member == "scope":
        assert view.workloads == ()
        expected = ForeignWorkload("subprocess", "one", "one", reason=reason, elsewhere=True)
        assert view.foreign_workloads[0] == expected
    else:  # the machine's id may have changed since: the process runs here
        (found,) = view.workloads
        assert found.doubt is not None
        assert found.doubt.reason.startswith("it was started under another machine id; PID ")
    for call in (
        lambda: world.runtime.stop(seen, signal="SIGTERM", grace=1),
        lambda: world.runtime.remove(seen),
        lambda: world.runtime.start(world.launch("one", ("true",))),
    ):
        with pytest.raises((StopFailed, RuntimeRefused)) as raised:
            call()
        assert reason in str(raised.value) or f"PID {seen.pid} runs" in str(raised.value)
    assert seen.pid is not None and runs(seen.pid)
    theirs.stop(seen, signal="SIGTERM", grace=5)


def test_it_runs_since_the_kernel_started_it_whatever_its_record_says(world: World) -> None:
    world.start("one", ("sleep", "60"))
    change(world, "one", started_at=time.time() - 3600)  # the clock was set an hour forward since
    seen = world.look("one")
    assert seen.running_since is not None and seen.started_at is not None
    assert 0 <= clocks.steady() - seen.running_since < 60
    assert abs(time.time() - seen.started_at) < 60


def test_after_a_reboot_nothing_runs(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    change(world, "one", boot_id="another boot")
    after = world.look("one")
    assert (after.state, after.error) == (RunState.EXITED, "the machine was restarted")
    world.runtime.stop(seen, signal="SIGTERM", grace=1)
    # The PIDs of another boot mean nothing: what has them now is somebody else.
    assert seen.pid is not None and runs(seen.pid)


def test_another_pid_namespace_is_unknown_while_it_lives(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    change(world, "one", pid_namespace="pid:[1]")
    after = world.look("one")
    reason = "it runs in another PID namespace and cannot be seen from here"
    assert (after.state, after.error) == (RunState.UNKNOWN, reason)
    with pytest.raises(StopFailed, match=reason):
        world.runtime.stop(seen, signal="SIGTERM", grace=1)
    assert seen.pid is not None and runs(seen.pid)
    world.kill_keeper("one")  # the lock goes with it
    after = world.look("one")
    assert (after.state, after.error) == (RunState.EXITED, "it ended with its PID namespace")


def test_a_record_of_a_namespace_that_is_gone_is_replaced(world: World) -> None:
    world.start("one", ("true",))
    world.await_state("one", "exited")
    (world.directory / "one" / "exit.json").unlink()
    change(world, "one", pid_namespace="pid:[1]")
    seen = world.start("one", ("sleep", "60"))
    assert (seen.state, world.alive()) == (RunState.RUNNING, [seen.pid])


def test_a_start_that_was_cut_short_has_ended(world: World) -> None:
    world.start("one", ("true",))
    world.await_state("one", "exited")
    (world.directory / "one" / "exit.json").unlink()
    change(world, "one", keeper=None, child=None)
    seen = world.look("one")
    assert (seen.state, seen.error) == (RunState.EXITED, "its start was cut short")
    with locked(world.directory / "one"):  # a start that is under way may run at any moment
        assert world.look("one").state is RunState.RUNNING
    world.runtime.remove(seen)
    assert world.names() == []


def test_an_empty_directory_is_nothing(world: World) -> None:
    (world.directory / "one").mkdir(parents=True)
    (world.directory / "file").touch()
    view = world.runtime.observe()
    assert (view.workloads, view.foreign_workloads, view.error) == ((), (), None)
    assert world.start("one", ("sleep", "60")).state is RunState.RUNNING


def test_the_exit_of_an_earlier_run_is_not_this_ones(world: World) -> None:
    world.start("one", ("sleep", "60"))
    stale = {"run_id": str(uuid.uuid4()), "exit_code": 0, "signal": None, "finished_at": 1.0}
    (world.directory / "one" / "exit.json").write_text(json.dumps(stale))
    assert world.look("one").state is RunState.RUNNING


def test_what_is_left_of_a_run_without_a_record_is_foreign(world: World) -> None:
    now = [1000.0]
    seen = world.start("one", sh("sleep 61 & wait"))
    runtime = world.make(steady=lambda: now[0])
    assert runtime.observe().foreign_workloads == ()
    until(lambda: len(world.alive()) == 2, "its child")
    (left,) = {*world.alive()} - {seen.pid}
    world.kill_keeper("one")
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGKILL)
    until(lambda: world.alive() == [left], "the end of the main process")
    (world.directory / "one").rename(world.directory / ".gone")
    reason = "it was started for one, and its record is gone"
    expected = (ForeignWorkload("subprocess", "one", f"PID {left}", (), True, reason),)
    now[0] += 11
    view = runtime.observe()
    assert (view.workloads, view.foreign_workloads) == ((), expected)
    os.kill(left, signal.SIGKILL)
    until(lambda: not world.alive(), "the end")
    now[0] += 11
    assert runtime.observe().foreign_workloads == ()


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SPECS = st.recursive(
    st.none() | st.booleans() | st.integers() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
IDENTITIES = st.builds(
    Identity,
    scope=NAMES,
    host=NAMES,
    instance=NAMES,
    model=NAMES,
    backend=NAMES,
    gpus=st.lists(NAMES).map(tuple),
    ports=st.dictionaries(NAMES, st.integers(1, 65535)),
    spec=st.none() | st.dictionaries(NAMES, SPECS, max_size=3),
    spec_hash=NAMES,
    schema=st.integers(1, 9),
    origin=NAMES,
)


@given(IDENTITIES)
def test_an_identity_comes_back_as_it_was_written(identity: Identity) -> None:
    import tempfile

    frozen = replace(identity, spec=MappingProxyType(dict(identity.spec or {})))
    record = Record("one", frozen, "run", "boot", "ns", 1.5, user="u", working_dir="/x")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "one"
        path.mkdir()
        (path / "record.json").write_text(json.dumps(record.document()))
        read = records.load(path)
    assert read is not None
    assert read == replace(record, identity=replace(identity, spec=identity.spec or {}))


@pytest.mark.parametrize("pid", [1, 0, -1])
def test_nobody_is_fooled_into_signalling_everybody(tmp_path: Path, pid: int) -> None:
    identity = Identity("s", "h", "i", "m", "b", (), {}, None, "x")
    document = Record("one", identity, "run", "boot", "ns", 1.0).document()
    document["child"] = {"pid": pid, "start_time": 1}
    (tmp_path / "record.json").write_text(json.dumps(document))
    with pytest.raises(BadRecord, match="Input should be greater than 1"):
        records.load(tmp_path)


@pytest.mark.parametrize(
    ("ended", "code", "reason"),
    [
        (Exit(0, None, 1.0, None), 0, None),
        (Exit(None, 9, 1.0, None), 137, "ended by SIGKILL"),
        (Exit(None, 35, 1.0, None), 163, "ended by signal 35"),
        (Exit(None, None, 1.0, "lost"), None, "lost"),
    ],
)
def test_an_exit_reads_as_a_shell_would_say_it(
    ended: Exit, code: int | None, reason: str | None
) -> None:
    assert (ended.code, ended.reason) == (code, reason)


def test_a_lock_is_not_had_twice_and_not_on_what_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.mkdir()
    assert not records.is_locked(path)
    handle = records.lock(path, 0)
    assert handle is not None
    assert records.is_locked(path)
    assert records.lock(path, 0.03) is None
    records.discard(path)
    os.close(handle)
    assert list(tmp_path.iterdir()) == []
    records.discard(path)  # once more is success


def test_a_copy_of_a_record_is_named_and_not_touched(world: World) -> None:
    runtime = world.make(given_name=lambda identity: identity.instance)
    runtime.start(world.launch("one", ("sleep", "60")))
    (seen,) = runtime.observe().workloads
    assert seen.pid is not None
    copy = world.directory / "backup"
    shutil.copytree(world.directory / "one", copy)
    view = runtime.observe()
    assert view.workloads == (seen,)
    assert view.foreign_workloads == (
        ForeignWorkload("subprocess", "backup", "backup", (), False,
                        "it is a copy of the record of one", "one"),
    )  # fmt: skip
    for call in (lambda: runtime.stop(replace(seen, name="backup"), signal="SIGTERM", grace=1),
                 lambda: runtime.remove(replace(seen, name="backup"))):  # fmt: skip
        with pytest.raises((StopFailed, RuntimeRefused), match="it is a copy of the record of one"):
            call()
    assert runs(seen.pid)
    assert copy.is_dir()
