"""`status --watch` on a terminal of 80 columns and in a pipe, and `status` over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from pydantic import TypeAdapter

from mic_supervisor.host import start_daemon
from mic_supervisor.views.status import StatusDocument
from tests.support.commands import SERVE
from tests.support.mic import PROGRAM, Mic
from tests.support.terminal import terminal
from tests.support.waiting import http, until

MODELS = f"""
version: 1
models:
  a-model-with-a-rather-long-name:
    backend: process
    command: {SERVE}
    probe: {{http: /health, period: 200ms}}
  broken:
    backend: process
    command: {SERVE}
    env: {{EXIT_UNLESS: /nowhere}}
    probe: {{http: /health}}
gpus:
  0: a-model-with-a-rather-long-name
  1: broken
"""
NEW_SCREEN = "\x1b[?1049h"  # xterm's alternate screen, and back
OLD_SCREEN = "\x1b[?1049l"


@pytest.fixture
def world(mic: Mic) -> Mic:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.env["MIC_RESYNC"] = "1s"
    mic.write(MODELS)
    return mic


def test_it_redraws_every_second_in_80_columns_until_ctrl_c(world: Mic) -> None:
    world.run()
    until(lambda: "ready" in world("status").stdout, "the model")
    with terminal(world, "status", "--watch") as shown:
        began = time.monotonic()
        until(lambda: len(shown.screens()) >= 4, "four screens")
        assert time.monotonic() - began > 1.5
        # Between two waits the broken one is being started.
        backoff = "broken-51000001: backoff: it exited"

        def resting() -> str:
            last = shown.screens()[-1]
            return last if backoff in last else ""

        screen = until(resting, "a screen with the backoff")
        assert max(map(len, screen.splitlines())) <= 80
        assert screen.count("\n") < 24
        assert re.search(r"\d\d:\d\d:\d\d", screen)
        for part in ("ENDPOINT", "ready", "http://127.0.0.1:"):
            assert part in screen, screen
        seconds = [re.search(r"ready\s+yes\s+(\d+)s", text) for text in shown.screens()]
        counts = [int(found[1]) for found in seconds if found]
        assert counts == sorted(set(counts)), counts  # time goes on between two rounds
        shown.process.send_signal(signal.SIGINT)
        assert shown.process.wait(60) == 0
        text = shown.read()
        assert NEW_SCREEN in text and text.index(OLD_SCREEN) > text.index(NEW_SCREEN)
        assert "interrupted" not in text and "Traceback" not in text


def test_it_names_the_other_gpus_and_says_when_no_daemon_runs(world: Mic) -> None:
    drop_in = world.config.with_name("gpus.yaml.d") / "10.yaml"
    drop_in.parent.mkdir()
    drop_in.write_text("gpus: {2: none}\n")
    others = "Kept empty: GPU 2\nNot in the file: GPU 3\n"
    alone = f"No daemon runs: nothing restarts what dies. Start it: {start_daemon()}\n"
    with terminal(world, "status") as shown:
        assert shown.ends()[1].endswith(others + alone)
    assert world("status", "--json").json()["daemon"] is False
    world.run(http=False)
    with terminal(world, "status") as shown:
        assert shown.ends()[1].endswith(others)
    assert world("status", "--json").json()["daemon"] is True


def test_a_daemon_that_restarts_is_shown_as_that(world: Mic) -> None:
    """Without a daemon the machine is looked at; a socket that does not answer is told of."""
    daemon = world.run()
    with terminal(world, "status", "--watch") as shown:
        until(lambda: shown.screens(), "a screen")
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            until(lambda: "not read for" in shown.screens()[-1], "the notice")
            assert "ENDPOINT" in shown.screens()[-1]
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        until(lambda: "not read for" not in shown.screens()[-1], "the daemon again")
        daemon.stop()
        until(lambda: "ENDPOINT" in shown.screens()[-1], "a look of its own")
        assert shown.process.poll() is None


def test_a_first_look_that_fails_ends_it(mic: Mic) -> None:
    done = mic("status", "--watch", rc=1)  # there is no file
    assert done.stderr.startswith("error: ") or "gpus.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("daemon", [True, False])
def test_in_a_pipe_it_is_a_document_a_line(world: Mic, daemon: bool) -> None:
    if daemon:
        world.run()
    process = subprocess.Popen(
        [PROGRAM, "status", "--watch"],
        env=world.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        documents = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert [document["version"] for document in documents] == [1, 1, 1]
        assert [row["model"] for row in documents[0]["instances"]] == [
            "a-model-with-a-rather-long-name",
            "broken",
        ]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("daemon", [True, False])
def test_its_document_has_every_field_with_a_daemon_and_without(world: Mic, daemon: bool) -> None:
    if daemon:
        world.run()
    document = json.loads(world("status", "--json", rc=3).stdout)
    adapter = TypeAdapter(StatusDocument)
    read = adapter.validate_json(json.dumps(document), strict=True)
    assert adapter.dump_python(read, mode="json") == document
    assert document["config"]["generation"] == (1 if daemon else None)
    if not daemon:
        world("apply", rc=3)
        assert json.loads(world("status", "--json", rc=3).stdout)["config"]["generation"] == 1


def test_a_reader_that_goes_ends_it(world: Mic) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{PROGRAM} status --watch broken | head -n 1"],
        env=world.environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    (row,) = json.loads(done.stdout)["instances"]
    assert (row["model"], done.stderr) == ("broken", "")


# --- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture
def closed(world: Mic) -> Iterator[Mic]:
    """A daemon whose socket its caller may not open."""
    if os.geteuid() != 0:
        pytest.skip("cannot run: only root can give up the right to open everything")
    world.run()
    world.run_dir.chmod(0)
    yield world
    world.run_dir.chmod(0o700)


def as_others_are(mic: Mic, *args: str) -> subprocess.CompletedProcess[str]:
    """Without the capabilities that let root pass by the modes of files: capabilities(7)."""
    return subprocess.run(
        ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", PROGRAM, *args],
        env=mic.environment(),
        cwd=mic.home,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_who_may_not_use_the_socket_is_told_over_http(closed: Mic) -> None:
    done = as_others_are(closed, "status", "--json")
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    assert document == http(f"{closed.url}/api/v1/status").json() or document["version"] == 1
    assert len(document["instances"]) == 2
    assert done.stderr == ""


def test_where_http_does_not_answer_the_socket_is_what_is_told_of(
    closed: Mic, free_port: Callable[[], int]
) -> None:
    closed.env["MIC_LISTEN"] = f"127.0.0.1:{free_port()}"
    done = as_others_are(closed, "status")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot talk to the daemon at {closed.socket}: permission denied\n"
        "hint: run as root, or add yourself to the group mic\n"
    )
