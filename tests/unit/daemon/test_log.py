"""The history that the daemon keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mic_supervisor.cli.daemon import _line as printed
from mic_supervisor.converge.events import Event
from mic_supervisor.daemon import log
from mic_supervisor.daemon.log import History, read
from mic_supervisor.errors import MicError
from mic_supervisor.http import page
from mic_supervisor.http.verdict import overall_verdict
from tests.unit.http import views_of


def event(number: int, kind: str = "phase") -> Event:
    return Event(kind, float(number), "mam", f"höhe {number}", gpus=("GPU-1",))  # type: ignore[arg-type]


def test_what_was_told_is_kept_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history.jsonl"
    first = History(path)
    for number in range(3):
        first.add(event(number))
    first.add(event(9, "progress"))
    again = History(path)
    again.add(event(3))
    assert again.newest() == tuple(event(number) for number in (3, 2, 1, 0))
    assert [*read(path)] == [event(number) for number in range(4)]


def test_half_a_surrogate_breaks_no_history(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add(Event("pause", 1.0, "MAM", "paused: caf\udce9"))
    (event,) = read(path)
    assert event.text.startswith("paused: caf")


def test_a_try_that_fails_as_the_one_before_is_no_line_of_its_own(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    texts = ["no engine", "no engine", "a full disk", "no engine"]
    for text in texts:
        history.add(Event("failed", 1.0, "MAM", text, phase="remove"))
        history.add(Event("failed", 1.0, "web", "no engine", phase="remove"))
    history.add(Event("begin", 1.0, "MAM", "asked for", phase="remove"))
    history.add(Event("failed", 1.0, "MAM", "no engine", phase="remove"))
    kept = [(event.instance, event.kind, event.text) for event in reversed(history.newest())]
    assert kept == [
        ("MAM", "failed", "no engine"),
        ("web", "failed", "no engine"),
        ("MAM", "failed", "a full disk"),
        ("MAM", "failed", "no engine"),
        ("MAM", "begin", "asked for"),
        ("MAM", "failed", "no engine"),
    ]


def test_the_last_thousand_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "KEPT", 10)
    path = tmp_path / "history.jsonl"
    found = History(path)
    for number in range(57):
        found.add(event(number))
        assert len(path.read_text().splitlines()) <= 20
    assert [item.at for item in read(path)] == [float(number) for number in range(47, 57)]
    assert not path.with_suffix(".new").exists()


@pytest.mark.parametrize(
    "line", ['{"kind": "phase", "at": 1.0, "inst', "[]", "7", "{}", '{"kind": "phase", "x": 1}']
)
def test_a_line_that_is_none_is_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "history.jsonl"
    found = History(path)
    found.add(event(1))
    with path.open("a") as file:
        file.write(line + "\n")
    found.add(event(2))
    newer = json.loads(path.read_text().splitlines()[0]) | {"of_a_newer_version": 1, "at": 5.0}
    with path.open("a") as file:
        file.write(json.dumps(newer) + "\n")
    assert [item.at for item in read(path)] == [1.0, 2.0, 5.0]


LINES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["phase", "failed"]), "instance": st.text(max_size=20)},
    optional={
        "at": st.floats(),
        "text": st.text() | st.integers(),
        "phase": st.text(),
        "was": st.text() | st.booleans(),
        "hint": st.text(),
        "gpus": st.lists(st.text() | st.none(), max_size=2),
        "seconds": st.floats() | st.text(),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINES.map(json.dumps) | st.text(max_size=40), max_size=5))
@example(['{"kind": "begin", "at": 1e300, "instance": "a", "text": "x"}'])
@example(['{"kind": "phase", "at": 1, "instance": "\\u001b[2J", "text": "", "phase": "\\n"}'])
def test_whatever_stands_in_the_file_can_be_shown(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    events = History(path).newest()
    assert [*read(path)] == [*reversed(events)]
    published = views_of.good(history=events)
    page.render(published, overall_verdict(published, None), views_of.views(published))
    assert all(printed(asdict(event)).isprintable() for event in events)


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add(event(1))
    with path.open("a") as file:
        file.write('{"kind": "phase", "at"')  # killed here
    History(path).add(event(2))
    assert [item.at for item in read(path)] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (os.mkfifo, "it is not a regular file"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    ],
    ids=["directory", "fifo", "loop", "device"],
)
def test_what_stands_in_the_place_of_the_history_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], object], why: str
) -> None:
    path = tmp_path / "history.jsonl"
    make(path)
    with pytest.raises(MicError, match="cannot read"):
        list(read(path))
    history = History(path)
    assert f"cannot read {path}: {why}; the history begins anew" in caplog.text
    history.add(event(1))
    assert [one.at for one in read(path)] == [1.0]
    assert os.path.lexists(tmp_path / "history.jsonl.damaged-1")


def test_a_history_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "history.jsonl")
    with pytest.raises(MicError, match=r"cannot write .*history\.jsonl"):
        history.add(event(1))
