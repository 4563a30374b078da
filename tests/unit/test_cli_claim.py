"""The command that holds a claim, on a real socket, with a daemon that says what a test wants."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.cli.claim import Holder
from mic_supervisor.cli.ready_file import ReadyFile, check, ready_file
from mic_supervisor.converge.events import Event
from mic_supervisor.converge.session import Emit, Method
from mic_supervisor.daemon.control import ControlServer
from mic_supervisor.errors import MicError, Unserviceable
from tests.support.mic import Daemon, Mic
from tests.support.waiting import until

GPU = {"uuid": "GPU-1", "index": 1}
ROW = {"id": "MAM-1", "gpus": [GPU], "endpoints": {"http": "http://127.0.0.1:20000"}}


class Desk:
    """A daemon's socket. `asked` is what holders asked for; words are put into `say`."""

    def __init__(self, mic: Mic) -> None:
        self.mic = mic
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.refuses: MicError | None = None  # to release anything
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.start()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def start(self) -> None:
        self.words: asyncio.Queue[Any] = asyncio.Queue()
        self.server = ControlServer(self.mic.socket, self._methods, self.mic.scope)
        self._run(self.server.start())

    def stop(self) -> None:
        self._run(self.server.close())

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def say(self, word: Any) -> None:
        """An Event, an error, or None: the claim was released."""
        self.loop.call_soon_threadsafe(self.words.put_nowait, word)

    def tell(self, state: str, text: str = "", *, has: bool = True) -> None:
        about = ("MAM-1", text or state, "MAM", ("GPU-1",)) if has else ("MAM", text, "MAM")
        self.say(Event("claim", 0.0, *about, phase=state))

    def _methods(self, _by: str | None) -> dict[str, Method]:
        async def claim(params: Mapping[str, Any], emit: Emit) -> Any:
            self.asked.append(("claim", params))
            words = self.words
            while True:
                word = await words.get()
                if word is None:
                    return {"ended": "released"}
                if isinstance(word, MicError):
                    raise word
                emit(word)

        async def release(params: Mapping[str, Any], _emit: Emit) -> Any:
            self.asked.append(("release", params))
            if self.refuses is not None:
                raise self.refuses
            self.words.put_nowait(None)
            return {"ended": "released"}

        async def status(_params: Mapping[str, Any], _emit: Emit) -> Any:
            return {"instances": [ROW]}

        return {"claim": claim, "release": release, "status": status}

    def tokens(self) -> set[str]:
        return {params["token"] for _, params in self.asked}


@pytest.fixture
def desk(mic: Mic) -> Iterator[Desk]:
    made = Desk(mic)
    yield made
    made.close()


@pytest.fixture
def systemd(mic: Mic, tmp_path: Path) -> Iterator[socket.socket]:
    """What listens on NOTIFY_SOCKET."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(20)
        mic.env["NOTIFY_SOCKET"] = str(path)
        yield listener


def heard(listener: socket.socket, word: str) -> list[str]:
    """Everything up to a word."""
    found: list[str] = []
    while word not in found:
        found.append(listener.recv(4096).decode())
    return found


def lines(holder: Daemon) -> list[str]:
    """Without the times."""
    return [line.partition(" s  ")[2] or line for line in holder.text().splitlines()]


def test_it_says_how_it_goes_and_the_file_is_there_while_it_is_ready(
    mic: Mic, desk: Desk, systemd: socket.socket, tmp_path: Path
) -> None:
    path = tmp_path / "ready.json"
    holder = mic.start("claim", "MAM", "--holder", "task 3", "--ready-file", path)
    until(lambda: desk.asked, "the holder")
    (method, params), *_ = desk.asked
    assert (method, params["model"], params["gpus"], params["holder"]) == (
        "claim",
        "MAM",
        1,
        "task 3",
    )
    assert "instance" not in params
    desk.tell("waiting", "waits for a GPU: it is number 1 of 2 in the queue", has=False)
    desk.tell("starting", "starting: GET /health: nothing listens")
    assert "READY=1" not in heard(systemd, "STATUS=starting: GET /health: nothing listens")
    assert not path.exists()
    desk.tell("ready")
    heard(systemd, "READY=1")
    document = json.loads(path.read_text())
    started = int(Path(f"/proc/{holder.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    assert document == {
        "version": 1,
        "pid": holder.pid,
        "started": started,
        "model": "MAM",
        "instance": "MAM-1",
        "gpus": [GPU],
        "endpoints": ROW["endpoints"],
    }
    mic("claim", "--check", "--ready-file", path, rc=0)
    desk.tell("starting", "degraded: GET /health answers 503")
    until(lambda: not path.exists(), "the file to be gone")
    mic("claim", "--check", "--ready-file", path, rc=1)
    desk.tell("ready")
    until(path.exists, "the file to be there")
    assert holder.stop() == 0
    assert desk.asked[-1][0] == "release" and len(desk.tokens()) == 1
    assert not path.exists() and not path.with_name("ready.json.lock").exists()
    assert lines(holder) == [
        "-        MAM: waits for a GPU: it is number 1 of 2 in the queue",
        "GPU 1    MAM-1: starting: GET /health: nothing listens",
        "GPU 1    MAM-1: ready",
        "GPU 1    MAM-1: degraded: GET /health answers 503",
        "GPU 1    MAM-1: ready",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [(MicError("cannot serve MAM: it broke", hint="mend it"), 1), (Unserviceable("never"), 78)],
)
def test_how_the_daemon_ends_it_is_how_it_exits(
    mic: Mic, desk: Desk, error: MicError, code: int
) -> None:
    holder = mic.start("claim", "MAM")
    desk.say(error)
    assert holder.process.wait(20) == code
    assert f"error: {error.message}" in holder.text()


def test_while_the_daemon_is_away_it_tries_again_and_says_what_it_had(
    mic: Mic, desk: Desk, tmp_path: Path
) -> None:
    desk.stop()
    path = tmp_path / "ready.json"
    holder = mic.start("claim", "MAM", "--ready-file", path)
    away = f"-        MAM: no daemon answers at {mic.socket}; trying again every second"
    until(lambda: lines(holder) == [away], "the holder to say so")
    desk.start()
    until(lambda: desk.asked, "the holder")
    desk.tell("ready")
    until(path.exists, "the file")
    desk.stop()
    until(lambda: away.replace("MAM", "MAM-1") in lines(holder), "the holder to say so again")
    assert path.exists(), "a restart of the daemon made it look dead"
    desk.start()
    until(lambda: len(desk.asked) == 2, "the holder to be back")
    assert desk.asked[1][1]["instance"] == "MAM-1"
    assert desk.asked[1][1]["waited"] > desk.asked[0][1]["waited"]
    assert len(desk.tokens()) == 1
    desk.stop()
    os.kill(holder.pid, signal.SIGTERM)
    os.kill(holder.pid, signal.SIGTERM)
    desk.start()
    assert holder.process.wait(20) == 0
    assert ("release", "MAM-1") in [(name, params["instance"]) for name, params in desk.asked[2:]]


def test_who_has_nothing_and_no_daemon_ends_at_once(mic: Mic) -> None:
    holder = mic.start("claim", "MAM")
    until(lambda: "no daemon answers at" in holder.text(), "the holder to say so")
    assert holder.stop() == 0


def test_it_goes_on_to_ask_until_the_claim_is_released(mic: Mic, desk: Desk) -> None:
    holder = mic.start("claim", "MAM")
    until(lambda: desk.asked, "the holder")
    desk.tell("ready")
    until(lambda: "MAM-1: ready" in holder.text(), "the holder to say so")
    desk.stop()
    os.kill(holder.pid, signal.SIGTERM)
    desk.refuses = MicError("cannot answer: too many ask at once")
    desk.start()
    until(lambda: [name for name, _ in desk.asked].count("release") >= 4, "the holder to insist")
    assert holder.process.poll() is None
    desk.refuses = None
    assert holder.process.wait(20) == 0


def test_a_claim_is_held_whatever_its_output_and_its_file_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is raised in between looks like a daemon that went away."""
    monkeypatch.setattr("mic_supervisor.cli.claim.daemon", lambda: None)
    path = tmp_path / "ready.json"
    holder = Holder("MAM", 1, "", ReadyFile(path))
    path.mkdir()
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr("sys.stdout", full)
        for phase in ("ready", "starting"):
            holder._heed(Event("claim", 0.0, "MAM-1", phase, "MAM", ("GPU-1",), phase=phase))
        with suppress(OSError):
            full.close()
    monkeypatch.undo()
    assert f"error: cannot write {path}: " in (said := capsys.readouterr().err)
    assert f"error: cannot remove {path}: Is a directory" in said


