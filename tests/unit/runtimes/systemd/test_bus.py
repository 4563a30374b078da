"""A bus that is absent, deaf or foreign: everything ends in time, and in words."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.errors import MicError, PreflightFailed, RuntimeRefused, RuntimeUnavailable
from mic_supervisor.model import (
    ContainerSpec,
    Identity,
    Launch,
    Limits,
    ObservedWorkload,
    ProcessSpec,
    RunState,
)
from mic_supervisor.runtimes.systemd import bus as systemd_bus
from mic_supervisor.runtimes.systemd.bus import Lost, Refused, explain
from mic_supervisor.runtimes.systemd.runtime import SystemdRuntime

IDENTITY = Identity("default", "h", "a", "MAM", "process", ("GPU-1",), {}, {}, "00")
SPEC = ProcessSpec(("/bin/true",))
LAUNCH = Launch("mic-default-a-00", "systemd", IDENTITY, SPEC)
SEEN = ObservedWorkload(
    "systemd", LAUNCH.name, f"{LAUNCH.name}.service", IDENTITY, RunState.RUNNING
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd_bus, "CALL_TIMEOUT", 0.3)
    monkeypatch.setattr(systemd_bus, "RETURN_TIMEOUT", 0.2)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:path={tmp_path / 'bus'}"


@pytest.fixture
def runtime(address: str, tmp_path: Path) -> Iterator[SystemdRuntime]:
    made = SystemdRuntime("default", "h", bus_address=address, directory=tmp_path / "run")
    yield made
    made.close()


@pytest.fixture
def deaf(tmp_path: Path) -> Iterator[None]:
    """Takes connections, and never says a word."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "bus"))
        server.listen()
        yield


