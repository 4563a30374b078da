"""State files of earlier versions are read, and damaged ones cost at most what they held."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor import codec
from mic_supervisor.clocks import Clock
from mic_supervisor.converge.events import Event
from mic_supervisor.converge.state import StateDir
from mic_supervisor.daemon import generations, log
from mic_supervisor.host.lock import LockHolder
from mic_supervisor.model import (
    EngineCheck,
    ExecCheck,
    HttpCheck,
    Identity,
    Probe,
    Probes,
    TcpCheck,
)
from mic_supervisor.plan.memory import Floor, InstanceMemory, Memory, Pause, Paused, Recorded
from mic_supervisor.plan.spec import SpecKey
from mic_supervisor.runtimes import identity
from mic_supervisor.runtimes.docker import create

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIRST, BEFORE = FIXTURES / "state-0.1", FIXTURES / "state-before-codec"
A = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
B = "GPU-bbbbbbbb-0000-0000-0000-000000000000"
HASH = "a" * 64

CONTAINER = Identity(
    scope="prod",
    host="0123456789ab",
    instance="MAM-aaaaaaaa",
    model="MAM",
    backend="triton",
    gpus=(A,),
    ports={"grpc": 8001, "http": 8000},
    spec={
        "kind": "container",
        "image": "nvcr.io/nvidia/tritonserver:24.08-py3",
        "command": ["--model-control-mode=explicit"],
        "env": {"TOKEN": "hmac-sha256:0a1b2c3d:00112233445566778899aabbccddeeff"},
        "ports": {"http": {"container": 8000}},
        "drain": {
            "call": {"method": "GET", "path": "/queue", "body": None, "timeout": 10.0},
            "timeout": 60.0,
        },
    },
    spec_hash="fedcba9876543210",
)
PROCESS = Identity(
    scope="prod",
    host="0123456789ab",
    instance="FACE-bbbbbbbb",
    model="FACE",
    backend="process",
    gpus=(B,),
    ports={"http": 9000},
    spec={
        "kind": "process",
        "command": ["serve", "--port", "${port}"],
        "stop_timeout": 5.5,
        "limits": {"nofile": 1024},
    },
    spec_hash="0123456789abcdef",
)
HTTP = HttpCheck("/v2/health/ready", expect=(("ready", "true"),), listed=(("data[].id", "MAM"),))
EVERYTHING = Memory(
    instances={
        "MAM-aaaaaaaa": InstanceMemory(
            failures=3,
            reason="it exited with 137 (SIGKILL)",
            attempt="aaaa",
            retry_at=1004.0,
            failed="bbbb",
            failed_reason="no such device ∅",
            ready="cccc",
            ready_workload="mic-prod-MAM-aaaaaaaa-1",
            ready_probes=Probes(
                Probe(HTTP, 2.5, 3.0, 60),
                Probe(TcpCheck("grpc")),
                Probe(ExecCheck(("test", "-e", "/ok"))),
            ),
            started="mic-prod-MAM-aaaaaaaa-2",
            started_at=900.0,
            restarts=7,
            phase="backoff",
            since=950.0,
        ),
        "FACE-bbbbbbbb": InstanceMemory(
            ready="dddd",
            ready_workload="FACE-bbbbbbbb",
            ready_since=980.0,
            ready_probes=Probes(liveness=Probe(EngineCheck())),
            ready_record=Recorded("systemd", "FACE-bbbbbbbb", PROCESS),
            started="FACE-bbbbbbbb",
            phase="ready",
            since=981.0,
        ),
        "MAM-aaaaaaaa/B": InstanceMemory(
            failures=1, reason="cannot load B", attempt="eeee", retry_at=1005.0
        ),
    },
    bindings={"0": A, "1": B},
    paused=Paused({"MAM": Pause(1_800_000_500.0, "a look by hand")}, {B: Pause(1_800_000_600.5)}),
    floors={A: Floor(300 << 20), B: Floor(2 << 30, 1 << 30)},
    published={"MAM": {"MAM-aaaaaaaa": {"http": "http://127.0.0.1:8000"}}, "FACE": {}},
    containers={"c1": True, "c2": False},
)


def state(path: Path) -> StateDir:
    return StateDir(path, Clock(lambda: 1000.0, lambda: 1_800_001_000.0), "first")


def text(name: str) -> bytes:
    return (BEFORE / name).read_bytes()


@pytest.fixture
def scope(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BEFORE, tmp_path / "prod"))


def test_the_memory_is_read_whole() -> None:
    assert state(BEFORE).memory() == EVERYTHING


def test_what_is_written_now_has_the_members_that_the_version_before_reads(scope: Path) -> None:
    before = json.loads(text("memory.json"))
    state(scope).save_memory(EVERYTHING)
    assert json.loads((scope / "memory.json").read_bytes()) == _without_none(before)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def test_the_first_versions_memory_is_read() -> None:
    found = state(FIRST).memory()
    assert (found.lost, found.bindings, found.containers) == (None, {"0": A}, None)
    assert found.instances == {
        "MAM-aaaaaaaa": InstanceMemory(
            failures=5,
            reason="it ended",
            attempt="aaaa",
            retry_at=1030.0,
            ready="cccc",
            ready_workload="mic-1",
            ready_since=950.0,
            started="mic-2",
            started_at=900.0,
            restarts=2,
            phase="backoff",
            since=960.0,
        )
    }


def test_the_accepted_generation_is_read() -> None:
    assert generations.number_of(state(BEFORE), HASH) == 12
    assert generations.number_of(state(FIRST), HASH) == 3


def test_history_is_read_without_the_line_that_a_crash_cut_short() -> None:
    begin, failed, phase = log.read(BEFORE / "history.jsonl")
    assert begin == Event(
        "begin",
        1_800_000_001.5,
        "MAM-aaaaaaaa",
        "its specification changed: image",
        "MAM",
        (A, B),
        "its specification changed: image",
        phase="replace",
    )
    assert (failed.text, failed.seconds, failed.hint) == (
        "cannot start it: 坏",
        10.0,
        "look at its log",
    )
    assert (phase.was, phase.phase) == ("starting", "backoff")
    (old,) = log.read(FIRST / "history.jsonl")
    assert (old.kind, old.gpus) == ("begin", (A,))


def test_labels_and_a_units_environment_are_read_and_written_as_before() -> None:
    labels = json.loads(text("labels.json"))
    assert create.identity_of(labels, "name") == CONTAINER
    assert create.labels(CONTAINER) == labels
    assert identity.identity_of(json.loads(text("unit.json"))) == ("FACE-bbbbbbbb", PROCESS)


def test_a_lock_and_an_event_on_the_socket_are_read() -> None:
    assert codec.decode(LockHolder, codec.parse(text("lock"))) == LockHolder(
        4711, "mic-supervisor apply", "ann", 1_800_000_000.25
    )
    event = codec.decode(Event, codec.parse(text("event.json"))["event"])
    assert (event.kind, event.gpus) == ("warning", (A,))


# --- damaged ------------------------------------------------------------------------------------


def damage(scope: Path, *places: str, value: Any = "§") -> None:
    path = scope / "memory.json"
    document = json.loads(path.read_bytes())
    for place in places:
        *parents, name = place.split(" ")
        holder = document
        for parent in parents:
            holder = holder[parent]
        holder[name] = value
    path.write_text(json.dumps(document))


def without_loss(found: Memory) -> Memory:
    """What is good of it. What is lost may be why something runs as it does."""
    assert found.lost is None or found.unexplained == {}
    return replace(found, lost=None, unexplained=None)


def with_entry(**values: Any) -> Memory:
    entry = replace(EVERYTHING.of("MAM-aaaaaaaa"), **values)
    return EVERYTHING.with_instance("MAM-aaaaaaaa", entry)


@pytest.mark.parametrize(
    ("place", "value", "kept"),
    [
        ("instances MAM-aaaaaaaa failures", "two", with_entry(failures=0)),
        ("instances MAM-aaaaaaaa failures", True, with_entry(failures=0)),
        ("instances MAM-aaaaaaaa retry_at", [], with_entry(retry_at=None)),
        ("instances MAM-aaaaaaaa retry_at", float("inf"), with_entry(retry_at=None)),
        ("instances", [], replace(EVERYTHING, instances={})),
        ("bindings 0", 7, replace(EVERYTHING, bindings={"1": B})),
        ("bindings", None, replace(EVERYTHING, bindings={})),
        ("floors " + A, {"used": "1"}, replace(EVERYTHING, floors={B: EVERYTHING.floors[B]})),
        ("published MAM", 3, replace(EVERYTHING, published={"FACE": {}})),
        ("containers c2", "no", replace(EVERYTHING, containers={"c1": True})),
        # What is paused stays as it is, whatever else of the pause is lost.
        (
            "paused gpus " + B,
            {"since": "x"},
            replace(EVERYTHING, paused=replace(EVERYTHING.paused, gpus={B: Pause()})),
        ),
    ],
)
def test_of_a_damaged_memory_the_rest_is_kept(
    scope: Path, place: str, value: Any, kept: Memory
) -> None:
    damage(scope, place, value=value)
    found = state(scope).memory()
    assert without_loss(found) == kept
    infinite = value == float("inf")  # a number that is none is not known, and no damage
    assert (found.lost is None) is infinite
    assert infinite or ".".join(place.split(" ")[:2]) in (found.lost or "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b'{"instances": ' + b"[" * 5000,
        b'{"instances": ' + b"[" * 500 + b"]" * 500 + b"}",
        b"9",
    ],
)
def test_a_memory_that_is_none_is_started_without(scope: Path, content: bytes) -> None:
    (scope / "memory.json").write_bytes(content)
    found = state(scope).memory()
    assert without_loss(found) == Memory()
    assert (found.lost or "").startswith(f"{scope / 'memory.json'} was damaged, and what it held")


def test_where_nothing_was_ever_remembered_nothing_explains_what_runs(tmp_path: Path) -> None:
    assert state(tmp_path).memory() == Memory(unexplained={})
    memory = Memory(unexplained={"docker": ("MAM-aaaaaaaa",), "systemd": ()})
    state(tmp_path).save_memory(memory)
    assert state(tmp_path).memory() == memory
    state(tmp_path).save_memory(Memory())
    assert state(tmp_path).memory() == Memory()


def test_a_file_in_the_place_of_the_directory_is_no_end(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("")
    found = state(path).memory()
    assert (found.unexplained, found.lost is None) == ({}, False)


def test_what_was_damaged_is_kept_for_a_person_once(scope: Path) -> None:
    for count in (1, 2):
        (scope / "memory.json").write_bytes(b"{%d" % count)
        host = state(scope)
        memory = host.memory()
        assert not (scope / f"memory.json.damaged-{count}").exists()  # who looks changes nothing
        host.save_memory(memory)
        host.save_memory(memory)
        assert (scope / f"memory.json.damaged-{count}").read_bytes() == b"{%d" % count
    assert state(scope).memory() == Memory(unexplained={})
    assert len([*scope.glob("memory.json.damaged-*")]) == 2


STAND_INS = {
    "directory": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", [*STAND_INS])
def test_what_stands_in_the_place_of_the_memory_is_set_aside(scope: Path, kind: str) -> None:
    path = scope / "memory.json"
    path.unlink()
    STAND_INS[kind](path)
    host = state(scope)
    found = host.memory()
    assert without_loss(found) == Memory()
    assert (found.lost is None) is (kind == "dangling")  # which is no file, as on a first start
    host.save_memory(EVERYTHING)
    assert state(scope).memory() == EVERYTHING
    assert os.path.lexists(scope / "memory.json.damaged-1") is (kind != "dangling")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0" * 4096])
def test_what_was_there_before_the_last_change_stands_in(scope: Path, content: bytes) -> None:
    host = state(scope)
    host.save_memory(EVERYTHING)
    host.save_memory(replace(EVERYTHING, floors={}))
    (scope / "memory.json").write_bytes(content)
    again = state(scope)
    found = again.memory()
    assert without_loss(found) == EVERYTHING
    assert found.lost == (
        f"{scope / 'memory.json'} was damaged; what it held before the last change is used"
    )
    again.save_memory(found)
    assert state(scope).memory() == replace(EVERYTHING, unexplained={})


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 31, b"x" * 33, b"x" * 100])
def test_a_key_of_another_length_is_made_anew_and_kept_for_a_person(
    scope: Path, content: bytes
) -> None:
    (scope / "spec.key").write_bytes(content)
    host = state(scope)
    seen = host.key(create=False)
    assert (scope / "spec.key").read_bytes() == content  # who looks changes nothing
    made = host.key(create=True)
    assert made.id not in (SpecKey(content).id, seen.id)
    assert host.key(create=False).id == made.id
    assert (scope / "spec.key.damaged-1").read_bytes() == content
    assert (scope / "spec.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["directory", "fifo", "loop", "device"])
def test_what_stands_in_the_place_of_the_key_is_set_aside(scope: Path, kind: str) -> None:
    path = scope / "spec.key"
    path.unlink(missing_ok=True)
    STAND_INS[kind](path)
    made = state(scope).key(create=True)
    assert state(scope).key(create=True).id == made.id


def test_a_key_of_the_right_length_stays(scope: Path) -> None:
    (scope / "spec.key").write_bytes(b"k" * 32)
    assert state(scope).key(create=True).id == SpecKey(b"k" * 32).id


@pytest.mark.parametrize("kind", [*STAND_INS])
def test_what_stands_in_the_place_of_the_generation_has_nothing_confirmed(
    scope: Path, kind: str
) -> None:
    (scope / "generation.json").unlink(missing_ok=True)
    STAND_INS[kind](scope / "generation.json")
    assert generations.number_of(state(scope), HASH) is None


def test_what_only_a_later_version_can_know_is_no_damage(scope: Path) -> None:
    damage(scope, "instances MAM-aaaaaaaa ready_probes startup check kind", value="grpc")
    damage(scope, "instances FACE-bbbbbbbb ready_record identity", value=3)
    found = state(scope).memory()
    assert found.lost is None
    assert found.of("MAM-aaaaaaaa").ready_probes is None
    assert found.of("FACE-bbbbbbbb").ready_record is None


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"generation": "x"}', b'{"hash": 3}'])
def test_a_damaged_generation_has_nothing_confirmed(scope: Path, content: bytes) -> None:
    (scope / "generation.json").write_bytes(content)
    assert generations.number_of(state(scope), HASH) is None
    assert generations.number_of(state(scope), "") == 0


def test_text_that_is_no_unicode_is_kept_as_far_as_it_is(scope: Path) -> None:
    path = "/models/\udcff"
    state(scope).save_memory(with_entry(reason=path))
    assert state(scope).memory() == with_entry(reason="/models/?")


def test_two_saves_at_once_spoil_nothing(tmp_path: Path) -> None:
    """One that was given up at the end of the daemon may still be under way in its thread."""
    state = StateDir(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: state.write("x.json", f"{n}" * 10000), [1, 2, 3, 4] * 10))
    assert len({*(tmp_path / "x.json").read_text()}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
