"""The socket itself: who is let go, and who is waited for."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.converge.events import Event
from mic_supervisor.converge.session import Emit, Method
from mic_supervisor.daemon import control
from mic_supervisor.daemon.client import Client
from mic_supervisor.daemon.control import ControlServer
from mic_supervisor.errors import ConfigError, MicError
from mic_supervisor.host import who_asks

SCOPE = "test"
EVENT = Event("progress", 1.0, "mam", "x" * 1000, gpus=("GPU-1",))


class Served:
    """A server with a few methods, and what became of those that wait."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cancelled = asyncio.Event()
        self.begun = asyncio.Event()
        self.server = ControlServer(path, self.methods, SCOPE)

    def methods(self, by: str | None) -> dict[str, Method]:
        async def who(_params: Mapping[str, Any], _emit: Emit) -> Any:
            return by

        async def echo(params: Mapping[str, Any], emit: Emit) -> Any:
            emit(EVENT)
            return dict(params)

        async def wait(_params: Mapping[str, Any], _emit: Emit) -> Any:
            self.begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        async def shout(_params: Mapping[str, Any], emit: Emit) -> Any:
            self.begun.set()
            try:
                while True:
                    for _ in range(100):
                        emit(EVENT)
                    await asyncio.sleep(0)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        async def refuse(_params: Mapping[str, Any], _emit: Emit) -> Any:
            raise MicError("cannot do it: no", hint="try")

        async def break_down(_params: Mapping[str, Any], _emit: Emit) -> Any:
            raise KeyError("a defect")

        async def reject(_params: Mapping[str, Any], _emit: Emit) -> Any:
            raise ConfigError(
                "broken", rendered="the line", outline="gpus.yaml:1:1: error", hint="mend it"
            )

        return {
            **{"echo": echo, "wait": wait, "shout": shout, "refuse": refuse, "reject": reject},
            **{"break_down": break_down, "who": who, "status": who},
        }


def serving(tmp_path: Path, test: Callable[[Served], Awaitable[None]]) -> None:
    async def run() -> None:
        served = Served(tmp_path / "run" / "mic.sock")
        await served.server.start()
        try:
            await asyncio.wait_for(test(served), 20)
        finally:
            await served.server.close()
        assert not served.path.exists()

    asyncio.run(run())


async def call(served: Served, method: str, **params: Any) -> Any:
    def ask() -> Any:
        client = Client.connect(served.path, SCOPE)
        assert client is not None
        return client.call(method, params, emit=heard.append)

    heard: list[Event] = []
    return await asyncio.to_thread(ask), heard


