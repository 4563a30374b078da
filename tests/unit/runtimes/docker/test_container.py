"""Logs and events through the real SDK from an engine that breaks them off."""

from __future__ import annotations

import json
import struct
import threading
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.runtimes import lines
from mic_supervisor.runtimes.docker.create import ownership
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.support.waiting import until
from tests.unit.runtimes.docker.engine_fake import (
    WORKLOAD,
    FakeEngine,
    Handler,
    fails,
    half,
    refuse,
    reply,
)


def frame(data: bytes) -> bytes:
    return struct.pack(">BxxxL", 1, len(data)) + data


def described(fake: FakeEngine, *, running: bool) -> None:
    found = {"Config": {"Tty": False}, "State": {"Running": running}}
    fake.answers["GET /containers/c1/json"] = reply(found)


def answered(fake: FakeEngine, *parts: bytes) -> None:
    def log(handler: Handler) -> None:
        handler.begin()
        for part in parts:
            handler.chunk(frame(part))
        handler.chunk(b"")

    fake.answers["GET /containers/c1/logs"] = log


def test_a_log_that_breaks_off_is_an_error_after_what_came(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    def log(handler: Handler) -> None:
        handler.begin()
        handler.chunk(frame(b"one\n"))
        handler.close_connection = True

    described(fake, running=True)
    fake.answers["GET /containers/c1/logs"] = log
    told = runtime.logs(WORKLOAD, follow=True)
    assert next(told) == "one"
    error = fails(lambda: next(told))
    assert isinstance(error, RuntimeUnavailable)
    assert str(error) == ("cannot read the log of container mic-mam: the engine ended the stream")


def test_a_log_that_ends_with_its_container_is_whole(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    described(fake, running=False)
    answered(fake, b"one\n", b"two")
    assert list(runtime.logs(WORKLOAD, follow=True)) == ["one", "two"]


def test_a_log_that_is_read_at_once_is_whole_or_an_error(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    described(fake, running=True)
    fake.answers["GET /containers/c1/logs"] = half
    assert isinstance(fails(lambda: list(runtime.logs(WORKLOAD))), RuntimeUnavailable)
    answered(fake, b"one\n", b"h\xc3", b"\xa9\r\n\n", b"\xff rest")
    assert list(runtime.logs(WORKLOAD)) == ["one", "hé", "", "\N{REPLACEMENT CHARACTER} rest"]


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_how_the_bytes_are_cut_does_not_matter(parts: list[bytes]) -> None:
    assert list(lines(parts)) == list(lines([b"".join(parts)]))


def test_a_line_without_end_is_given_in_pieces() -> None:
    assert [len(line) for line in lines([b"x" * (1 << 20)] * 2)] == [2 << 20]


@pytest.mark.parametrize("broken", ["hang up", "end", "no JSON", "[", '{"a":', "[1]\n", "null\n"])
def test_events_that_break_off_are_an_error(
    runtime: DockerRuntime, fake: FakeEngine, broken: str
) -> None:
    told = {**ownership("default", "h"), "name": "m", "exitCode": "1"}
    event = {"Action": "die", "Actor": {"ID": "c1", "Attributes": told}}

    def events(handler: Handler) -> None:
        handler.begin()
        handler.chunk(json.dumps(event).encode() + b"\n")
        if broken == "end":
            handler.chunk(b"")
        elif broken == "no JSON":
            handler.chunk(b"Bad Gateway\n")
        elif broken != "hang up":
            handler.chunk(broken.encode() * 50_000)
        handler.close_connection = True

    fake.answers["GET /events"] = events
    heard = runtime.events(threading.Event())
    assert next(heard) == f"listening to the engine at {fake.path}"
    assert next(heard) == "die m (exit code 1)"
    error = fails(lambda: next(heard))
    assert isinstance(error, RuntimeUnavailable)
    assert str(error).startswith("cannot follow the engine's events: ")


def test_an_engine_that_filters_nothing_wakes_nobody_with_what_was_not_asked_for(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    ours = {**ownership("default", "h"), "name": "m"}
    given = [
        *(("exec_start: nvidia-smi -L", ours), ("exec_die", ours), ("top", ours)),
        *(("start", {**ours, "io.mic.scope": "other"}), ("die", {"name": "stranger"})),
        *(("start", ours), ("health_status: healthy", ours), ("oom", {})),
    ]

    def events(handler: Handler) -> None:
        handler.begin()
        for action, attributes in given:
            event = {"Action": action, "id": "c1", "Actor": {"ID": "c1", "Attributes": attributes}}
            handler.chunk(json.dumps(event).encode() + b"\n")

    fake.answers["GET /events"] = events
    heard = runtime.events(threading.Event())
    assert [next(heard) for _ in range(4)][1:] == ["start m", "health_status: healthy m", "oom c1"]
    assert fake.asked("GET /containers/c1/json") == 0


def test_events_end_soon_when_told_to(runtime: DockerRuntime, fake: FakeEngine) -> None:
    release, hung_up = threading.Event(), threading.Event()

    def events(handler: Handler) -> None:
        handler.begin()
        release.wait(30)
        hung_up.set()

    fake.answers["GET /events"] = events
    stop = threading.Event()
    heard = runtime.events(stop)
    next(heard)
    threading.Timer(0.1, stop.set).start()
    assert list(heard) == []
    assert not hung_up.is_set()  # it is not the engine that ended the stream
    release.set()
    until(
        lambda: all(thread.name != "docker-events-stop" for thread in threading.enumerate()),
        "the end of the thread that waits for the word",
    )


@pytest.mark.parametrize("speaks", ["1.41", "1.60"])
def test_events_are_followed_in_the_version_that_the_engine_speaks(
    runtime: DockerRuntime, fake: FakeEngine, speaks: str
) -> None:
    fake.speaks = speaks
    fake.answers["GET /events"] = lambda handler: handler.begin()
    assert next(runtime.events(threading.Event())).startswith("listening")
    assert fake.requests[-1] == (speaks, "GET /events")


@pytest.mark.parametrize("call", ["GET /_ping", "GET /events"])
@pytest.mark.parametrize(
    ("status", "cause"),
    [(403, "does not allow the call (“no”)"), (500, ": “no”"), (503, "is not ready (“no”)")],
)
def test_a_refusal_of_events_is_told_at_once(
    runtime: DockerRuntime, fake: FakeEngine, call: str, status: int, cause: str
) -> None:
    fake.answers[call] = refuse(status, "no")
    error = fails(lambda: next(runtime.events(threading.Event())))
    assert str(error).startswith("cannot follow the engine's events: ")
    assert cause in str(error)


def test_a_death_is_told_when_the_engine_has_written_it_down(fake: FakeEngine) -> None:
    """It holds the container's lock until then, and so an inspection."""
    written = threading.Event()

    def inspected(handler: Handler) -> None:
        written.wait(10)
        reply({"State": {"Status": "exited"}})(handler)

    def events(handler: Handler) -> None:
        handler.begin()
        for action in ("start", "die"):
            handler.chunk(json.dumps({"Action": action, "id": "c1"}).encode() + b"\n")
        handler.chunk(b"")

    fake.answers |= {"GET /containers/c1/json": inspected, "GET /events": events}
    heard: list[str] = []
    runtime = DockerRuntime("s", "h", base_url=fake.url, docker_config=None)

    def listen() -> None:
        with suppress(RuntimeUnavailable):
            for line in runtime.events(threading.Event()):
                heard.append(line)

    listener = threading.Thread(target=listen)
    listener.start()
    until(lambda: fake.asked("GET /containers/c1/json") == 1, "the inspection")
    assert heard[1:] == ["start c1"]
    written.set()
    listener.join(10)
    assert heard[1:] == ["start c1", "die c1"]
