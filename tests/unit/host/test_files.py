"""The one reader: regular files of a bounded size, without waiting."""

from __future__ import annotations

import errno
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mic_supervisor.host import files
from mic_supervisor.host.files import (
    fingerprint,
    read_file,
    read_in_time,
    read_text,
    set_aside,
)


def test_reads_a_regular_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xe4\xb8\xad\n")
    assert read_file(path) == b"\xe4\xb8\xad\n"
    assert read_text(path) == "中\n"


def test_follows_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    assert read_text(tmp_path / "b") == "x"


@pytest.mark.parametrize("size", [0, 99, 100])
def test_takes_what_is_as_large_as_allowed(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(b"x" * size)
    assert len(read_file(tmp_path / "a", most=100)) == size


def test_refuses_what_is_larger(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 2049)
    with pytest.raises(OSError, match="it is larger than 2 KiB") as caught:
        read_file(tmp_path / "a", most=2048)
    assert caught.value.errno == errno.EFBIG


def test_does_not_wait_for_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(OSError, match="it is not a regular file"):
        read_file(tmp_path / "a")


def test_does_not_read_a_device() -> None:
    with pytest.raises(OSError, match="it is not a regular file"):
        read_file(Path("/dev/zero"))


def test_says_what_else_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, code in {
            tmp_path: errno.EISDIR,
            tmp_path / "none": errno.ENOENT,
            tmp_path / "loop": errno.ELOOP,
            tmp_path / "socket": errno.ENXIO,
            Path(f"{tmp_path}/a\0b"): errno.EINVAL,
        }.items():
            with pytest.raises(OSError) as caught:
                read_file(path)
            assert caught.value.errno == code
            assert caught.value.strerror


def test_a_read_that_hangs_is_left_and_fails_at_once_until_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("x")
    other.write_text("y")
    answers, asked = threading.Event(), []

    def hangs(path: Path) -> str:
        asked.append(path)
        assert answers.wait(60)
        return read_text(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "read_text", hangs)
        with pytest.raises(TimeoutError, match=r"it does not answer within 0\.1 s"):
            read_in_time(path, seconds=0.1)
        with pytest.raises(TimeoutError, match="it has not answered since"):
            read_in_time(path, seconds=60)
        assert asked == [path]
    assert read_in_time(other) == "y"
    answers.set()
    for thread in threading.enumerate():
        if thread.name == "mic-in-time":
            thread.join(60)
    assert read_in_time(path) == "x"


def test_what_a_read_raises_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_in_time(tmp_path / "none")
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_in_time(tmp_path / "a")


def test_what_is_set_aside_takes_no_name_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.damaged-1").symlink_to("nowhere")
    (tmp_path / "a").mkdir()
    assert set_aside(tmp_path / "a") == tmp_path / "a.damaged-2"
    assert (tmp_path / "a.damaged-2").is_dir()


def test_a_read_under_way_is_no_read_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop and a reload read the same env file at the same time."""
    path = tmp_path / "a"
    path.write_text("x")
    both = threading.Barrier(2, timeout=60)

    def together(path: Path) -> str:
        both.wait()
        return read_text(path)

    monkeypatch.setattr(files, "read_text", together)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(read_in_time, path, seconds=60) for _ in range(2)]
        assert [one.result() for one in found] == ["x", "x"]


def test_a_fingerprint_changes_with_names_sizes_and_times(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_text("x")
    seen = [fingerprint(tmp_path)]
    (tmp_path / "1" / ".swap").write_text("an editor's")
    assert fingerprint(tmp_path) == seen[0]
    (tmp_path / "1" / "model.onnx").write_text("xy")
    seen.append(fingerprint(tmp_path))
    os.utime(tmp_path / "1" / "model.onnx", (0, 0))
    seen.append(fingerprint(tmp_path))
    (tmp_path / "1").rename(tmp_path / "2")
    seen.append(fingerprint(tmp_path))
    assert len({*seen}) == 4


def test_a_fingerprint_sees_what_a_link_leads_to_and_ends_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "1").symlink_to("../weights")
    (tmp_path / "model" / "gone").symlink_to("nothing")
    (tmp_path / "weights" / "back").symlink_to("../model")
    before = fingerprint(tmp_path / "model")
    (tmp_path / "weights" / "a").write_text("xy")
    assert fingerprint(tmp_path / "model") != before


def test_no_fingerprint_of_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "nothing")
