"""Whose log a name means, and how much of it a daemon reads for somebody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor.converge import logs
from mic_supervisor.converge.logs import Log, last_of_each, logs_of
from mic_supervisor.errors import MicError
from mic_supervisor.model import ObservedWorkload, RunState
from tests.unit.converge.rig import Engine
from tests.unit.plan import builders as b

SERVER = b.on("s", 0, shared=True, placements=(b.placement("A", 0), b.placement("B", 0)))
OTHERS = [b.workload(b.on("MAM", 1)), b.workload(b.on("MAM", 2))]


class Logs(Engine):
    """Of every container the same lines, of which the engine gives the last."""

    def __init__(self, *lines: str) -> None:
        super().__init__()
        self.lines = lines

    def logs(self, workload: Any, *, tail: int | None = None, **_: Any) -> Iterator[str]:
        given = self.lines if tail is None else self.lines[len(self.lines) - tail :]
        yield from (f"{workload.name}: {line}" for line in given)


def found(name: str | None, *there: ObservedWorkload) -> Log:
    (log,) = logs_of(name, b.observed(*there), {"A": SERVER.id, "B": SERVER.id}.get)
    return log


def test_a_model_of_a_server_has_the_log_of_that_server() -> None:
    it = b.workload(SERVER)
    for name, server in (("A", SERVER.id), ("s", None), (SERVER.id, None)):
        assert found(name, it, *OTHERS) == Log((it,), server, SERVER.id)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A", "cannot show the log of A: there is no such instance"),  # its server does not run
        ("C", "cannot show the log of C: there is no such instance"),
    ],
)
def test_a_name_that_means_no_log_is_refused(name: str, message: str) -> None:
    with pytest.raises(MicError) as refused:
        found(name, *OTHERS)
    assert refused.value.message == message
    assert "MAM-bbbbbbbb, MAM-cccccccc" in (refused.value.hint or "")


def test_what_runs_comes_first_and_the_one_before_it_is_the_previous() -> None:
    now = b.workload(SERVER)
    before = b.workload(b.changed(SERVER, image="mam:0"), RunState.EXITED, created_at=1.0)
    log = found("A", before, now)
    engine = Logs("x")
    assert [*log.lines({"docker": engine}, tail=None)] == [f"{now.name}: x"]
    assert [*log.lines({"docker": engine}, tail=None, previous=True)] == [f"{before.name}: x"]


def test_a_daemon_reads_the_end_of_a_log_and_says_whether_that_is_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "_MOST_LINES", 3)
    it = replace(b.workload(SERVER), name="c")
    log = Log((it,), None)
    engine = {"docker": Logs("1", "2", "3", "4")}
    assert log.last(engine, tail=2, previous=False) == (["c: 3", "c: 4"], False)
    assert log.last(engine, tail=None, previous=False) == (["c: 2", "c: 3", "c: 4"], True)
    assert log.last(engine, tail=9, previous=False) == (["c: 2", "c: 3", "c: 4"], True)
    assert log.last({"docker": Logs("1")}, tail=None, previous=False) == (["c: 1"], False)
    monkeypatch.setattr(logs, "_MOST", 5)
    assert log.last(engine, tail=2, previous=False) == (["c: 4"], True)


def test_several_are_told_apart_by_their_names() -> None:
    for name in ("MAM", None):
        both = logs_of(name, b.observed(*OTHERS), {}.get)
        assert [log.called for log in both] == ["MAM-bbbbbbbb", "MAM-cccccccc"]
    lines, cut = last_of_each(both, {"docker": Logs("1", "2")}, tail=1, previous=False)
    names = [workload.name for workload in OTHERS]
    assert lines == [f"MAM-bbbbbbbb | {names[0]}: 2", f"MAM-cccccccc | {names[1]}: 2"]
    assert cut is False
    with pytest.raises(MicError, match="cannot show any log: nothing of ours"):
        logs_of(None, b.observed(), {}.get)


def test_what_a_daemon_reads_of_several_is_bounded_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "_MOST_LINES", 4)
    both = logs_of("MAM", b.observed(*OTHERS), {}.get)
    lines, cut = last_of_each(both, {"docker": Logs("1", "2", "3")}, tail=None, previous=False)
    assert [line[-1] for line in lines] == ["2", "3", "2", "3"]
    assert cut is True
