"""Directories that a process finds when it starts: made once, by and for the right user."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mic_supervisor.errors import PreflightFailed
from mic_supervisor.model import ProcessSpec
from mic_supervisor.runtimes import checks
from tests.unit.runtimes.process_world import World, sh

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
NOBODY = "nobody"


def spec(*directories: Path, user: str | None = None) -> ProcessSpec:
    return ProcessSpec(("true",), user=user, directories=tuple(map(str, directories)))


def shown(path: Path) -> tuple[str, str]:
    seen = path.stat()
    return f"{stat.S_IMODE(seen.st_mode):o}", pwd.getpwuid(seen.st_uid).pw_name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory that every user may enter."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    return tmp_path


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_each_is_made_with_its_parents(base: Path) -> None:
    own = base / "data" / "mam-1"
    with umask(0o077):
        checks.make_directories(spec(own, own / "user"))
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert shown(base / "data") == ("755", me)
    assert shown(own) == ("700", me)
    assert shown(own / "user") == ("700", me)


def test_what_is_there_stays_as_it_is(base: Path) -> None:
    own = base / "mam-1"
    own.mkdir(mode=0o755)
    (own / "kept").write_text("x")
    checks.make_directories(spec(own))
    checks.make_directories(spec(own))
    assert shown(own)[0] == "755"
    assert (own / "kept").read_text() == "x"


@AS_ROOT
def test_they_belong_to_the_user(base: Path) -> None:
    own = base / "data" / "mam-1"
    checks.make_directories(spec(own, own / "user", own / "a" / "b", user=NOBODY))
    assert shown(base / "data") == ("755", "root")
    for path in (own, own / "user", own / "a" / "b"):
        assert shown(path) == ("700", NOBODY)


@AS_ROOT
def test_nothing_is_made_through_a_users_link_with_more_than_its_rights(base: Path) -> None:
    own, secret = base / "mam-1", base / "secret"
    checks.make_directories(spec(own, user=NOBODY))
    secret.mkdir()
    (own / "user").symlink_to(secret)
    with pytest.raises(PreflightFailed, match=r"cannot make the directory .*: Permission denied"):
        checks.make_directories(spec(own, own / "user" / "deep", user=NOBODY))
    assert list(secret.iterdir()) == []


@AS_ROOT
def test_one_that_the_user_cannot_write_is_told_before_anything_is_stopped(base: Path) -> None:
    own = base / "mam-1"
    checks.make_directories(spec(own, own / "user"))
    with pytest.raises(PreflightFailed) as caught:
        checks.make_directories(spec(own, own / "user", user=NOBODY))
    assert str(caught.value) == f"cannot use the directory {own}: nobody may not write there"
    assert caught.value.hint == f"see which part keeps it out: namei -l {own}"


@AS_ROOT
def test_so_is_a_parent_that_keeps_the_user_out(base: Path) -> None:
    (base / "state").mkdir(mode=0o700)
    with pytest.raises(PreflightFailed, match=r"cannot use the directory .*/state/mam-1: nobody"):
        checks.make_directories(spec(base / "state" / "mam-1", user=NOBODY))


def test_as_a_program(base: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-I", "-c", checks.PROGRAM, "", *arguments]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True)
        return done.returncode, done.stderr

    own = base / "with space" / "mam-1"
    assert run(str(own), str(own / "user")) == (0, "")
    assert (own / "user").is_dir()
    (base / "file").write_text("")
    assert run(str(base / "file")) == (
        1,
        f"cannot make the directory {base}/file: File exists "
        "(make room for it, or name another directory in the file)\n",
    )


def test_a_file_in_its_place_is_told(base: Path) -> None:
    (base / "mam-1").write_text("")
    with pytest.raises(PreflightFailed, match=r"cannot make the directory .*/mam-1: File exists"):
        checks.make_directories(spec(base / "mam-1"))


def test_a_file_among_the_parents_is_told(base: Path) -> None:
    (base / "data").write_text("")
    with pytest.raises(PreflightFailed, match="cannot make the directory"):
        checks.make_directories(spec(base / "data" / "mam-1"))


def test_the_program_finds_them(base: Path, scope: str) -> None:
    world = World(base / "world", scope)
    own = base / "mam-1"
    command = sh(f"test -d {own}/user && echo there; sleep 60")
    launch = world.launch("mam-1", command, directories=(str(own), str(own / "user")))
    world.runtime.start(launch)
    (workload,) = world.runtime.observe().workloads
    assert next(iter(world.runtime.logs(workload, follow=True))) == "there"
    world.runtime.stop(workload, signal="SIGTERM", grace=1.0)


def test_prepare_makes_them_too(base: Path, scope: str) -> None:
    world = World(base / "world", scope)
    own = base / "mam-1"
    world.runtime.prepare(world.launch("mam-1", ("true",), directories=(str(own),)), lambda _: None)
    assert own.is_dir()
