"""Logs and events through the real SDK from an engine that breaks them off."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mic_supervisor.errors import (
    RuntimeUnavailable,
)
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.support.waiting import until
from tests.unit.runtimes.docker.engine_fake import (
    WORKLOAD,
    FakeEngine,
    Handler,
    fails,
)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(tmp_path / "d.sock")
    yield fake
    fake.close()


@pytest.fixture
def runtime(fake: FakeEngine) -> Iterator[DockerRuntime]:
    runtime = DockerRuntime(
        "default",
        "h",
        base_url=fake.url,
        docker_config=None,
        timeout=0.4,
        patience=0.5,
        kill_wait=0.3,
    )
    yield runtime
    runtime.close()


def frame(data: bytes) -> bytes:
    return struct.pack(">BxxxL", 1, len(data)) + data


def test_a_log_that_breaks_off_is_an_error_after_what_came(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    def log(handler: Handler) -> None:
        handler.begin()
        handler.chunk(frame(b"one\n"))
        handler.close_connection = True

    fake.answers["GET /containers/c1/logs"] = log
    lines = runtime.logs(WORKLOAD, follow=True)
    assert next(lines) == "one"
    error = fails(lambda: next(lines))
    assert isinstance(error, RuntimeUnavailable)
    assert str(error) == (
        f"cannot read the log of container mic-mam: the engine at {fake.path} hung up in the "
        "middle of the call"
    )


@pytest.mark.parametrize("broken", ["hang up", "end", "no JSON"])
def test_events_that_break_off_are_an_error(
    runtime: DockerRuntime, fake: FakeEngine, broken: str
) -> None:
    event = {"Action": "die", "Actor": {"ID": "c1", "Attributes": {"name": "m", "exitCode": "1"}}}

    def events(handler: Handler) -> None:
        handler.begin()
        handler.chunk(json.dumps(event).encode() + b"\n")
        if broken == "end":
            handler.chunk(b"")
        elif broken == "no JSON":
            handler.chunk(b"Bad Gateway\n")
        handler.close_connection = True

    fake.answers["GET /events"] = events
    heard = runtime.events(threading.Event())
    assert next(heard) == f"listening to the engine at {fake.path}"
    assert next(heard) == "die m (exit code 1)"
    error = fails(lambda: next(heard))
    assert isinstance(error, RuntimeUnavailable)
    assert str(error).startswith("cannot follow the engine's events: ")


def test_events_end_soon_when_told_to(runtime: DockerRuntime, fake: FakeEngine) -> None:
    def events(handler: Handler) -> None:
        handler.begin()
        time.sleep(5)

    fake.answers["GET /events"] = events
    stop = threading.Event()
    heard = runtime.events(stop)
    next(heard)
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    assert list(heard) == []
    assert time.monotonic() - began < 2
    until(
        lambda: all(thread.name != "docker-events-stop" for thread in threading.enumerate()),
        "the end of the thread that waits for the word",
    )
