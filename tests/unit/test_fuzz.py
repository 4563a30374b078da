"""What `make fuzz` does for minutes, for a moment: see tests/fuzz."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import FOUND, TARGETS, found
from tests.support.examples import examples

SNIPPETS = [
    *(b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\r", b"\t", b"\0", b"\xff"),
    *(
        b"null",
        b"true",
        b"-1",
        b"1e999",
        b"NaN",
        b"9" * 5000,
        b"[" * 5000,
        b'"\\ud800"',
        b"=",
        b"#",
    ),
    *("\u2028".encode(), "\u202e".encode(), "\ufeff".encode(), "坏".encode(), b"\x1b[2J", b"\x85"),
]


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_is_read_raises(name: str) -> None:
    run, seeds = TARGETS[name]
    kept = seeds()
    for data in kept:
        run(data)

    @settings(max_examples=examples(60), database=None)
    @given(
        seed=st.sampled_from(kept),
        edits=st.lists(
            st.tuples(st.floats(0, 1), st.integers(0, 20), st.sampled_from(SNIPPETS)),
            max_size=4,
        ),
    )
    def changed(seed: bytes, edits: list[tuple[float, int, bytes]]) -> None:
        data = seed
        for share, length, snippet in edits:
            at = int(share * len(data))
            data = data[:at] + snippet + data[at + length :]
        run(data)

    @settings(max_examples=examples(60), database=None)
    @given(data=st.binary(max_size=300))
    def any_bytes(data: bytes) -> None:
        run(data)

    changed()
    any_bytes()


def test_what_was_found_once_raises_no_more() -> None:
    for name, target in TARGETS.items():
        for path in found(name):
            target.run(path.read_bytes())


def test_everything_that_was_found_is_of_a_target() -> None:
    assert {path.name for path in FOUND.glob("*")} <= TARGETS.keys()
