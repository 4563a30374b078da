"""The scalar types of the file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.config.types import (
    format_duration,
    parse_duration,
    parse_positive_duration,
    parse_size,
)
from mic_supervisor.config.yaml.words import resolve


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
        *[(0, 0), (512, 512), ("512", 512), ("512b", 512), ("1k", 1024), ("1KiB", 1024)],
        *[("512m", 512 << 20), ("1.5g", 3 << 29), ("20GiB", 20 << 30), ("1t", 1 << 40)],
    ],
)
def test_sizes(value: object, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize("value", ["", "g", -1, "-1", True, None, 1.5, "1GB", "1 g", "9" * 400])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(value)


@pytest.mark.parametrize("value", ["2000t", 1 << 51, "999999999999999t"])
def test_a_size_has_an_end(value: object) -> None:
    with pytest.raises(ValueError, match="is more than any machine has"):
        parse_size(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("", None), ("0", 0), ("-7", -7), ("42", 42), ("1.50", 1.5), ("-0.5", -0.5)],
        *[("true", True), ("False", False), ("none", "none"), ("3,4", "3,4"), ("0-3", "0-3")],
        *[("3b:00.0", "3b:00.0"), ("00000000:3B:00.0", "00000000:3B:00.0"), ("1.2.3", "1.2.3")],
        *[("8080:80", "8080:80"), ("nvidia/x:25.04", "nvidia/x:25.04"), ("5m", "5m"), ("-", "-")],
        *[("onward", "onward"), ("--port", "--port"), ("1e", "1e"), ("0xyz", "0xyz")],
    ],
)
def test_what_an_unquoted_scalar_is(text: str, value: object) -> None:
    assert resolve(text) == (value, None)
    assert type(resolve(text)[0]) is type(value)


@given(st.text(alphabet="0123456789.:_-+eExXoOaAfFnNyYtT~ ", max_size=12))
def test_pyyaml_and_we_agree_on_all_that_is_not_refused(text: str) -> None:
    """Where nothing is refused, a reader that knows YAML 1.1 takes it for the same."""
    import yaml

    value, problem = resolve(text)
    if problem is None and text.strip() == text and text:
        tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
        kinds = {type(None): "null", bool: "bool", int: "int", float: "float", str: "str"}
        assert tag == f"tag:yaml.org,2002:{kinds[type(value)]}"