async def dial(served: Served, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(served.path)
    writer.write(data)
    return reader, writer


def request(method: str) -> bytes:
    return json.dumps({"version": 1, "method": method}).encode() + b"\n"


def test_a_result_comes_after_its_events(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        assert await call(served, "echo", a=[1, "é"]) == ({"a": [1, "é"]}, [EVENT])

    serving(tmp_path, test)


def test_half_a_surrogate_breaks_no_answer(tmp_path: Path) -> None:
    """As `--reason` is from a terminal that is not UTF-8."""

    async def test(served: Served) -> None:
        answer, _ = await call(served, "echo", reason="caf\udce9")
        assert answer["reason"].startswith("caf")

    serving(tmp_path, test)


def test_errors_keep_their_words_and_kind(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        with pytest.raises(MicError) as refused:
            await call(served, "refuse")
        assert (refused.value.message, refused.value.hint) == ("cannot do it: no", "try")
        with pytest.raises(ConfigError) as rejected:
            await call(served, "reject")
        assert rejected.value.rendered == "gpus.yaml:1:1: error"
        with pytest.raises(MicError, match="cannot answer: there is no method 'gone'") as unknown:
            await call(served, "gone")
        assert unknown.value.hint == (
            "use the command of the version that the daemon is of, or restart the daemon"
        )

    serving(tmp_path, test)


def test_the_socket_is_the_groups_at_most(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        assert served.path.stat().st_mode & 0o7777 == 0o660

    before = os.umask(0)
    try:
        serving(tmp_path, test)
    finally:
        os.umask(before)


def test_a_client_that_goes_ends_its_own_waiting_only(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        _, writer = await dial(served, request("wait"))
        await served.begun.wait()
        writer.close()
        await served.cancelled.wait()
        assert (await call(served, "echo"))[0] == {}

    serving(tmp_path, test)


def test_who_says_nothing_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_REQUEST_TIMEOUT", 0.05)

    async def test(served: Served) -> None:
        reader, writer = await dial(served, b'{"version":')
        assert await reader.read() == b""
        writer.close()

    serving(tmp_path, test)


def test_who_never_reads_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_MOST_UNREAD", 1 << 16)

    async def test(served: Served) -> None:
        _, writer = await dial(served, request("shout"))
        await served.cancelled.wait()
        writer.close()

    serving(tmp_path, test)


def test_a_server_that_ends_keeps_nobody(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        reader, writer = await dial(served, request("wait"))
        await served.begun.wait()
        await served.server.close()
        assert await reader.read() == b""
        writer.close()

    serving(tmp_path, test)


def test_a_client_whose_daemon_dies_is_told(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        waiting = asyncio.ensure_future(call(served, "wait"))
        await served.begun.wait()
        await served.server.close()
        with pytest.raises(MicError, match="the daemon went away before it had finished"):
            await waiting

    serving(tmp_path, test)


def test_what_a_killed_daemon_left_is_taken_over(tmp_path: Path) -> None:
    import socket

    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "run" / "mic.sock"))
    assert Client.connect(tmp_path / "run" / "mic.sock", SCOPE) is None

    async def test(served: Served) -> None:
        assert (await call(served, "echo"))[0] == {}

    serving(tmp_path, test)


def test_a_place_that_cannot_be_bound(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(MicError, match=r"cannot listen on .*: (Not a directory|File exists)"):
        asyncio.run(ControlServer(tmp_path / "run" / "mic.sock", lambda _by: {}, SCOPE).start())


def test_no_daemon_is_none_and_no_error(tmp_path: Path) -> None:
    assert Client.connect(tmp_path / "mic.sock", SCOPE) is None
    (tmp_path / "file").touch()
    assert Client.connect(tmp_path / "file" / "mic.sock", SCOPE) is None


def test_a_request_for_another_scope_is_refused(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        def ask() -> Any:
            client = Client.connect(served.path, "production")
            assert client is not None
            return client.call("echo")

        with pytest.raises(MicError, match="this is the daemon of scope test, not of production"):
            await asyncio.to_thread(ask)
        reader, _ = await dial(served, request("echo"))  # as commands before 0.1 ask
        assert "event" in json.loads(await reader.readline())

    serving(tmp_path, test)


def test_the_socket_of_another_daemon_is_left_to_it(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        with pytest.raises(MicError, match="another daemon listens there") as caught:
            await ControlServer(served.path, lambda _by: {}, "other").start()
        assert caught.value.hint == "point MIC_SOCKET of one of the two to another path"
        assert (await call(served, "echo", a=1))[0] == {"a": 1}

    serving(tmp_path, test)


def test_a_defect_in_one_answer_is_told_and_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(served: Served) -> None:
        with pytest.raises(MicError, match="cannot answer: KeyError: 'a defect'"):
            await call(served, "break_down")
        assert "Traceback" in caplog.text
        assert (await call(served, "echo"))[0] == {}

    serving(tmp_path, test)


def test_clients_are_bounded_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_MOST_CLIENTS", 3)

    async def test(served: Served) -> None:
        idle = [await dial(served, b"") for _ in range(3)]
        await asyncio.sleep(0)
        reader, _ = await dial(served, request("echo"))
        assert json.loads(await reader.readline())["error"]["message"] == (
            "cannot answer: too many ask at once"
        )
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        for _ in range(1000):
            answer = await dial(served, request("echo"))
            if "event" in json.loads(await answer[0].readline()):
                return
            await asyncio.sleep(0.01)
        pytest.fail("no room again")

    serving(tmp_path, test)


def test_who_orders_is_whom_the_kernel_names_and_a_question_is_nobodys(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        by = who_asks(os.getuid(), os.getpid())
        assert await call(served, "who", by="mallory") == (by, [])
        assert (await call(served, "status"))[0] is None

    serving(tmp_path, test)
