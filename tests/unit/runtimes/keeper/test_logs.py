"""Logs: whole, from the end, as they grow, and through a rotation."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.runtimes.keeper import logs, program
from tests.support.waiting import until
from tests.unit.runtimes.process_world import World, python, sh


def write(directory: Path, *files: bytes) -> Path:
    """The newest first: log, log.1, log.2."""
    for number, text in enumerate(files):
        (directory / (f"log.{number}" if number else "log")).write_bytes(text)
    return directory


def tail(directory: Path, count: int | None) -> list[str]:
    return list(logs.read(directory, tail=count))


def test_lines_come_oldest_first(tmp_path: Path) -> None:
    write(tmp_path, b"e\nf", b"a\nb\nc\r\nd\n")
    assert tail(tmp_path, None) == ["a", "b", "c", "d", "e", "f"]
    assert tail(tmp_path, 3) == ["d", "e", "f"]
    assert tail(tmp_path, 100) == ["a", "b", "c", "d", "e", "f"]
    assert tail(tmp_path, 0) == []


def test_no_log_has_no_lines(tmp_path: Path) -> None:
    assert tail(tmp_path, None) == []
    write(tmp_path, b"")
    assert tail(tmp_path, 5) == []


def test_what_is_no_text_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, b"a\xffb\n\xe6\x8d\xa2\n")
    assert tail(tmp_path, None) == ["a\ufffdb", "换"]


def test_a_line_without_an_end_is_given_in_pieces(tmp_path: Path) -> None:
    write(tmp_path, b"x" * (3 << 20))
    lines = tail(tmp_path, None)
    assert len(lines) > 1 and sum(map(len, lines)) == 3 << 20


LINES = st.lists(st.text("ab ü", max_size=5), max_size=30)


@given(st.lists(LINES, min_size=1, max_size=2), st.integers(0, 40), st.booleans())
def test_the_end_is_the_end_of_the_whole(
    files: list[list[str]], count: int, complete: bool
) -> None:
    import tempfile
    from unittest.mock import patch

    texts = ["".join(f"{line}\n" for line in lines) for lines in files]
    if not complete:
        texts[0] += "partial"
    whole = [line for text in reversed(texts) for line in text.split("\n")[:-1]]
    whole += [] if complete else ["partial"]
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(logs, "_BLOCK", 7),  # so that lines span blocks
    ):
        path = write(Path(directory), *(text.encode() for text in texts))
        assert tail(path, None) == whole
        assert tail(path, count) == (whole[-count:] if count else [])


class Follower:
    """Reads a log in a thread, as it grows."""

    def __init__(self, directory: Path, count: int | None = None) -> None:
        self.lines: list[str] = []
        self.over = threading.Event()
        self._source = logs.read(
            directory, tail=count, follow=True, ended=self.over.is_set, pause=0.01
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.lines.extend(self._source)

    def end(self) -> list[str]:
        self.over.set()
        self._thread.join(5)
        assert not self._thread.is_alive()
        return self.lines


def test_following_gives_what_is_added(tmp_path: Path) -> None:
    write(tmp_path, b"a\nb\nc\npar")
    follower = Follower(tmp_path, 2)
    until(lambda: follower.lines == ["c"], "the first look")
    with (tmp_path / "log").open("ab") as file:
        for text in (b"tial\n", b"d\n", b"e"):
            file.write(text)
            file.flush()
    assert follower.end() == ["c", "partial", "d", "e"]


def rotate(directory: Path, most: int = 1 << 20) -> None:
    log = os.open(directory / "log", os.O_WRONLY | os.O_APPEND)
    try:
        program.rotate(str(directory), log, most)
    finally:
        os.close(log)


def test_rotating_keeps_one_file(tmp_path: Path) -> None:
    write(tmp_path, b"")
    for number in range(5):
        with (tmp_path / "log").open("ab") as file:
            file.write(b"%d\n" % number)
        rotate(tmp_path)
    assert tail(tmp_path, None) == ["4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]


def test_a_burst_does_not_grow_the_rotated_file(tmp_path: Path) -> None:
    write(tmp_path, b"line\n" * 100_000)
    rotate(tmp_path, most=1000)
    assert (tmp_path / "log.1").stat().st_size == 1000
    assert tail(tmp_path, None) == ["line"] * 200


def test_rotating_on_a_full_disk_keeps_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    write(tmp_path, b"new\n", b"old\n")
    follower = Follower(tmp_path)
    until(lambda: follower.lines == ["old", "new"], "the first look")
    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(OSError, match="No space left"):
        rotate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert tail(tmp_path, None) == ["old"]
    with (tmp_path / "log").open("ab") as file:
        file.write(b"c\n")
    assert follower.end() == ["old", "new", "c"]


def test_following_goes_through_rotations(tmp_path: Path) -> None:
    write(tmp_path, b"")
    follower = Follower(tmp_path)
    expected = []
    with (tmp_path / "log").open("ab", buffering=0) as file:
        for number in range(60):
            file.write(b"line %d\n" % number)
            expected.append(f"line {number}")
            if number % 20 == 0:  # it has seen the rotation before this line
                until(lambda: len(follower.lines) >= len(expected), "it to catch up")
            elif number % 20 == 19:
                rotate(tmp_path)
    assert follower.end() == expected


@pytest.mark.parametrize("count", [None, 40])
def test_a_rotation_while_it_is_read_loses_nothing(tmp_path: Path, count: int | None) -> None:
    write(tmp_path, b"".join(b"line %d\n" % number for number in range(30)), b"old\n")
    lines = logs.read(tmp_path, tail=count)
    first = next(lines)
    rotate(tmp_path)
    with (tmp_path / "log").open("ab") as file:
        file.write(b"line 30\n")
    assert [first, *lines] == ["old", *(f"line {number}" for number in range(31))]


def test_the_end_of_a_large_log_is_read_without_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, b"line\n" * (5 << 20), b"older\n" * (4 << 20))
    asked = []
    real = os.pread

    def counted(handle: int, size: int, offset: int) -> bytes:
        asked.append(size)
        return real(handle, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert tail(tmp_path, 5) == ["line"] * 5
    assert sum(asked) < 1 << 18


def test_the_last_two_runs_are_kept_and_what_is_long_gone_is_forgotten(world: World) -> None:
    for name in ("gone", "recent"):
        (world.logs / name / "run").mkdir(parents=True)
    for path in (world.logs / "gone" / "run", world.logs / "gone"):
        os.utime(path, (0, 0))
    for number in range(3):
        world.start("one", sh(f"echo {number}"))
        seen = world.await_state("one", "exited")
    assert list(world.runtime.logs(seen)) == ["2"]
    assert list(world.runtime.previous_logs(seen)) == ["1"]
    assert len(list((world.logs / "one").iterdir())) == 2
    assert sorted(path.name for path in world.logs.iterdir()) == ["one", "recent"]
    world.runtime.remove(seen)
    assert not (world.logs / "one").exists()


def test_a_log_outlives_the_records(world: World) -> None:
    """As after a restart of the machine, which empties the directory of the records."""
    world.start("one", sh("echo before"))
    world.await_state("one", "exited")
    shutil.rmtree(world.directory)
    seen = world.start("one", ("sleep", "60"))
    assert list(world.runtime.previous_logs(seen)) == ["before"]


def test_logs_that_an_earlier_version_kept_beside_the_record_are_read(world: World) -> None:
    world.start("one", ("true",))
    seen = world.await_state("one", "exited")
    shutil.rmtree(world.logs / "one")
    beside = world.directory / "one"
    (beside / "previous").mkdir()
    write(beside, b"c\n", b"b\n", b"a\n")
    write(beside / "previous", b"first\n")
    assert list(world.runtime.logs(seen)) == ["b", "c"]
    assert list(world.runtime.previous_logs(seen)) == ["first"]
    seen = world.start("one", sh("echo new"))
    until(lambda: list(world.runtime.logs(seen)) == ["new"], "its log")
    assert list(world.runtime.previous_logs(seen)) == ["b", "c"]
    world.await_state("one", "exited")
    world.start("one", ("sleep", "60"))
    assert not list(beside.glob("**/log*"))


def test_a_run_whose_log_finds_no_room_keeps_it_beside_the_record(world: World) -> None:
    world.logs.write_text("a file is in the way, as a full disk would be")
    world.start("one", sh("echo a"))
    seen = world.await_state("one", "exited")
    assert list(world.runtime.logs(seen)) == ["a"]
    with pytest.raises(RuntimeRefused):
        world.runtime.start(world.launch("one", ("/nowhere/serve",)))
    assert world.look("one") == seen
    world.runtime.remove(seen)
    assert list(world.directory.iterdir()) == []


@pytest.mark.slow
def test_a_log_is_capped_while_its_process_runs(world: World) -> None:
    world.runtime = world.make(log_max_size=20_000)
    text = (
        "import time\n"
        "for n in range(400):\n"
        "    print(f'{n:099}', flush=True)\n"
        "    time.sleep(0.01)\n"
        "time.sleep(60)"
    )
    seen = world.start("one", python(text))
    directory = world.log("one").parent
    until(lambda: (directory / "log.1").exists(), "a rotation")
    world.runtime.stop(seen, signal="SIGTERM", grace=5)
    # One second's worth may come on top: that is how often the keeper looks.
    assert all(path.stat().st_size < 40_000 for path in directory.glob("log*"))
    numbers = [int(line) for line in world.runtime.logs(seen)]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert len(numbers) > 150


def test_following_ends_with_the_process(world: World) -> None:
    seen = world.start("one", sh("echo a; sleep 0.4; echo b; printf c"))
    assert list(world.runtime.logs(seen, follow=True)) == ["a", "b", "c"]
    assert world.look("one").exit_code == 0
    assert list(world.runtime.logs(seen, follow=True, tail=1)) == ["c"]


def test_following_ends_when_the_record_is_removed(world: World) -> None:
    seen = world.start("one", sh("echo a; sleep 60"))
    lines = world.runtime.logs(seen, follow=True)
    assert next(lines) == "a"
    world.runtime.stop(seen, signal="SIGTERM", grace=5)
    world.runtime.remove(seen)
    assert list(lines) == []


def test_a_log_that_cannot_be_read_is_said(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    (world.directory / "one" / "record.json").write_text("{")
    with pytest.raises(RuntimeRefused, match="cannot read the log of one: its record"):
        list(world.runtime.logs(seen))


def test_after_a_reboot_logs_that_were_written_lately_stay(tmp_path: Path) -> None:
    """Nothing has a record then, and a directory is as old as the start of its run."""
    store = logs.LogStore(tmp_path / "logs", tmp_path / "records")
    now = time.time()
    for name, age in (("lately", 86400.0), ("long-gone", 8 * 86400.0)):
        run = store.make(name, "a-run")
        write(run, b"a line\n")
        for path, since in ((run / "log", age), (run, 30 * 86400.0), (run.parent, 30 * 86400.0)):
            os.utime(path, (now - since, now - since))
    store.prune("other", now=now)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["lately"]