# --- the ready file -----------------------------------------------------------------------------

HELD = {"model": "MAM", "instance": "MAM-1", "gpus": [GPU], "endpoints": {}}


def test_two_living_holders_share_no_path(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    with ready_file(path, "MAM") as one:
        one.write(HELD)
        with (
            pytest.raises(Unserviceable, match="another claim that is held has it"),
            ready_file(path, "MAM"),
        ):
            pass
        check(path, None)
    assert [*tmp_path.iterdir()] == []
    with ready_file(path, "MAM"):
        pass


def test_no_link_is_followed_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "ready.json"
    other.write_text("precious")
    with (
        pytest.raises(Unserviceable, match="it is there, and no ready file of a claim"),
        ready_file(other, "MAM"),
    ):
        pass
    path.symlink_to(other)
    with pytest.raises(Unserviceable, match="no ready file"), ready_file(path, "MAM"):
        pass
    path.unlink()
    with ready_file(path, "MAM") as made:
        path.symlink_to(other)
        made.write(HELD)
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o644
    assert other.read_text() == "precious"


def test_what_a_killed_holder_left_is_no_claim_and_the_next_one_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    gone = {"version": 1, "pid": os.getpid(), "started": 1, **HELD}
    path.write_text(json.dumps(gone))
    with pytest.raises(MicError, match=f"the holder of the claim, PID {os.getpid()}, is gone"):
        check(path, None)
    with ready_file(path, "MAM"):
        assert not path.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 1}', '{"pid": "1", "started": 2}', "0" * 99]
)
def test_a_file_that_is_damaged_is_not_ready(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ready.json"
    path.write_text(text)
    with pytest.raises(MicError, match="cannot be read, or is no ready file"):
        check(path, None)


def test_without_a_path_it_lies_where_only_the_user_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(MicError, match="no claim of this user is"):
        check(None, None)
    directory = tmp_path / "mic-claims"
    with ready_file(None, "模型") as made:
        assert made.path.parent == directory
        assert directory.stat().st_mode & 0o777 == 0o700
        with pytest.raises(MicError, match="not ready: no claim of 模型 is"):
            check(None, "模型")
        made.write(HELD)
        check(None, "模型")
        check(None, None)
        with pytest.raises(MicError, match="no claim of MAM is"):
            check(None, "MAM")
        left = directory / "MAM.1.json"
        left.write_text(json.dumps({"version": 1, "pid": 1, "started": 1, **HELD}))
        with ready_file(None, "MAM"):
            assert not left.exists()
            assert made.path.exists()
    directory.chmod(0o777)
    with (
        pytest.raises(Unserviceable, match="somebody else may write there"),
        ready_file(None, "MAM"),
    ):
        pass
