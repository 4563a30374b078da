"""A hint is made of whatever stands in the file."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.config import hints
from mic_supervisor.config.options import ModelOptions

_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(
        ["8080:80", "/a:/b", "A=b", "1m30s", "tcp", "CMD-SHELL", "http://x/y", "0:a"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["test", "interval", "retries", "source", "target", "name"])
            | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(hints.KEYS)), _PLAIN)
def test_a_hint_is_made_of_anything(key: str, value: Any) -> None:
    """What the file has there may be of any type; no hint is worth more than an error."""
    known = [*ModelOptions.model_fields, "command"]
    for unavailable in ({}, {"container_port": "no", "mounts": "no"}):
        texts = [hints.for_key(key, value, known, unavailable)]
        for name in ("ports", "env", "probe", "args", "mounts", "networks"):
            for wanted in ("a list", "a map", "a text"):
                texts.append(hints.for_value(name, value, wanted, unavailable)[0])
        assert all(text is None or len(text) < 2100 for text in texts)