@pytest.fixture
def rude(tmp_path: Path) -> Iterator[None]:
    """Takes connections, and hangs up."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "bus"))
        server.listen()
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                server.accept()[0].close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        over.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(tmp_path / "bus"))
        thread.join(5)


def test_without_a_bus(runtime: SystemdRuntime) -> None:
    view = runtime.observe()
    assert (view.runtime, view.workloads, view.foreign_workloads) == ("systemd", (), ())
    assert view.error == "cannot read the units of systemd: there is no D-Bus to reach systemd by"
    assert view.hint == "install it: apt-get install dbus"


def test_with_a_bus_that_does_not_run(runtime: SystemdRuntime, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "bus"))
    view = runtime.observe()
    assert view.error == "cannot read the units of systemd: D-Bus does not run"
    assert view.hint == "start it with: systemctl start dbus"


def test_with_a_deaf_bus(runtime: SystemdRuntime, deaf: None) -> None:
    begun = time.monotonic()
    view = runtime.observe()
    assert view.error == (
        "cannot read the units of systemd: systemd cannot be reached: "
        "D-Bus gave no answer within 0.3 s"
    )
    assert time.monotonic() - begun < 3


def test_with_a_bus_that_hangs_up(runtime: SystemdRuntime, rude: None) -> None:
    begun = time.monotonic()
    view = runtime.observe()
    assert view.error is not None
    assert view.error.startswith("cannot read the units of systemd: systemd cannot be reached: ")
    assert time.monotonic() - begun < 3


def test_with_an_address_that_is_none(tmp_path: Path) -> None:
    view = SystemdRuntime("default", "h", bus_address="nonsense", directory=tmp_path).observe()
    assert view.error is not None
    assert view.error.startswith("cannot use the D-Bus address: ")


@pytest.mark.slow
def test_every_call_says_what_it_could_not_do(runtime: SystemdRuntime, tmp_path: Path) -> None:
    cause = "there is no D-Bus to reach systemd by"
    name = LAUNCH.name
    calls = {
        f"cannot start {name}": lambda: runtime.start(LAUNCH),
        f"cannot stop {name}": lambda: runtime.stop(SEEN, signal="TERM", grace=1),
        f"cannot remove {name}": lambda: runtime.remove(SEEN),
        f"cannot read the log of {name}": lambda: [*runtime.logs(SEEN)],
        "cannot run true": lambda: runtime.run_check(SEEN, ("true",), 1),
        "cannot follow the changes of systemd's units": lambda: [
            *runtime.events(threading.Event())
        ],
    }
    for text, call in calls.items():
        with pytest.raises(RuntimeUnavailable) as failed:
            call()
        assert str(failed.value) == f"{text}: {cause}"
    assert not (tmp_path / "run").exists()  # no secret was written for nothing


def test_many_threads_share_one_failure(runtime: SystemdRuntime) -> None:
    views: list[str | None] = []
    threads = [
        threading.Thread(target=lambda: views.append(runtime.observe().error)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert views == ["cannot read the units of systemd: there is no D-Bus to reach systemd by"] * 8


def test_after_a_close_a_call_connects_again(runtime: SystemdRuntime) -> None:
    runtime.close()
    runtime.close()
    assert runtime.observe().error is not None


@pytest.mark.parametrize("repeat", [True, False])
def test_a_question_that_pid_1_left_unanswered_is_asked_again_where_that_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, repeat: bool
) -> None:
    """As D-Bus says it while it is restarted."""
    bus = systemd_bus.Bus()
    asked: list[str] = []

    async def connected() -> None:
        return None

    async def ask(*words: Any) -> list[str]:
        asked.append(words[1].member)
        if len(asked) == 1:
            raise Refused(
                "org.freedesktop.DBus.Error.NoReply",
                "Message recipient disconnected from message bus without replying",
            )
        return ["the answer"]

    monkeypatch.setattr(bus, "_connected", connected)
    monkeypatch.setattr(bus, "_ask", ask)
    try:
        if repeat:
            assert bus.run(bus.call("GetUnit", repeat=True), timeout=5) == ["the answer"]
            assert asked == ["GetUnit"] * 2
        else:
            with pytest.raises(Refused):
                bus.run(bus.call("KillUnit"), timeout=5)
            assert asked == ["KillUnit"]
    finally:
        bus.close()


# --- before D-Bus is asked --------------------------------------------------------------------


def test_a_container_is_no_process(runtime: SystemdRuntime) -> None:
    launch = Launch("mic-default-a-00", "systemd", IDENTITY, ContainerSpec("x"))
    for work in (runtime.start, lambda one: runtime.prepare(one, lambda text: None)):
        with pytest.raises(PreflightFailed) as failed:
            work(launch)
        assert str(failed.value) == (
            "cannot start mic-default-a-00: a container is no host process"
        )


def test_create_is_never_called(runtime: SystemdRuntime) -> None:
    assert runtime.creates_ahead is False
    with pytest.raises(RuntimeRefused, match="without starting it"):
        runtime.create(LAUNCH)


def test_a_unit_can_be_bounded_in_memory_and_cpu(runtime: SystemdRuntime) -> None:
    spec = ProcessSpec(("/bin/true",), limits=Limits(memory=1 << 30, cpus=1.5))
    runtime.prepare(Launch("x", "systemd", IDENTITY, spec), lambda text: None)


def test_what_a_start_needs_is_looked_for_first(runtime: SystemdRuntime) -> None:
    spec = ProcessSpec(("/no/such",))
    with pytest.raises(PreflightFailed) as failed:
        runtime.prepare(Launch("x", "systemd", IDENTITY, spec), lambda text: None)
    assert str(failed.value) == "cannot run /no/such: it does not exist"


# --- answers in words -------------------------------------------------------------------------

BUS = "org.freedesktop.DBus.Error."
PID_1 = "org.freedesktop.systemd1."


@pytest.mark.parametrize(
    ("error", "kind", "text", "hint"),
    [
        (
            *(Refused(f"{BUS}ServiceUnknown", "x"), RuntimeUnavailable),
            "cannot do it: systemd is not on the system bus",
            "where systemd is not PID 1, set MIC_PROCESS_RUNTIME=subprocess",
        ),
        (
            *(Refused(f"{BUS}NoReply", "too slow"), RuntimeUnavailable),
            *("cannot do it: systemd gave no answer: “too slow”", None),
        ),
        (
            *(Refused(f"{BUS}InteractiveAuthorizationRequired", "x"), RuntimeRefused),
            *("cannot do it: systemd lets only root do it", "run as root"),
        ),
        (
            *(Refused(f"{PID_1}TransactionIsDestructive", "x"), RuntimeRefused),
            "cannot do it: the machine is going down, or the unit is being stopped",
            "see systemctl list-jobs",
        ),
        (
            *(Refused(f"{PID_1}UnitExists", "x"), RuntimeRefused),
            "cannot do it: there is a unit of that name already",
            "see which: systemctl list-unit-files 'mic-*'",
        ),
        (
            *(Refused(f"{PID_1}UnitMasked", "Unit x is masked."), RuntimeRefused),
            *("cannot do it: “Unit x is masked.”", "see systemctl unmask"),
        ),
        (
            *(Refused(f"{BUS}InvalidArgs", "Bad user name"), RuntimeRefused),
            *("cannot do it: systemd refused: “Bad user name”", None),
        ),
        (
            *(Refused(f"{BUS}Failed", ""), RuntimeRefused),
            *(f"cannot do it: systemd refused: “{BUS}Failed”", None),
        ),
        (
            *(Lost("no answer within 3 s"), RuntimeUnavailable),
            *("cannot do it: systemd cannot be reached: no answer within 3 s", None),
        ),
    ],
)
def test_answers(error: Refused | Lost, kind: type[MicError], text: str, hint: str | None) -> None:
    told = explain("do it", error)
    assert (type(told), str(told), told.hint) == (kind, text, hint)


def test_a_signal_that_there_is_not(runtime: SystemdRuntime) -> None:
    with pytest.raises(RuntimeRefused, match="there is no signal SIGNONE"):
        runtime.stop(SEEN, signal="SIGNONE", grace=1)
