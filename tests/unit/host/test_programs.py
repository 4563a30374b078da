"""Helpers that end, hang, print without end, read nothing, or cannot be run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mic_supervisor.host.programs import Ended, run

SH = ("/bin/sh", "-c")


def test_it_says_how_it_ended_and_what_it_printed() -> None:
    both = run([*SH, "echo out; echo err >&2; exit 3"], 10)
    assert both == Ended(3, b"out\nerr\n", b"")
    apart = run([*SH, "echo out; echo err >&2; kill -9 $$"], 10, apart=True)
    assert apart == Ended(-9, b"out\n", b"err\n")


def test_what_it_is_given_may_be_opened_again_or_left_unread() -> None:
    given = b"x" * (1 << 20)  # more than a pipe holds
    assert run([*SH, "cat /dev/stdin | wc -c"], 10, given=given).output == b"1048576\n"
    assert run(["/bin/true"], 10, given=given).code == 0
    assert run(["/bin/cat"], 10) == Ended(0, b"", b"")


@pytest.mark.parametrize(("last", "kept"), [(False, b"begin"), (True, b"final")])
def test_of_its_output_no_more_is_kept_than_asked_for(last: bool, kept: bytes) -> None:
    text = "printf begin; head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2; printf final"
    for apart in (False, True):
        done = run([*SH, text], 20, apart=apart, most=5, last=last)
        assert (done.code, done.output, len(done.errors)) == (0, kept, 5 * apart)


def test_past_its_time_its_session_is_killed(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run([*SH, f"sleep 600 & echo $! > {tmp_path}/child; echo so far; wait"], 0.5)
    assert done == Ended(None, b"so far\n", b"")
    assert time.monotonic() - began < 10
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    for _ in range(500):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child lives")


def test_one_that_prints_without_end_is_ended_in_time() -> None:
    done = run(["yes"], 0.5, most=100)
    assert (done.code, len(done.output)) == (None, 100)


def test_a_child_that_holds_its_output_is_not_waited_for() -> None:
    began = time.monotonic()
    assert run([*SH, "sleep 60 & echo done"], 50) == Ended(0, b"done\n", b"")
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(
    ("command", "options", "cause"),
    [
        (["/nowhere"], {}, "No such file or directory"),
        (["/etc/passwd"], {}, "Permission denied"),
        (["a\0b"], {}, "embedded null byte"),
        (["true"], {"cwd": "/nowhere"}, "No such file or directory"),
        (["true"], {"env": {"A=": "b"}}, "illegal environment variable name"),
        (["true", "x" * (3 << 20)], {}, "Argument list too long"),
    ],
)
def test_one_that_cannot_be_run_is_an_os_error(
    command: list[str], options: dict[str, object], cause: str
) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError) as caught:
        run(command, 10, given=b"x", **options)  # type: ignore[arg-type]
    assert caught.value.strerror == cause
    assert sorted(Path("/proc/self/fd").iterdir()) == before
