"""The wall clock is set while the daemon runs, as NTP does it: no decision and no time is wrong.

The daemon starts with a wrong clock, which is then set to what the processes that it starts have.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.daemon_world import DaemonWorld, daemon_world, identity
from tests.support.commands import SERVER
from tests.support.set_clock import SetClock
from tests.support.waiting import http, until

HOUR = 3600
NAME = identity("face", 0)


def model(command: str, start_timeout: str = "60s", **env: str) -> str:
    """A server that is asked every 0.1 s, and may need `start_timeout` until it is up."""
    texts = ", ".join(f'{key}: "{value}"' for key, value in env.items())
    return (
        f"{{backend: process, command: [{command}], env: {{{texts}}}, "
        f"start_timeout: {start_timeout}, stop_timeout: 2s, "
        "probe: {http: /health, period: 100ms}}"
    )


FIRST = f'{sys.executable}, {SERVER}, --port, "${{port}}"'
SECOND = f'{sys.executable}, -B, {SERVER}, --port, "${{port}}"'
HANGS = '/bin/sleep, "100000"'


@contextmanager
def clocked(home: Path) -> Iterator[tuple[DaemonWorld, SetClock]]:
    clock = SetClock(home)
    with daemon_world(home, None, gpus=1) as found:
        found.mic.env |= {**clock.env(), "MIC_RESYNC": "1s"}
        yield found, clock


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[DaemonWorld, SetClock]]:
    with clocked(tmp_path) as made:
        yield made


def row(world: DaemonWorld) -> dict[str, Any]:
    return world.rows()[NAME]


def said(world: DaemonWorld, *kinds: str) -> list[str]:
    return [event["text"] for event in world.history(*kinds)]


def metric(world: DaemonWorld, name: str) -> float:
    text = http(f"{world.mic.url}/metrics").text
    found = [line for line in text.splitlines() if line.startswith(name)]
    return float(found[0].rsplit(" ", 1)[1]) if found else float("nan")


def fresh(world: DaemonWorld, clock: SetClock) -> None:
    """Waits until every time that is published is one of the clock as it is set now."""
    name = "mic_reconcile_last_success_timestamp_seconds"

    def look() -> bool:
        return abs(metric(world, name) - clock.now()) < 30

    until(look, f"{name} to be of now")
    loaded = clock.now() - metric(world, "mic_config_last_reload_success_timestamp_seconds")
    since = clock.now() - row(world)["since"]
    started = clock.now() - metric(world, "mic_model_start_time_seconds")
    for ago in (loaded, since, started):
        assert -2 < ago < 600, (loaded, since, started)


@pytest.mark.parametrize("jump", [-HOUR, HOUR], ids=["set back", "set forward"])
def test_a_start_after_the_clock_was_set_has_its_whole_budget(
    world: tuple[DaemonWorld, SetClock], jump: int
) -> None:
    daemon, clock = world
    clock.set(-jump)
    daemon.write({0: "face"}, face=model(FIRST, READY_DELAY="2"))
    daemon.mic.run()
    daemon.converged(NAME)
    clock.set(0)
    fresh(daemon, clock)
    # A rejected startup probe, several times, is all that a budget that is spent waits for.
    daemon.write({0: "face"}, face=model(SECOND, READY_DELAY="2"))
    daemon.accepted(2)
    daemon.converged(NAME)
    assert said(daemon, "failed") == []
    assert not any("not up" in f"{event}" for event in daemon.history())
    assert row(daemon)["restarts"] == 0
    fresh(daemon, clock)


@pytest.mark.parametrize("jump", [-HOUR, HOUR], ids=["set back", "set forward"])
def test_a_start_that_hangs_is_given_up_in_its_budget_and_rolled_back(
    world: tuple[DaemonWorld, SetClock], jump: int
) -> None:
    daemon, clock = world
    clock.set(-jump)
    daemon.write({0: "face"}, face=model(FIRST))
    daemon.mic.run()
    daemon.converged(NAME)
    clock.set(0)
    before = time.monotonic()
    daemon.write({0: "face"}, face=model(HANGS, "3s"))
    until(
        lambda: "not up within 3 s" in (row(daemon)["reason"] or ""),
        "the hanging start to be given up",
        timeout=60,
    )
    assert time.monotonic() - before >= 3
    until(lambda: row(daemon)["serving"], "the last good one to serve")


def test_a_backoff_neither_ends_nor_lasts_longer(tmp_path: Path) -> None:
    """Set back and forward, while the daemon stays and while it restarts: side by side, since each
    waits for the end of a backoff.
    """
    cases = [(jump, restart) for jump in (-HOUR, HOUR) for restart in (False, True)]

    def play(number: int) -> None:
        jump, restart = cases[number]
        home = tmp_path / str(number)
        home.mkdir()
        try:
            with clocked(home) as (daemon, clock):
                wait_for_a_backoff(daemon, clock, jump, restart)
        except BaseException as error:
            error.add_note(f"set by {jump} s; the daemon {'restarts' if restart else 'stays'}")
            raise

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(play, range(len(cases))))


def wait_for_a_backoff(daemon: DaemonWorld, clock: SetClock, jump: int, restart: bool) -> None:
    clock.set(-jump)
    daemon.write({0: "face"}, face=model(FIRST, EXIT_AFTER="0"))
    daemon.mic.run()

    def left() -> float:
        found = row(daemon)
        at = found["next_retry"] if found["phase"] == "backoff" else None
        return at - clock.now() if at is not None else 0.0

    until(lambda: left() > 9, "a wait of 10 s", timeout=60)
    tries = len(said(daemon, "begin"))
    until(lambda: left() < 8, "a part of it to be over")
    due = time.monotonic() + left()
    if restart:
        daemon.mic.daemons[-1].stop()
    clock.set(0)
    if restart:
        daemon.mic.run()
    until(lambda: abs(metric(daemon, "mic_model_next_retry") - clock.now()) < 30, "its time")
    found, rest = len(said(daemon, "begin")), left()
    if time.monotonic() < due:  # else the machine was so busy that the next try is due already
        assert found == tries
        assert rest <= 11
    until(lambda: len(said(daemon, "begin")) > tries, "the next try")
    assert time.monotonic() >= due - 1
