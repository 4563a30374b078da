"""journalctl that is missing, fails or hangs: everything ends in time, and in words.

What it says of real units is tested inside of a machine, see tests/integration/systemd.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.runtimes.systemd import journal

RUN = "00112233445566778899aabbccddeeff"


class Journalctl:
    """A stand-in on PATH, which writes down how it was called."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "journalctl"
        self._calls = directory / "calls"

    def does(self, text: str) -> None:
        script = f'#!/bin/sh\n[ "$1" = --sync ] && exit 0\necho "$@" >> {self._calls}\n{text}\n'
        self._path.write_text(script)
        self._path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journalctl:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(journal, "_SHORT", 0.5)
    monkeypatch.setattr(journal, "_SILENCE", 0.6)
    monkeypatch.setattr(journal, "_QUIET", 0.1)
    return Journalctl(tmp_path)


def lines(tail: int | None = None) -> list[str]:
    return [*journal.read("read it", RUN, tail=tail)]


@pytest.mark.parametrize(("tail", "count"), [(None, "all"), (5, "5"), (0, "0"), (-1, "0")])
def test_one_run_is_asked_for(journalctl: Journalctl, tail: int | None, count: str) -> None:
    journalctl.does("printf 'one\\n\\ntw\\303\\244\\377\\nlast'")
    assert lines(tail) == ["one", "", "twä\ufffd", "last"]
    assert journalctl.calls == [
        f"--quiet --no-pager --output=cat --all --lines={count} _SYSTEMD_INVOCATION_ID={RUN}"
    ]


def test_without_journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeRefused) as refused:
        lines()
    assert str(refused.value) == "cannot read it: journalctl: No such file or directory"
    assert journal.spawn_failure("x.service", RUN) is None


def test_a_failure_says_why(journalctl: Journalctl) -> None:
    journalctl.does("echo one; echo more >&2; echo 'Bad message' >&2; exit 1")
    found = []
    with pytest.raises(RuntimeRefused) as refused:
        found.extend(journal.read("read it", RUN, tail=None))
    assert str(refused.value) == "cannot read it: “Bad message”"
    journalctl.does("exit 3")
    with pytest.raises(RuntimeRefused) as refused:
        journal.previous("read it", "default", "a", 5.0)
    assert str(refused.value) == "cannot read it: journalctl failed"


@pytest.mark.slow
def test_one_that_hangs_is_not_waited_for(journalctl: Journalctl) -> None:
    journalctl.does("exec sleep 60")
    with pytest.raises(RuntimeRefused) as refused:
        lines()
    assert str(refused.value) == "cannot read it: the journal gave no answer in 0.6 s"
    with pytest.raises(RuntimeRefused) as refused:
        journal.previous("read it", "default", "a", 5.0)
    assert str(refused.value) == "cannot read it: the journal gave no answer in 0.5 s"


def test_an_empty_journal_that_may_not_be_read(
    journalctl: Journalctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    journalctl.does("exit 0")
    assert lines() == []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(journal, "_JOURNALS", ("/no/such/journal",))
    with pytest.raises(RuntimeRefused) as refused:
        lines()
    assert str(refused.value) == "cannot read it: the journal may not be read by this user"
    assert refused.value.hint == "run as root, or as a member of the group systemd-journal"


def follow(ended: Callable[[], bool] = lambda: True) -> list[str]:
    return [*journal.read("read it", RUN, tail=None, follow=True, ended=ended)]


@pytest.mark.slow
def test_following_goes_on_until_the_end_and_reads_what_came_late(
    journalctl: Journalctl, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    journalctl.does(f"""case "$*" in
*--follow*)
  echo '{{"__CURSOR": "c1", "MESSAGE": "one"}}'
  until test -e {go}; do sleep 0.02; done
  echo '{{"__CURSOR": "c2", "MESSAGE": [116, 119, 111, 255]}}'
  printf '{{"__CURSOR": "c3", "MESS'
  exec sleep 60 ;;
*--after-cursor=c2*) printf 'three\\n\\nfour\\n' ;;
esac""")

    def ended() -> bool:
        there = go.exists()
        go.touch()
        return there

    begun = time.monotonic()
    assert follow(ended) == ["one", "two\ufffd", "three", "", "four"]
    assert time.monotonic() - begun < 15


@pytest.mark.slow
def test_following_what_says_nothing_in_time_reads_it_at_the_end(journalctl: Journalctl) -> None:
    journalctl.does('case "$*" in *--follow*) exec sleep 60 ;; *--output=cat*) echo late ;; esac')
    assert follow() == ["late"]


def test_the_run_before_is_the_one_of_the_last_line_before(journalctl: Journalctl) -> None:
    journalctl.does(f'echo \'{{"_SYSTEMD_INVOCATION_ID": "{RUN}"}}\'')
    assert journal.previous("read it", "default", "a", 1795348015.789592) == RUN
    assert journalctl.calls == [
        "--quiet --no-pager --output=json --output-fields=_SYSTEMD_INVOCATION_ID --reverse "
        "--lines=1 --until=@1795348015.789592 MIC_SCOPE=default MIC_INSTANCE=a"
    ]
    for said in (":", "echo '{}'", "echo '{\"_SYSTEMD_INVOCATION_ID\": null}'"):
        journalctl.does(said)
        assert journal.previous("read it", "default", "a", 1.0) is None


def test_why_a_program_was_not_executed(journalctl: Journalctl) -> None:
    journalctl.does("echo 'x.service: Failed at step EXEC spawning /a b: No such file: really'")
    assert journal.spawn_failure("x.service", RUN) == "/a b: No such file: really (step EXEC)"
    assert journalctl.calls[0].endswith(f"UNIT=x.service INVOCATION_ID={RUN}")
    journalctl.does("echo something else")
    assert journal.spawn_failure("x.service", RUN) is None
    journalctl.does("exit 1")
    assert journal.spawn_failure("x.service", RUN) is None


# --- entries of any shape -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("plain\r", "plain"),
        ([99, 97, 102, 233], "caf\ufffd"),
        (["two", [102, 195, 188, 114], "fields"], "two für fields"),
        (None, ""),
        (7, ""),
        ({"a": 1}, ""),
        ([300, -1, "x"], "  x"),
        ([], ""),
    ],
)
def test_a_message_may_be_bytes_several_or_none(
    journalctl: Journalctl, tmp_path: Path, message: object, text: str
) -> None:
    (tmp_path / "rows").write_text(
        "".join(
            f"{row}\n"
            for row in (
                json.dumps({"__CURSOR": "c1", "MESSAGE": message}),
                *("[]", "7", "nonsense", "{}", '{"__CURSOR": "c2", "MESS', "[" * 50_000),
            )
        )
    )
    journalctl.does(f'case "$*" in *after-cursor=c1*) ;; *) cat {tmp_path}/rows;; esac')
    assert [*journal.read("read it", RUN, tail=None, follow=True)] == [text]


@pytest.mark.parametrize("row", ["[]", "7", "nonsense", "null", '{"x": 1}', '{"_SYSTEMD_INV'])
def test_a_row_that_is_no_entry_names_no_earlier_run(journalctl: Journalctl, row: str) -> None:
    journalctl.does(f"echo '{row}'")
    assert journal.previous("read it", "default", "a", 5.0) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries({}, optional={"__CURSOR": JSON, "MESSAGE": JSON}).map(json.dumps)
    | st.text()
)
def test_any_row_is_an_entry_or_none(row: str) -> None:
    found = journal._entry(row)
    assert found is None or (isinstance(found[0], str) and isinstance(found[1], str))
