"""Reasons are data; their sentences are made in one place, and stand in the docs."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pytest

from mic_supervisor.plan.actions import Blocked
from mic_supervisor.plan.words import Code, Reason, because, gpu_names, moment, shortened, size

DOCS = Path(__file__).parents[3] / "docs" / "http.md"


def facts_of(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize("code", Code)
def test_a_hint_needs_only_facts_that_are_known_where_the_sentence_is_made(code: Code) -> None:
    facts = facts_of(code.sentence) | facts_of(code.hint or "") | {"model"}
    reason = because(code, **{name: f"<{name}>" for name in facts})
    assert not re.search(r"[{}]", f"{reason} {reason.hint}")


def test_the_docs_list_every_code_with_its_sentence() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    table = {name: text for name, text in rows if name.upper() in Code.__members__}
    assert table == {code.name.lower(): code.sentence for code in Code}


def test_what_a_fact_says_is_never_taken_for_a_template() -> None:
    assert str(because(Code.BACKOFF, failure="no {image}; {0}")) == "backoff: no {image}; {0}"


def test_a_reason_within_another_is_worded_in_it_and_found_in_it() -> None:
    inner = because(Code.BACKOFF, failure="it broke")
    also = because(Code.WOULD, kind="start", cause=because(Code.ENDED, end="it ended"))
    outer = Reason(Code.WOULD_BE_BLOCKED, {"blocked": inner}, (also,))
    assert str(outer) == "would be blocked: backoff: it broke; would start: it ended"
    assert outer.is_about("it broke")
    assert outer.is_about("it ended")
    assert not outer.is_about("it")
    assert outer.code == "would_be_blocked"


def test_the_hint_of_a_reason_goes_before_that_of_its_code() -> None:
    assert because(Code.ROLLED_BACK, failure="x", instance="a-1").hint == (
        "change the file, or: mic-supervisor retry a-1"
    )
    assert because(Code.ROLLED_BACK, failure="x", hint="look").hint == "look"
    assert because(Code.RUNTIME_OFF, off="it is off", hint=None).hint is None


def test_what_is_blocked_tells_by_its_reason_whether_it_is_paused_or_queues() -> None:
    paused = Blocked("a", because(Code.PAUSED, since="12:00:00", note=""))
    queued = Blocked("a", because(Code.WAITS_FOR_STRANGER, gpu=0, who="PID 1", whose=""))
    full = {"vram": "1", "gpu": 0, "name": "H200", "free": "0", "who": "PID 1"}
    assert [(one.paused, one.queued) for one in (paused, queued)] == [(True, False), (False, True)]
    assert Blocked("a", because(Code.GPU_TOO_FULL, **full, queued=True)).queued
    assert not Blocked("a", because(Code.GPU_TOO_FULL, **full, queued=False)).queued


def test_pieces_of_sentences() -> None:
    assert shortened(["a", "b"]) == "a, b"
    assert shortened(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert gpu_names(["u", "v"], {"u": 3}) == "GPU 3,v"
    assert gpu_names([], {}) == "no GPU"
    assert size(1) == "1 MiB"
    assert size(3 << 29) == "1.5 GiB"
    assert moment(600.0, 600.0 + 86400).startswith("1970-01-01 ")
