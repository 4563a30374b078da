"""Ending processes: what may change between the look and the signal."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.cli.kill import report
from mic_supervisor.errors import MicError
from mic_supervisor.host import processes
from mic_supervisor.kill import Hold, Result, Survey, Target, chosen, end
from mic_supervisor.model import (
    Gpu,
    GpuInventory,
    GpuProcess,
    Identity,
    ObservedWorkload,
    Owner,
    OwnerKind,
    RunState,
    RuntimeView,
)

EMPTY = GpuInventory("nvml", gpus=(Gpu("GPU-a", 0, "x", processes=()),))
NOTHING = Survey(EMPTY, ())


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)
    yield made
    made.kill()
    made.wait()


def test_a_process_that_is_not_there_cannot_be_killed(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    listed = Gpu("GPU-b", 1, "x", processes=(GpuProcess(process.pid, None, 1, None),))
    for gpu, tail in ((EMPTY.gpus[0], ""), (listed, ", although GPU 1 lists it")):
        with pytest.raises(MicError) as caught:
            chosen(Survey(GpuInventory("nvml", gpus=(gpu,)), ()), process.pid, "x", force=False)
        assert str(caught.value) == f"cannot kill {process.pid}: there is no such process{tail}"


def target_of(process: subprocess.Popen[bytes], *, holds: bool = False) -> Target:
    found = NOTHING.target(process.pid)
    assert found is not None
    return replace(found, holds=(Hold(0, "GPU-a", 1),) if holds else ())


def managed(pid: int) -> Survey:
    """A look that finds the process to be an instance of ours."""
    identity = Identity("s", "h", "m-0", "m", "process", ("GPU-a",), {}, None, "x")
    workload = ObservedWorkload("subprocess", "n", "n", identity, RunState.RUNNING, pid=pid)
    return Survey(EMPTY, (RuntimeView("subprocess", (workload,)),))


def outcome(result: list[Result]) -> tuple[str, bool]:
    (one,) = result
    return one.outcome, one.killed


def test_one_that_became_ours_meanwhile_is_left_alone(process: subprocess.Popen[bytes]) -> None:
    look = managed(process.pid)
    assert outcome(end([target_of(process)], lambda: look, grace=0.1)) == ("changed", False)
    assert process.poll() is None


def test_before_kill_it_is_looked_at_again(tmp_path: Path) -> None:
    """TERM is ignored; by the time of KILL the process belongs to an instance."""
    script = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        looks = iter([NOTHING])
        result = end([target_of(process)], lambda: next(looks, managed(process.pid)), grace=0.1)
        assert outcome(result) == ("changed", False)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_one_that_ended_before_the_first_signal(process: subprocess.Popen[bytes]) -> None:
    target = target_of(process)
    process.kill()
    process.wait()
    assert outcome(end([target], lambda: NOTHING, grace=0.1)) == ("gone", False)


def test_what_kill_does_not_end_stays(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def into_the_void(pid: int, started: int, number: int) -> bool:
        sent.append(number)
        return True

    monkeypatch.setattr(processes, "send_signal", into_the_void)
    result = end([target_of(process)], lambda: NOTHING, grace=0.1, kill_wait=0.1)
    assert outcome(result) == ("stays", True)
    assert sent == [15, 9]


def test_a_gpu_that_cannot_be_read_afterwards_is_not_taken_for_empty(
    process: subprocess.Popen[bytes],
) -> None:
    broken = Survey(GpuInventory("nvml", error="cannot read GPUs: gone"), ())
    result = end([target_of(process, holds=True)], lambda: broken, grace=5, release_wait=0.1)
    assert outcome(result) == ("unknown", False)


@pytest.mark.parametrize(("start_time", "expected"), [(None, "listed"), (1, "ended")])
def test_a_pid_that_went_to_another_process_is_no_hold_of_the_old(
    process: subprocess.Popen[bytes], start_time: int | None, expected: str
) -> None:
    left = GpuProcess(process.pid, None, 1, start_time)
    look = Survey(GpuInventory("nvml", gpus=(Gpu("GPU-a", 0, "x", processes=(left,)),)), ())
    result = end([target_of(process, holds=True)], lambda: look, grace=5, release_wait=0.1)
    assert outcome(result) == (expected, False)


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ({"outcome": "ended"}, 0, "7 (python) ended\n"),
        (
            {"outcome": "ended", "killed": True},
            0,
            "7 (python) was killed: it did not end within 10 s of TERM\n",
        ),
        ({"outcome": "gone"}, 0, "7 (python) had ended before\n"),
        ({"outcome": "changed"}, 1, "error: 7 was left alone: another one owns it by now\n"),
        (
            {"outcome": "stays", "killed": True},
            70,
            "error: cannot kill 7: it is still there after KILL; it waits inside the kernel, in "
            "most cases for the driver\n"
            "hint: see dmesg | grep -i -e xid -e nvrm; only a reboot helps for sure\n",
        ),
        (
            {"outcome": "unknown"},
            70,
            "error: 7 (python) ended, but GPU 3 cannot be read\n"
            "hint: see mic-supervisor gpus, and dmesg | grep -i -e xid -e nvrm\n",
        ),
        ({"outcome": "denied"}, 77, "error: cannot kill 7: permission denied\nhint: run as root\n"),
    ],
)
def test_what_is_said_of_each(
    found: dict[str, Any], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Target(7, 1, "python", 0.0, (Hold(3, "GPU-a", None),), Owner(OwnerKind.ORPHAN))
    assert report([Result(target, **found)], 10.0) == code
    shown = capsys.readouterr()
    assert shown.out + shown.err == said
