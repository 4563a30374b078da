"""The daemon's word to systemd."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from mic_supervisor.daemon.notify import Notifier, sentence
from tests.support.mic import Mic
from tests.unit.http import views_of


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


def test_a_file_that_waits_is_in_the_sentence_with_what_it_would_change() -> None:
    text = sentence(views_of.waiting())
    assert text.startswith("2/2 ready; config generation 5; the file is not used yet: ")
    assert text.endswith(
        f"{views_of.WAITS}; it would replace MAM-aaaaaaaa, remove qwen-bbbbbbbbx2, "
        "create embed-dddddddd"
    )


@pytest.mark.parametrize(
    ("variable", "value", "code", "status"),
    [
        ("MIC_RESYNC", "often", 78, "MIC_RESYNC"),
        ("MIC_SCOPES", "a", 78, "MIC_SCOPES"),
        ("MIC_LISTEN", "0.0.0.0:6004", 78, "cannot serve HTTP on 0.0.0.0:6004"),
        ("MIC_HTTP_TOKEN_FILE", "/no/token", 78, "cannot read the token in /no/token"),
        ("MIC_RUN_DIR", "/dev/null", 1, "/dev/null"),  # it may be mounted later
    ],
)
def test_systemd_is_told_why_there_is_no_daemon(
    mic: Mic, variable: str, value: str, code: int, status: str
) -> None:
    path = mic.home / "notify"
    mic.env |= {variable: value, "NOTIFY_SOCKET": str(path)}
    ear = Ear(path)
    done = mic("run", rc=code)
    [said] = ear.heard()
    ear.close()
    assert said.startswith("STATUS=cannot run: ") and status in said
    assert status in done.stderr
