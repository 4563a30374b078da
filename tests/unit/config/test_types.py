"""The scalar types of the file."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mic_supervisor.config.types import (
    format_duration,
    format_size,
    parse_duration,
    parse_positive_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("0s", 0), ("30s", 30), ("1.5m", 90), ("1h", 3600), ("8760h", 31536000)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "value", ["", "5", 5, 5.0, True, None, "s", "5 s", "-5s", "5S", "1m30s", "٣s", "9" * 400 + "h"]
)
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(value)


def test_a_duration_has_an_end() -> None:
    with pytest.raises(ValueError, match="8761h is more than a year"):
        parse_duration("8761h")
    with pytest.raises(ValueError, match="0ms is no time at all"):
        parse_positive_duration("0ms")


@given(st.integers(0, 31_536_000_000))
def test_a_formatted_duration_comes_back(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        *[("0b", 0), ("512b", 512), ("512B", 512), ("1k", 1024), ("1KiB", 1024), ("1Ki", 1024)],
        *[("512m", 512 << 20), ("1.5g", 3 << 29), ("20GiB", 20 << 30), ("1t", 1 << 40)],
        *[("2gb", 2 << 30), ("20G", 20 << 30), ("20GB", 20 << 30), ("20 GiB", 20 << 30)],
    ],
)
def test_sizes(value: object, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize(
    "value", ["", "g", -1, "-1", True, None, 1.5, "1  g", "1gg", "80%", "٣g", "9" * 400]
)
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        *[(20000, "`20000m`"), ("20000", "`20000m`"), (20, "`20m` or `20g`"), (0, "`0m` or `0g`")],
        *[(2147483648, "`2g`"), (1610612736, "`1536m`"), (1000000000, "`1000000000b`")],
    ],
)
def test_a_size_without_a_unit_is_refused_and_says_which_it_might_have(
    value: object, meant: str
) -> None:
    with pytest.raises(ValueError, match=f"a number needs a unit: write {meant}$"):
        parse_size(value)
    for size in re.findall("`([^`]+)`", meant):
        parse_size(size)


@given(st.integers(0, 1 << 50))
@example((1 << 50) - 1)
def test_a_formatted_size_comes_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("value", ["2000t", "999999999999999t"])
def test_a_size_has_an_end(value: object) -> None:
    with pytest.raises(ValueError, match="is more than any machine has"):
        parse_size(value)
