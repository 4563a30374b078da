"""Multiplexed logs as lines, however the bytes come."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.runtimes.docker.streams import documents, frames, lines


def frame(number: int, data: bytes) -> bytes:
    return struct.pack(">BxxxL", number, len(data)) + data


def read(data: bytes) -> list[str]:
    return list(lines(frames(io.BytesIO(data).read)))


def test_streams_do_not_cut_each_other() -> None:
    data = frame(1, b"one ") + frame(2, b"err\n") + frame(1, b"line\r\ntwo") + frame(2, b"rest")
    assert read(data) == ["err", "one line", "two", "rest"]


def test_no_bytes_are_no_lines() -> None:
    assert read(b"") == []
    assert read(frame(1, b"")) == []
    assert read(frame(1, b"\n\n")) == ["", ""]


def test_bytes_that_are_no_text() -> None:
    assert read(frame(1, b"\xff\xc3\xa9\n")) == ["\N{REPLACEMENT CHARACTER}é"]


def test_a_character_cut_in_two_by_frames() -> None:
    assert read(frame(1, b"h\xc3") + frame(1, b"\xa9\n")) == ["hé"]


@pytest.mark.parametrize("length", [3, 8, 10])
def test_a_stream_that_breaks_off_is_an_error(length: int) -> None:
    with pytest.raises(EOFError):
        read(frame(1, b"hello\n")[:length])


def test_a_line_without_end_is_given_in_pieces() -> None:
    data = b"x" * (1 << 20)
    assert [len(line) for line in read(frame(1, data) + frame(1, data))] == [2 << 20]


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_the_cuts_do_not_matter(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    assert read(b"".join(frame(1, part) for part in parts)) == read(frame(1, whole))


def test_documents() -> None:
    assert list(documents([b'{"a": 1}', b"", b'{"b": 2}\r'])) == [{"a": 1}, {"b": 2}]
    for bad in (b"[1]", b"{"):
        with pytest.raises(ValueError):
            list(documents([bad]))
