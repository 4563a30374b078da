"""SIGTERM ends the daemon, whenever it comes.

TERMS in the environment sets how often. A signal that is lost is lost once in ten or in thirty
times, so that a change of how the daemon ends deserves 200.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.daemon_world import DaemonWorld, daemon_world, lines, process
from tests.support.mic import Daemon
from tests.support.waiting import http, until

TERMS = int(os.environ.get("TERMS", "12"))
BOUND = 5.0  # seconds
LONGEST_START = 1.5  # seconds, in which a start is over on most machines; else as long as one took


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path, None) as made:
        made.write({0: "p", 1: "none"}, p=process())
        yield made


@contextmanager
def woken_often(world: DaemonWorld) -> Iterator[None]:
    """Three clients make the loop go round, and the file is written again and again."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            world.mic.ask("retry", timeout=1.0, name="p")

    def write() -> None:
        while not over.is_set():
            world.write({0: "p", 1: "none"})
            over.wait(0.05)

    threads = [threading.Thread(target=target) for target in (ask, ask, ask, write)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def ended(daemon: Daemon, what: str) -> None:
    code = daemon.stop(timeout=BOUND)
    text = daemon.text()
    assert code == 0, f"{what}: exit {code}\n{text}"
    assert "left behind" not in text, f"{what}\n{text}"
    assert "Traceback" not in text, f"{what}\n{text}"


@pytest.mark.slow
def test_sigterm_ends_a_daemon_that_is_woken_often(world: DaemonWorld) -> None:
    chance = random.Random(7)
    lost: list[str] = []
    for turn in range(TERMS):
        daemon = world.mic.run(http=False)
        with woken_often(world):
            time.sleep(chance.uniform(0.0, 0.4))
            try:
                ended(daemon, f"turn {turn}")
            except AssertionError as error:
                lost.append(str(error))
    assert not lost, f"{len(lost)} of {TERMS}\n" + "\n".join(lost)


@pytest.mark.slow
def test_sigterm_ends_a_daemon_that_starts(world: DaemonWorld) -> None:
    began = time.monotonic()
    ended(world.mic.run(http=False), "the first of all")
    longest = max(LONGEST_START, time.monotonic() - began)
    lost: list[str] = []
    codes: list[int] = []
    for turn in range(TERMS):
        daemon = world.mic.start("run")
        after = longest * turn / TERMS
        time.sleep(after)
        daemon.process.send_signal(signal.SIGTERM)
        try:
            code = daemon.stop(timeout=BOUND)
        except AssertionError as error:
            lost.append(f"{after:.2f} s: {error}")
            continue
        # Until Python itself is up, which takes long on a busy machine, nobody but the kernel can
        # answer. Then nothing was said, and nothing begun.
        if code != 0 and not (code == -signal.SIGTERM and daemon.text() == ""):
            lost.append(f"{after:.2f} s: exit {code}\n{daemon.text()}")
        codes.append(code)
    assert not lost, f"{len(lost)} of {TERMS}\n" + "\n".join(lost)
    assert 0 in codes, "the daemon itself answered none of them"


def test_a_socket_that_somebody_removed_is_bound_again(world: DaemonWorld) -> None:
    daemon = world.mic.run()
    world.mic.socket.unlink()
    health = until(
        lambda: (found := http(f"{world.mic.url}/healthz")).status == 503 and found.json(),
        "/healthz to tell",
    )
    assert health["status"] == "broken"
    assert health["detail"] == "the control socket is not alive"
    until(lambda: "result" in world.mic.ask("ping"), "the socket to be back")
    until(lambda: http(f"{world.mic.url}/healthz").status == 200, "it to be well again")
    why = f"nobody can reach the daemon at {world.mic.socket}: the socket is gone"
    assert len(lines(daemon, f"the control socket is not alive: {why}.* started again in 1 s")) == 1
    ended(daemon, "afterwards")
    assert not world.mic.socket.exists()
