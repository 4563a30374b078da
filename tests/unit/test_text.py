"""What is shown of texts from outside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.converge.events import Event, Events
from mic_supervisor.errors import MicError
from mic_supervisor.plan.words import Code, because
from mic_supervisor.text import LONGEST, one_line, printable, quoted, unseen, without_quotes

HOSTILE = [
    "\x1b[2Jevil",  # clears a terminal
    "a\x9b2Jb",  # the same in one C1 control
    "pay\u202eload",  # shows what follows backwards
    "x\u200by",
    "caf\udce9",  # half a surrogate, from a terminal of another encoding
    "\x00\x07\x7f",
    "one\r\ntwo\u2028three",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_program_says_is_one_line_that_no_terminal_obeys(text: str) -> None:
    assert one_line(text).isprintable()
    one_line(text).encode()


@pytest.mark.parametrize("text", ["", "plain", "换脸 não größe ∅", "a\tb"])
def test_what_can_be_shown_stays(text: str) -> None:
    assert one_line(text) == " ".join(text.split())


@given(st.text(st.characters(exclude_categories=()), max_size=3000))
def test_any_text_becomes_printable_and_bounded(text: str) -> None:
    shown = one_line(text)
    assert shown.isprintable() and len(shown) <= LONGEST
    shown.encode()
    assert one_line(shown) == shown
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_and_an_event_carry_nothing_that_a_terminal_obeys(text: str) -> None:
    error = MicError(f"cannot do it: {text}\nand more", hint=text)
    assert all(line.isprintable() for line in error.message.split("\n"))
    assert all(line.isprintable() for line in (error.hint or "").split("\n"))
    heard: list[Event] = []
    Events([heard.append]).emit(Event("failed", 1.0, "a", text, cause=text))
    assert heard[0].text.isprintable() and heard[0].cause.isprintable()


@given(st.text(st.characters(exclude_categories=()), max_size=300), st.integers(0, 400))
def test_what_somebody_said_stays_within_its_quotes(text: str, cut: int) -> None:
    shown = quoted(text)
    assert shown.isprintable() and without_quotes(f"it said {shown}, and ended", "") == (
        "it said , and ended"
    )
    assert without_quotes(f"it said {shown}"[: cut + 9], "") == "it said "


def test_an_error_a_reason_and_an_event_are_cut() -> None:
    flood = "\n".join(f"line {number}" for number in range(4000))
    error = MicError(f"cannot do it: {flood}", hint="x" * 100_000)
    assert error.message.startswith("cannot do it: line 0\n") and error.message.endswith("\n…")
    assert error.message.count("\n") == 20
    assert error.hint is not None and len(error.hint) < 5000 and error.hint.endswith("…")
    reason = because(Code.RUNTIME_OFF, off=flood)
    assert len(str(reason)) == LONGEST and "\n" not in str(reason) and str(reason).endswith("…")
    heard: list[Event] = []
    Events([heard.append]).emit(Event("failed", 1.0, "n" * 100_000, flood, hint=flood))
    assert [len(text or "") for text in (heard[0].instance, heard[0].text, heard[0].hint)] == (
        [LONGEST] * 3
    )


def test_a_text_of_megabytes_is_cut() -> None:
    assert one_line("x" * 5_000_000) == "x" * (LONGEST - 1) + "…"


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("plain text\twith\r\nblanks", None),
        ("换脸", None),
        ("a\u00a0b", "U+00A0 (NO-BREAK SPACE)"),
        ("a\x1bb", "U+001B (a control character)"),
    ],
)
def test_what_nobody_sees_is_named(text: str, there: str | None) -> None:
    assert unseen(text) == there
