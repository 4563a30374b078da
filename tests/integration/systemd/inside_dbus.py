"""D-Bus that comes and goes, and who may use it, from within the machine."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import RunState
from tests.integration.systemd.world import HOST, World, run
from tests.support.commands import sh
from tests.support.waiting import until


@pytest.fixture
def dbus() -> Iterator[None]:
    run("systemctl", "reset-failed", "dbus.service")
    yield
    run("systemctl", "reset-failed", "dbus.service")
    run("systemctl", "start", "dbus.socket", "dbus.service")
    until(lambda: run("busctl", "status", "org.freedesktop.systemd1", rc=None), "systemd on D-Bus")


def test_a_restart_of_dbus_is_lived_through(world: World, dbus: None) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    for _ in range(3):
        run("systemctl", "restart", "dbus.service")
        begun = time.monotonic()
        assert world.look("a") == seen
        assert time.monotonic() - begun < 9  # one answer may take 10 s
    world.runtime.start(world.launch("b", sh("exec sleep 300")))
    run("systemctl", "restart", "dbus.service")
    world.runtime.stop(seen, signal="SIGTERM", grace=30)
    assert world.look("a").exit_code == 143


def test_a_stop_under_way_lives_through_a_restart_of_dbus(world: World, dbus: None) -> None:
    program = "trap 'echo ending; sleep 2; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    seen = world.start("a", sh(program))
    world.await_line("a", "up")
    stopping = threading.Thread(
        target=world.runtime.stop, args=(seen,), kwargs={"signal": "SIGTERM", "grace": 20}
    )
    stopping.start()
    world.await_line("a", "ending")
    run("systemctl", "restart", "dbus.service")
    stopping.join(60)
    assert not stopping.is_alive()
    assert (world.look("a").state, world.look("a").exit_code) == (RunState.EXITED, 0)


def test_without_dbus_what_runs_is_unknown(world: World, dbus: None) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    run("systemctl", "stop", "dbus.socket", "dbus.service")
    view = world.runtime.observe()
    assert (view.workloads, view.foreign_workloads) == ((), ())
    assert view.error == "cannot read the units of systemd: D-Bus does not run"
    assert view.hint == "start it with: systemctl start dbus"
    with pytest.raises(RuntimeUnavailable, match=f"^cannot stop {seen.name}: D-Bus does not run$"):
        world.runtime.stop(seen, signal="SIGTERM", grace=1)
    with pytest.raises(RuntimeUnavailable):
        world.runtime.start(world.launch("a", sh("true")))
    run("systemctl", "start", "dbus.socket", "dbus.service")
    assert world.look("a") == seen
    assert (procfs.stat(seen.pid or 0) or seen) is not seen


def test_events_tell_and_end_with_dbus(world: World, dbus: None) -> None:
    stop = threading.Event()
    heard: list[str] = []
    failures: list[str] = []

    def follow() -> None:
        try:
            for line in world.runtime.events(stop):
                heard.append(line)
        except RuntimeUnavailable as error:
            failures.append(str(error))

    thread = threading.Thread(target=follow)
    thread.start()
    until(lambda: heard == ["listening to systemd"], "the first line")
    launch = world.launch("a", sh("sleep 0.3; exit 3"))
    world.runtime.start(launch)
    ref = f"{launch.name}.service"
    until(lambda: heard[-1] == f"{ref}: failed (failed)", "the failure to be told")
    world.runtime.remove(world.look("a"))
    until(lambda: heard[-1] == f"{ref}: gone", "the end to be told")
    run("systemctl", "restart", "dbus.service")
    thread.join(10)
    assert failures == [
        "cannot follow the changes of systemd's units: the connection to D-Bus was lost"
    ]
    stop.set()
    assert [*world.runtime.events(stop)] == ["listening to systemd"]


def test_who_is_not_root_may_look_and_not_touch(world: World) -> None:
    seen = world.start("a", sh("exec sleep 300"), working_dir="/")
    program = f"""
import json, sys
sys.path[:0] = {[path for path in os.sys.path if path]!r}
from mic_supervisor.errors import MicError
from mic_supervisor.runtimes.systemd.runtime import SystemdRuntime
runtime = SystemdRuntime({world.scope!r}, {HOST!r})
seen, = runtime.observe().workloads
said = [seen.name, seen.pid]
for work in (lambda: runtime.stop(seen, signal="SIGTERM", grace=1), lambda: [*runtime.logs(seen)]):
    try:
        work()
    except MicError as error:
        said += [str(error), error.hint]
print(json.dumps(said))
"""
    told = json.loads(run("runuser", "-u", "bob", "--", sys.executable, "-c", program))
    assert told == [
        *(seen.name, seen.pid),
        *(f"cannot stop {seen.name}: systemd lets only root do it", "run as root"),
        f"cannot read the log of {seen.name}: the journal may not be read by this user",
        "run as root, or as a member of the group systemd-journal",
    ]
