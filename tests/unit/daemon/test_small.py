"""The daemon's word to systemd, its history and its log."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from mic_supervisor.converge.events import Event
from mic_supervisor.daemon import history
from mic_supervisor.daemon.history import History, read
from mic_supervisor.daemon.notify import Notifier
from mic_supervisor.errors import MicError

# --- systemd ------------------------------------------------------------------------------------


class Ear:
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self._socket.recv(65536).decode())
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


def test_systemd_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    notifier = Notifier({"WATCHDOG_USEC": "30000000"})
    assert notifier.watchdog == 30.0
    notifier.ready()
    notifier.reloading()
    notifier.status("two\nlines")
    notifier.status("two lines")
    notifier.alive()
    notifier.extend(15.0)
    notifier.stopping()
    heard = ear.heard()
    ear.close()
    state, _, since = heard.pop(1).partition("\n")
    assert state == "RELOADING=1"
    name, _, value = since.partition("=")
    assert name == "MONOTONIC_USEC"
    assert abs(int(value) / 1e6 - time.monotonic()) < 5
    assert heard == [
        "READY=1", "STATUS=two lines", "WATCHDOG=1", "EXTEND_TIMEOUT_USEC=15000000", "STOPPING=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": ""},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"},
    ],
)
def test_nobody_asks_for_signs_of_life(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier(environ)
    assert notifier.watchdog is None
    notifier.ready()  # and nothing is heard, and nothing fails


# --- history ------------------------------------------------------------------------------------


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


def test_the_last_thousand_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "KEPT", 10)
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


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add(event(1))
    with path.open("a") as file:
        file.write('{"kind": "phase", "at"')  # killed here
    History(path).add(event(2))
    assert [item.at for item in read(path)] == [1.0, 2.0]


def test_a_history_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.mkdir()
    with pytest.raises(MicError, match=r"cannot read .*history\.jsonl: Is a directory"):
        History(path)
