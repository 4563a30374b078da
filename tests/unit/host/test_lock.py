"""The lock of a scope: whose it is."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from mic_supervisor.errors import LockHeld, MicError
from mic_supervisor.host.lock import lock_holder, writer
from tests.support.waiting import until


@pytest.mark.parametrize("was", [None, 0o644, 0o666])
def test_nobody_else_can_open_it_even_where_it_was_made_before(
    tmp_path: Path, was: int | None
) -> None:
    path = tmp_path / "run" / "x.lock"
    if was is not None:
        path.parent.mkdir()
        path.touch()
        path.chmod(was)
    with writer(path, "mic-supervisor run", 1.0):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    target, path = tmp_path / "precious", tmp_path / "x.lock"
    target.write_text("precious")
    path.symlink_to(target)
    with pytest.raises(MicError, match="cannot open the lock"), writer(path, "x", 1.0):
        pass
    assert target.read_text() == "precious"


def _held_by_another(path: Path) -> bool:
    """Whether somebody who opens the file now finds it locked."""
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _opened(path: Path) -> int:
    """How many descriptors of this process are the file at `path`."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link) == str(path) for link in links)


def test_a_list_that_leaves_the_lock_out_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, parts = Path.read_text, ["", "1: FLOCK  ADVISORY  WRITE 1 00:01:1 0 EOF\n"]

    def read_a_part(path: Path) -> str:
        return parts.pop() if path == Path("/proc/locks") and parts else read(path)

    path = tmp_path / "x.lock"
    with writer(path, "mic-supervisor run", 1.0):
        monkeypatch.setattr(Path, "read_text", read_a_part)
        holder = lock_holder(path)
    assert holder is not None and holder.pid == os.getpid()
    assert parts == []
    assert lock_holder(path) is None


def test_a_lock_whose_directory_is_removed_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "x.lock"
    with writer(path, "mic-supervisor run", 1.0) as renew:
        renew()
        inode = path.stat().st_ino
        shutil.rmtree(path.parent)
        renew()
        assert _held_by_another(path)
        holder = lock_holder(path)
        assert holder is not None and holder.pid == os.getpid()
        renew()
        assert path.stat().st_ino != inode or _held_by_another(path)
    assert not _held_by_another(path)


def test_a_lock_that_another_took_meanwhile_is_not_shared(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with writer(path, "mic-supervisor run", 1.0) as renew:
        path.unlink()
        with (
            writer(path, "mic-supervisor apply", 1.0),
            pytest.raises(LockHeld, match=r"PID \d+ \(mic-supervisor apply"),
        ):
            renew()
        renew()
        assert _held_by_another(path)


def test_a_file_that_is_removed_while_its_lock_is_awaited_guards_nothing(tmp_path: Path) -> None:
    """Whoever gets a lock on a file that nobody finds any more would converge beside others."""
    path = tmp_path / "x.lock"
    entered, done = threading.Event(), threading.Event()

    def wait() -> None:
        with writer(path, "second", 60.0):
            entered.set()
            assert done.wait(60)

    with writer(path, "first", 1.0):
        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: _opened(path) == 2, "the second to open the file")
        path.unlink()
    assert entered.wait(60)
    assert _held_by_another(path)
    done.set()
    thread.join(60)
