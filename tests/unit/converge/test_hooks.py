"""The hooks, run for real: real programs, and what becomes of those that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.converge import hooks
from mic_supervisor.converge.events import Event
from mic_supervisor.converge.hooks import Publisher, Transitions, run
from mic_supervisor.errors import MicError
from mic_supervisor.model import Hook
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.status import InstanceStatus
from mic_supervisor.views.endpoints import Endpoints

ONE: Endpoints = {"MAM": {"MAM-1": {"http": "http://127.0.0.1:1"}}}
NONE: Endpoints = {"MAM": {}}
READY = (
    InstanceStatus(
        id="MAM-1",
        origin="file",
        model="MAM",
        backend="process",
        gpus=(),
        phase=Phase.READY,
        sync="in_sync",
        health="healthy",
        reason=None,
        since=None,
        restarts=0,
        next_retry=None,
        endpoints=ONE["MAM"]["MAM-1"],
        runtime=None,
        ref=None,
        pid=None,
        spec_hash=None,
        serving=True,
    ),
)
UNHEALTHY = (replace(READY[0], serving=False),)


Reports = list[tuple[str, bool]]


def script(
    tmp_path: Path, body: str, timeout: float = 10.0, name: str = "on_endpoints_change"
) -> Hook:
    path = tmp_path / "hook"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return Hook((str(path), "an argument", "$HOME; `id`"), timeout, 0.0, name)


def refusal(hook: Hook) -> str:
    with pytest.raises(MicError) as caught:
        run(hook, {})
    return caught.value.message


def test_it_gets_the_document_its_arguments_and_little_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIC_SCOPE", "here")
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.delenv("HOME")  # as systemd leaves it for a service of root
    hook = script(tmp_path, f'cat > {tmp_path}/in; printf "%s|" "$@" > {tmp_path}/args; env > '
                            f"{tmp_path}/env")  # fmt: skip
    run(hook, {"models": {"换脸": []}})
    assert json.loads((tmp_path / "in").read_text()) == {"models": {"换脸": []}}
    assert (tmp_path / "args").read_text() == "an argument|$HOME; `id`|"
    env = (tmp_path / "env").read_text()
    assert "MIC_SCOPE=here\n" in env
    assert f"HOME={pwd.getpwuid(os.getuid()).pw_dir}\n" in env
    assert "SECRET" not in env


def test_one_that_fails_is_quoted(tmp_path: Path) -> None:
    hook = script(tmp_path, "echo first; echo 'nginx: no such file' >&2; exit 3")
    path = hook.command[0]
    assert refusal(hook) == f"on_endpoints_change, {path}, exits with 3: “nginx: no such file”"
    assert refusal(script(tmp_path, "kill -9 $$")).endswith("was killed by signal 9")
    gone = Hook((str(tmp_path / "none"),))
    assert refusal(gone).endswith("none: No such file or directory")
    (tmp_path / "plain").write_text("")
    assert refusal(Hook((str(tmp_path / "plain"),))).endswith("Permission denied")


def test_nothing_is_written_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under mic.service, where /tmp is read-only."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    run(script(tmp_path, f"cat > {tmp_path}/in"), {"models": {}})
    assert json.loads((tmp_path / "in").read_text()) == {"models": {}}


@pytest.mark.parametrize("call", ["os.memfd_create", "os.pidfd_open", "subprocess.Popen"])
def test_whatever_keeps_it_from_running_is_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    hook = script(tmp_path, f"printf x >> {tmp_path}/runs")

    def full(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    async def story(made: Publisher, told: Reports) -> None:
        made.follow(hook, READY)
        await made.finish()
        assert made.published == ONE
        with monkeypatch.context() as patch:
            patch.setattr(call, full)
            assert await made.withdraw("MAM-1") is False
        path = hook.command[0]
        cause = f"cannot run on_endpoints_change, {path}: Too many open files"
        assert (made.state.failures, made.state.error, told[-1]) == (1, cause, (cause, True))
        assert await made.withdraw("MAM-1") is True

    in_loop(story)


def test_one_that_cannot_be_a_program_is_its_failure() -> None:
    assert refusal(Hook(("a\0b",))).endswith("embedded null byte")


def test_one_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    hook = script(tmp_path, f"sleep 600 & echo $! > {tmp_path}/child; wait", timeout=1.0)
    began = time.monotonic()
    assert "took longer than 1 s and was killed" in refusal(hook)
    assert time.monotonic() - began < 5
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        raise AssertionError("the child lives")


def test_one_that_prints_without_end_costs_no_memory(tmp_path: Path) -> None:
    hook = script(tmp_path, "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo the end; exit 1")
    assert refusal(hook).endswith("exits with 1: “the end”")


def test_a_child_that_stays_holds_nobody_up(tmp_path: Path) -> None:
    began = time.monotonic()
    run(script(tmp_path, "sleep 20 &"), {})
    assert time.monotonic() - began < 15


# --- on_endpoints_change ----------------------------------------------------------------------


def in_loop(story: Callable[[Publisher, Reports], Awaitable[None]]) -> None:
    told: Reports = []

    async def main() -> None:
        with ThreadPoolExecutor(2) as pool:
            made = Publisher(pool, time.time, lambda *args: told.append(args), "h", None)
            await story(made, told)

    asyncio.run(main())


def runs(tmp_path: Path) -> int:
    path = tmp_path / "runs"
    return len(path.read_text()) if path.exists() else 0


def test_it_is_run_once_for_each_change_and_never_twice_at_once(tmp_path: Path) -> None:
    hook = script(
        tmp_path,
        f"mkdir {tmp_path}/busy || exit 9; printf x >> {tmp_path}/runs; "
        f"until test -e {tmp_path}/go; do sleep 0.02; done; rmdir {tmp_path}/busy",
    )

    async def story(made: Publisher, told: Reports) -> None:
        # what changes while it runs is one more run
        for rows in (READY, READY, UNHEALTHY, READY, UNHEALTHY):
            made.follow(hook, rows)
            await asyncio.sleep(0.01)
        (tmp_path / "go").touch()
        await made.finish()
        assert (made.published, runs(tmp_path)) == (NONE, 2)
        made.follow(hook, UNHEALTHY)
        await made.finish()
        assert runs(tmp_path) == 2
        assert told == [
            ("on_endpoints_change got: MAM 1", False),
            ("on_endpoints_change got: MAM 0", False),
        ]

    in_loop(story)


def test_what_is_withdrawn_is_taken_out_until_it_is_over(tmp_path: Path) -> None:
    hook = replace(script(tmp_path, f"printf x >> {tmp_path}/runs"), settle=0.2)

    async def story(made: Publisher, told: Reports) -> None:
        made.follow(hook, READY)
        await made.finish()
        assert made.published == ONE
        assert await made.withdraw("other") is True  # nobody was told of that one
        assert runs(tmp_path) == 1
        began = time.monotonic()
        assert await made.withdraw("MAM-1") is True
        assert time.monotonic() - began >= 0.2
        assert (made.published, made.endpoints, runs(tmp_path)) == (NONE, NONE, 2)
        made.follow(hook, READY)  # it still answers, and is not put back
        await made.finish()
        assert runs(tmp_path) == 2
        made.restore(["MAM-1"])
        made.follow(hook, READY)
        await made.finish()
        assert (made.published, len(told)) == (ONE, 3)

    in_loop(story)


def test_one_that_fails_is_told_of_and_rests(tmp_path: Path) -> None:
    hook = script(tmp_path, f"printf x >> {tmp_path}/runs; test -e {tmp_path}/ok")

    async def story(made: Publisher, told: Reports) -> None:
        made.follow(hook, READY)
        await made.finish()
        assert (made.published, made.state.failures) == (None, 1)
        assert made.state.error is not None and "exits with 1" in made.state.error
        assert made.known(hook) is None
        made.follow(hook, READY)
        await asyncio.sleep(0.05)
        assert runs(tmp_path) == 1  # it rests
        made.published = ONE  # by an earlier program
        assert not await made.withdraw("MAM-1")  # a stop does not wait for its rest
        assert (runs(tmp_path), made.state.in_a_row) == (2, 2)
        (tmp_path / "ok").touch()
        made.restore(["MAM-1"])
        made.published = None
        changed = replace(hook, timeout=9.0)  # another hook is tried at once
        made.follow(changed, READY)
        await made.finish()
        assert (made.published, made.state.error, made.state.in_a_row) == (ONE, None, 0)
        assert made.known(changed) == {"MAM": {"MAM-1"}}
        assert [bad for _, bad in told] == [True, True, False]

    in_loop(story)


def test_without_a_hook_there_is_nobody_to_tell() -> None:
    async def story(made: Publisher, told: Reports) -> None:
        made.follow(None, READY)
        await made.finish()
        assert made.published is None
        assert told == []

    in_loop(story)


# --- on_transition ----------------------------------------------------------------------------


NAME = "on_transition"


def change(number: int) -> Event:
    about = (float(number), "MAM-1", "no memory is left", "MAM", ("GPU-1",))
    return Event("phase", *about, seconds=2.5, phase="backoff", was="ready")


def given(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "in"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def with_transitions(
    hook: Hook | None, story: Callable[[Transitions, Reports], Awaitable[None]]
) -> None:
    reports: Reports = []

    async def main() -> None:
        with ThreadPoolExecutor(2) as pool:
            made = Transitions(pool, lambda *report: reports.append(report), "gpu-1")
            made.hook = hook
            await story(made, reports)

    asyncio.run(main())


def test_each_change_is_one_document_in_order_and_never_two_at_once(tmp_path: Path) -> None:
    hook = script(
        tmp_path,
        f"mkdir {tmp_path}/busy || exit 9; cat >> {tmp_path}/in; echo >> {tmp_path}/in; "
        f"rmdir {tmp_path}/busy",
        name=NAME,
    )

    async def story(made: Transitions, reports: Reports) -> None:
        for number in range(5):
            made.listen(change(number))
            made.listen(Event("begin", 0.0, "MAM-1", "no change of phase"))
        await made.finish()
        assert [one["at"] for one in given(tmp_path)] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert given(tmp_path)[0] == {
            "version": 1,
            "host": "gpu-1",
            "at": 0.0,
            "instance": "MAM-1",
            "model": "MAM",
            "gpus": ["GPU-1"],
            "phase": "backoff",
            "was": "ready",
            "seconds": 2.5,
            "reason": "no memory is left",
            "dropped": 0,
        }
        assert reports == []

    with_transitions(hook, story)


def test_a_slow_one_delays_nobody_and_what_is_dropped_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "_MOST", 3)
    hook = script(
        tmp_path,
        f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; "
        f"cat >> {tmp_path}/in; echo >> {tmp_path}/in",
        name=NAME,
    )

    async def story(made: Transitions, reports: Reports) -> None:
        made.listen(change(0))
        await asyncio.sleep(0.1)  # this one is being run
        for number in range(1, 9):
            made.listen(change(number))  # returns at once
        (tmp_path / "go").touch()
        await made.finish()
        found = [(one["at"], one["dropped"]) for one in given(tmp_path)]
        assert found == [(0.0, 0), (6.0, 5), (7.0, 0), (8.0, 0)]
        assert reports == [("on_transition is too slow: it was not told of 5 changes", True)]

    with_transitions(hook, story)


def test_a_failure_is_said_once_and_holds_up_no_later_change(tmp_path: Path) -> None:
    body = f"cat >> {tmp_path}/in; echo >> {tmp_path}/in; test -e {tmp_path}/ok || exit 3"
    hook = script(tmp_path, body, name=NAME)

    async def story(made: Transitions, reports: Reports) -> None:
        for number in range(3):
            made.listen(change(number))
        await made.finish()
        assert len(given(tmp_path)) == 3, "each was tried once"
        assert reports == [(f"on_transition, {hook.command[0]}, exits with 3", True)]
        (tmp_path / "ok").touch()
        made.listen(change(3))
        await made.finish()
        assert reports[1:] == [("on_transition works again", False)]

    with_transitions(hook, story)


def test_what_waits_at_the_end_is_said_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "_AT_THE_END", 0.1)
    hook = script(tmp_path, "sleep 60", timeout=1.0, name=NAME)

    async def story(made: Transitions, reports: Reports) -> None:
        for number in range(3):
            made.listen(change(number))
        await made.finish()
        assert reports == [("on_transition was not told of the last 2 changes", True)]

    with_transitions(hook, story)


def test_without_a_hook_nothing_waits() -> None:
    async def story(made: Transitions, reports: Reports) -> None:
        made.listen(change(1))
        await made.finish()
        assert reports == []

    with_transitions(None, story)
