"""What is found out before a start, and commands that probe."""

from __future__ import annotations

import os
import time
from itertools import chain, repeat
from pathlib import Path

import pytest

from mic_supervisor.errors import PreflightFailed, RuntimeRefused
from mic_supervisor.model import Limits, ProcessSpec
from mic_supervisor.runtimes import TIMED_OUT, checks
from tests.support.waiting import until
from tests.unit.runtimes.process_world import STUBBORN, World, python, sh

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may switch users")


def test_what_can_be_started_is_fit_to_start(world: World) -> None:
    said: list[str] = []
    world.runtime.prepare(world.launch("one", ("sleep", "60")), said.append)
    world.runtime.prepare(world.launch("one", ("sleep", "60")), said.append)
    assert said == []
    assert world.directory.stat().st_mode & 0o777 == 0o700
    assert list(world.directory.iterdir()) == []


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Executables that are none, each in its own way, and one that is."""
    path = tmp_path / "bin"
    path.mkdir()
    for name, text, mode in (
        ("plain", "#!/bin/sh\n", 0o644),
        ("orphan", "#!/venv/that/was/moved/python -I\n", 0o755),
        ("script", "#!/bin/sh\nexit 0\n", 0o755),
    ):
        (path / name).write_text(text)
        (path / name).chmod(mode)
    return path


@pytest.mark.parametrize(
    ("command", "reason", "hint"),
    [
        ("{0}/none", "cannot run {0}/none: it does not exist", None),
        ("{0}", "cannot run {0}: it is not a file", None),
        ("{0}/plain", "cannot run {0}/plain: it is not executable", "chmod +x {0}/plain"),
        (
            "{0}/orphan",
            "cannot run {0}/orphan: its interpreter /venv/that/was/moved/python does not exist",
            "a virtual environment that was moved has to be made again",
        ),
        (
            "none",
            "cannot run none: it is not on the PATH {0}",
            "write its absolute path, or set PATH in `env`",
        ),
        ("", "cannot run an empty command", None),
        ("a\0b", "cannot run a\N{REPLACEMENT CHARACTER}b: an argument holds a NUL", None),
    ],
)
def test_a_program_that_is_not_there_is_found_missing(
    programs: Path, command: str, reason: str, hint: str | None
) -> None:
    spec = ProcessSpec((command.format(programs),), env=(("PATH", str(programs)),))
    with pytest.raises(PreflightFailed) as raised:
        checks.preflight(spec)
    assert str(raised.value) == reason.format(programs)
    assert raised.value.hint == (hint and hint.format(programs))


@pytest.mark.parametrize("command", ["{0}/script", "script", "./bin/script"])
def test_a_program_is_found_as_the_kernel_would(programs: Path, command: str) -> None:
    checks.preflight(
        ProcessSpec(
            (command.format(programs),),
            env=(("PATH", str(programs)),),
            working_dir=str(programs.parent),
        )
    )


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            {"working_dir": "/nowhere"},
            "cannot run in /nowhere: it does not exist",
        ),
        (
            {"working_dir": "/etc/passwd"},
            "cannot run in /etc/passwd: it is not a directory",
        ),
        (
            {"working_dir": "etc"},
            "cannot run in etc: working_dir is not an absolute path",
        ),
        (
            {"limits": Limits(memory=1 << 30)},
            "cannot keep limits.memory: a process without systemd has no control group",
        ),
        (
            {"limits": Limits(cpus=1.5)},
            "cannot keep limits.cpus: a process without systemd has no control group",
        ),
        (
            {"limits": Limits(numa="near")},
            "cannot keep limits.numa: a process without systemd has no control group",
        ),
        (
            {"stop_signal": "SIGNONE"},
            "cannot stop it with SIGNONE: there is no such signal",
        ),
        (
            {"user": "no-such-user"},
            "cannot run as no-such-user: there is no user no-such-user",
        ),
        (
            {"user": "root:no-such-group"},
            "cannot run as root:no-such-group: there is no group no-such-group",
        ),
        (
            {"env": (("A=B", "1"),)},
            "cannot set the variable 'A=B': that is not a name",
        ),
        (
            {"env": (("A", "secret\0"),)},
            "cannot set the variable A: its value holds a NUL",
        ),
    ],
)
def test_what_cannot_be_had_is_said(spec: dict[str, object], reason: str) -> None:
    with pytest.raises(PreflightFailed) as raised:
        checks.preflight(ProcessSpec(("true",), **spec))  # type: ignore[arg-type]
    assert str(raised.value) == reason


def test_a_path_that_the_kernel_refuses_is_a_reason_like_others(world: World) -> None:
    launch = world.launch("one", ("/" + "x" * 300,))
    with pytest.raises(PreflightFailed) as raised:
        world.runtime.prepare(launch, print)
    assert str(raised.value).startswith("cannot start one: [Errno 36] File name too long")


@as_root
def test_a_program_that_its_user_cannot_reach_is_found(tmp_path: Path) -> None:
    program = tmp_path / "serve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    tmp_path.chmod(0o700)
    checks.preflight(ProcessSpec((str(program),)))
    with pytest.raises(PreflightFailed) as raised:
        checks.preflight(ProcessSpec((str(program),), user="nobody"))
    assert str(raised.value) == f"cannot run as nobody: that user has no access to {program}"
    with pytest.raises(PreflightFailed) as raised:
        checks.preflight(ProcessSpec(("true",), user="nobody", working_dir=str(tmp_path)))
    assert str(raised.value) == f"cannot run as nobody: that user has no access to {tmp_path}"


def test_who_is_not_root_is_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr(os, "getegid", lambda: 65534)
    assert not checks.account("nobody").switch
    assert not checks.account(None).switch
    for user in ("root", "0", "nobody:0", "1:1"):
        with pytest.raises(PreflightFailed, match=f"cannot run as {user}: only root may run"):
            checks.account(user)


def test_who_is_not_root_raises_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    checks.preflight(ProcessSpec(("true",), limits=Limits(nofile=4096)))
    for limits, text in (
        (Limits(nofile=4097), "RLIMIT_NOFILE to 4097"),
        (Limits(memlock=-1), "RLIMIT_MEMLOCK to unlimited"),
    ):
        with pytest.raises(PreflightFailed) as raised:
            checks.preflight(ProcessSpec(("true",), limits=limits))
        assert str(raised.value) == (
            f"cannot set {text}: the hard limit is 4096, and only root may raise it"
        )


@pytest.mark.parametrize(
    ("name", "number"),
    [("SIGTERM", 15), ("term", 15), ("INT", 2), ("9", 9), ("SIGNONE", None), ("0", None)],
)
def test_signals_have_names_and_numbers(name: str, number: int | None) -> None:
    assert checks.signal_number(name) == number


# --- probing ----------------------------------------------------------------------------------


def test_a_check_says_how_it_went(world: World, tmp_path: Path) -> None:
    seen = world.start("one", ("sleep", "60"), working_dir=str(tmp_path), env=(("TOKEN", "x"),))
    check = world.runtime.run_check
    assert check(seen, sh("echo ok; echo not >&2; exit 3"), 5) == (3, "ok\nnot")
    assert check(seen, ("pwd",), 5) == (0, str(tmp_path))
    assert check(seen, sh("kill -KILL $$"), 5) == (137, "")
    code, text = check(seen, ("/usr/bin/env",), 5)
    names = sorted(line.partition("=")[0] for line in text.splitlines())
    assert (code, names) == (0, ["HOME", "LANG", "MIC_CHECK_ID", "PATH"])


@as_root
def test_a_check_runs_as_the_user_of_its_process(world: World) -> None:
    seen = world.start("one", ("sleep", "60"), user="nobody")
    assert world.runtime.run_check(seen, sh("id -un; id -G"), 5) == (0, "nobody\n65534")


def test_a_check_ends_at_its_deadline_with_all_it_started() -> None:
    """The clock is beyond the deadline when it has printed something: all has been started then."""
    mark = f"check-{os.getpid()}-{time.monotonic_ns()}"
    text = f"MARK = '{mark}'\nescape(1)\nprint('so far', flush=True)"
    moments = chain([0.0, 0.0], repeat(1000.0))  # its beginning, and before it is waited for
    found = checks.run_check(
        python(f"{STUBBORN}{text}\ntime.sleep(600)"),
        60.0,
        checks.account(None),
        "/",
        clock=lambda: next(moments),
    )
    assert found == (TIMED_OUT, "it did not end within 60 s: so far")
    until(lambda: not marked(mark), "all that it started to be gone")


def test_a_check_leaves_nothing_behind(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    mark = f"check-{os.getpid()}-{time.monotonic_ns()}"
    text = STUBBORN + f"MARK = '{mark}'\nescape(1)\nprint('done')"
    # The pipe is held open: who waits for its end is late.
    assert world.runtime.run_check(seen, python(text), 60) == (0, "done")
    until(lambda: not marked(mark), "all that it started to be gone")


def marked(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if mark.encode() in (entry / "cmdline").read_bytes() and state != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_check_that_never_stops_talking_is_cut(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    code, said = world.runtime.run_check(seen, ("yes",), 0.3)
    assert code == TIMED_OUT
    assert len(said) < 5000


def test_a_check_that_cannot_be_run_is_no_verdict(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    with pytest.raises(RuntimeRefused) as raised:
        world.runtime.run_check(seen, ("/nowhere/check",), 1)
    assert str(raised.value) == (
        "cannot run /nowhere/check: [Errno 2] No such file or directory: '/nowhere/check'"
    )
    with pytest.raises(RuntimeRefused, match="cannot run an empty check"):
        world.runtime.run_check(seen, (), 1)
