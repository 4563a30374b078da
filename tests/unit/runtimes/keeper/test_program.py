"""The keeper by itself, as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.host import processes as procfs
from mic_supervisor.runtimes.keeper import program
from tests.support.waiting import until
from tests.unit.runtimes.process_world import World, runs


def run(directory: Path, payload: bytes) -> tuple[int, str]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", program.__file__, str(directory), str(handle)],
            input=payload,
            capture_output=True,
            pass_fds=(handle,),
            timeout=10,
        )
    finally:
        os.close(handle)
    return done.returncode, (done.stdout + done.stderr).decode()


def payload(logs: Path, scope: str, **changes: Any) -> dict[str, Any]:
    return {
        "record": {"run_id": "run-1"},
        "command": ["sleep", "60"],
        "env": {"PATH": "/usr/bin:/bin", "MIC_SCOPE": scope},
        "working_dir": "/",
        "limits": {},
        "user": None,
        "stop_signal": 15,
        "stop_timeout": 1.0,
        "remains_grace": 0.2,
        "logs": str(logs),
        "log_max_size": 1 << 20,
        **changes,
    }


def test_it_answers_with_the_pid_and_detaches(tmp_path: Path, scope: str) -> None:
    code, said = run(tmp_path, json.dumps(payload(tmp_path, scope)).encode())
    assert code == 0
    record = json.loads((tmp_path / "record.json").read_text())
    child, parent = record["child"], record["keeper"]
    assert json.loads(said) == {"pid": child["pid"]}
    for one in (child, parent):
        assert procfs.is_running(one["pid"], one["start_time"])
    found = procfs.stat(child["pid"])
    assert found is not None
    assert (found.ppid, found.session) == (parent["pid"], child["pid"])
    os.kill(parent["pid"], 15)
    until(lambda: (tmp_path / "exit.json").exists(), "the end")
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert ended.pop("finished_at") <= time.time()
    assert ended == {"run_id": "run-1", "exit_code": None, "signal": 15, "error": None}
    until(lambda: not runs(parent["pid"]), "the keeper's end")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_half_a_payload_starts_nothing(tmp_path: Path, scope: str, share: float) -> None:
    whole = json.dumps(payload(tmp_path, scope)).encode()
    assert run(tmp_path, whole[: int(len(whole) * share)]) == (1, "")
    assert list(tmp_path.iterdir()) == []


def test_a_large_environment_fits(tmp_path: Path, scope: str) -> None:
    env = {"PATH": "/usr/bin:/bin", "MIC_SCOPE": scope, **{f"V{n}": "x" * 1000 for n in range(500)}}
    command = ["sh", "-c", "env | grep -c ^V"]
    code, _ = run(tmp_path, json.dumps(payload(tmp_path, scope, env=env, command=command)).encode())
    assert code == 0
    until(lambda: (tmp_path / "exit.json").exists(), "the end")
    assert (tmp_path / "log").read_text() == "500\n"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"command": ["/nowhere"]}, "[Errno 2] No such file or directory: '/nowhere'"),
        ({"working_dir": "/nowhere"}, "[Errno 2] No such file or directory: '/nowhere'"),
        (
            {"limits": {"RLIMIT_NOFILE": 1 << 62}},
            f"RLIMIT_NOFILE cannot be set to {1 << 62}: ",
        ),
        ({"command": ["/caf\udce9"]}, r"[Errno 2] No such file or directory: '/caf\udce9'"),
        ({"command": ["a\0b"]}, "execve: embedded null character"),
        ({"command": [7]}, "expected str, bytes or os.PathLike object, not int"),
    ],
)
def test_a_start_that_fails_is_explained(
    tmp_path: Path, scope: str, changes: dict[str, Any], reason: str
) -> None:
    _, said = run(tmp_path, json.dumps(payload(tmp_path, scope, **changes)).encode())
    assert json.loads(said)["error"].startswith(reason)
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert ended["error"].startswith(f"it could not be started: {reason}")
    assert (ended["exit_code"], ended["signal"]) == (None, None)


def test_without_a_record_nothing_runs(tmp_path: Path, scope: str) -> None:
    (tmp_path / "record.json").mkdir()  # so that it cannot be replaced by a file
    ran = tmp_path / "ran"
    _, said = run(
        tmp_path, json.dumps(payload(tmp_path, scope, command=["touch", str(ran)])).encode()
    )
    assert json.loads(said)["error"].startswith("its record cannot be written: ")
    assert not ran.exists()


def test_a_directory_that_goes_away_is_survived(tmp_path: Path, scope: str) -> None:
    directory = tmp_path / "one"
    directory.mkdir()
    run(directory, json.dumps(payload(tmp_path, scope, command=["sleep", "0.3"])).encode())
    parent = json.loads((directory / "record.json").read_text())["keeper"]["pid"]
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    until(lambda: not runs(parent), "the keeper's end")


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        program.write_json(handle, "a.json", {"b": "ü"})
        with pytest.raises(TypeError):
            program.write_json(handle, "a.json", {"b": object()})
    finally:
        os.close(handle)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": "ü"}
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_waiting_costs_nearly_nothing(world: World) -> None:
    world.start("one", ("sleep", "60"))
    pid = world.record("one")["keeper"]["pid"]

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(1.5)
    assert ticks() - before <= 1
