"""What an unquoted scalar is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.config.yaml import resolve


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
