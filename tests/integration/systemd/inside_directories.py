"""The directories that a process wants to find, made by PID 1, from within the machine."""

from __future__ import annotations

import pwd
import stat
from pathlib import Path

import pytest

from mic_supervisor.errors import RuntimeRefused
from tests.integration.systemd.world import World, run
from tests.support.commands import sh


def shown(path: Path) -> tuple[str, str]:
    seen = path.stat()
    return f"{stat.S_IMODE(seen.st_mode):o}", pwd.getpwuid(seen.st_uid).pw_name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o055)
    return tmp_path


@pytest.mark.parametrize("user", [None, "alice"])
def test_the_program_finds_them(world: World, base: Path, user: str | None) -> None:
    own = base / "data" / "mam 1"
    directories = (str(own), str(own / "user"))
    command = sh(f"cd '{own}/user' && touch mine && echo done")
    world.runtime.start(world.launch("a", command, user=user, directories=directories))
    world.ended("a")
    assert world.lines("a") == ["done"]
    assert shown(base / "data") == ("755", "root")
    assert shown(own) == ("700", user or "root")
    assert shown(own / "user") == ("700", user or "root")


def test_they_survive_a_daemon_reload(world: World, base: Path) -> None:
    launch = world.launch("a", sh("sleep 60"), directories=(str(base / "own"),))
    world.runtime.start(launch)
    run("systemctl", "daemon-reload")
    (workload,) = world.runtime.observe().workloads
    assert workload.pid is not None
    world.runtime.stop(workload, signal="SIGTERM", grace=30)


def test_why_they_cannot_be_made_is_told(world: World, base: Path) -> None:
    (base / "file").write_text("")
    launch = world.launch("a", sh("echo never"), directories=(str(base / "file"),))
    with pytest.raises(RuntimeRefused) as caught:
        world.runtime.start(launch)
    assert f"cannot make the directory {base}/file: File exists" in str(caught.value)
    assert world.loaded() == []
