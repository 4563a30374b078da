"""Starting, ending, stopping and forgetting units, seen from within the machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mic_supervisor.errors import MicError, RuntimeRefused, StopFailed
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import Limits, RunState
from mic_supervisor.runtimes.identity import identity_variables
from tests.integration.systemd.world import World, run
from tests.support.commands import STUBBORN, python, sh
from tests.support.waiting import until

TICK = 0.3  # seconds, for what takes a moment to happen


def test_nothing_runs(world: World) -> None:
    view = world.runtime.observe()
    assert (view.runtime, view.workloads, view.foreign_workloads, view.error) == (
        "systemd",
        (),
        (),
        None,
    )


def test_a_start_is_seen_as_it_was_asked_for(world: World) -> None:
    before = time.time()
    launch = world.launch("web-1", sh("echo hello; exec sleep 300"))
    world.runtime.start(launch)
    seen = world.look("web-1")
    assert (seen.runtime, seen.name, seen.ref) == (
        "systemd",
        launch.name,
        f"mic-{world.scope}-web-1-0badcafe.service",
    )
    assert seen.identity == launch.identity
    assert (seen.state, seen.exit_code, seen.finished_at, seen.error) == (
        RunState.RUNNING, None, None, None,
    )  # fmt: skip
    assert seen.pid is not None
    assert procfs.stat(seen.pid) is not None
    assert seen.created_at is not None
    assert seen.started_at is not None
    assert before - 1 <= seen.created_at <= seen.started_at <= time.time()
    groups = Path(f"/proc/{seen.pid}/cgroup").read_text()
    assert f"mic.slice/{seen.ref}" in groups
    assert world.runtime.observe().foreign_workloads == ()


def test_starting_what_runs_is_success(world: World) -> None:
    first = world.start("a", sh("exec sleep 300"))
    second = world.start("a", sh("exec sleep 300"))
    assert second.pid == first.pid


@pytest.mark.parametrize(
    ("text", "code", "error"),
    [
        ("exit 0", 0, None),
        ("exit 3", 3, None),
        ("exit 203", 203, None),
        ("kill -KILL $$", 137, "ended by SIGKILL"),
        ("kill -TERM $$", 143, "ended by SIGTERM"),
    ],
)
def test_how_it_ended_is_kept(world: World, text: str, code: int, error: str | None) -> None:
    world.runtime.start(world.launch("a", sh(f"sleep {TICK}; {text}")))
    seen = world.ended("a")
    assert (seen.exit_code, seen.error, seen.pid) == (code, error, None)
    assert seen.started_at is not None
    assert seen.finished_at is not None
    assert TICK - 0.1 <= seen.finished_at - seen.started_at <= TICK + 5
    again = world.make().observe()  # it does not depend on who asks
    assert [one.exit_code for one in again.workloads] == [code]


def test_a_program_that_ends_at_once_was_started(world: World) -> None:
    world.runtime.start(world.launch("a", sh("exit 7")))
    assert world.ended("a").exit_code == 7


def test_an_ended_unit_is_replaced_by_a_start(world: World) -> None:
    for code in (1, 0, 5):
        world.runtime.start(world.launch("a", sh(f"exit {code}")))
        assert world.ended("a").exit_code == code
    seen = world.start("a", sh("exec sleep 300"))
    assert seen.state is RunState.RUNNING


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_stop_sends_the_signal_and_waits(world: World, name: str) -> None:
    program = f"""
import signal, sys, time
def end(number, frame):
    print("got", signal.Signals(number).name)
    time.sleep({TICK})
    sys.exit(0)
signal.signal(signal.{name}, end)
print("up")
time.sleep(300)
"""
    seen = world.start("a", python(program))
    world.await_line("a", "up")
    begun = time.monotonic()
    world.runtime.stop(seen, signal=name, grace=20)
    assert TICK <= time.monotonic() - begun < 18
    seen = world.look("a")
    assert (seen.state, seen.exit_code) == (RunState.EXITED, 0)
    assert world.lines("a") == ["up", f"got {name}"]


def test_one_that_ignores_the_signal_is_killed_after_the_grace(world: World) -> None:
    seen = world.start("a", sh("trap '' TERM; echo up; while :; do sleep 1; done"))
    world.await_line("a", "up")
    begun = time.monotonic()
    world.runtime.stop(seen, signal="SIGTERM", grace=1.0)
    assert 1.0 <= time.monotonic() - begun < 20
    assert (world.look("a").exit_code, world.alive()) == (137, [])


def test_a_grace_of_nothing_kills_at_once(world: World) -> None:
    seen = world.start("a", sh("trap '' TERM; echo up; while :; do sleep 1; done"))
    world.await_line("a", "up")
    begun = time.monotonic()
    world.runtime.stop(seen, signal="SIGTERM", grace=0.0)
    assert time.monotonic() - begun < 20
    assert world.look("a").exit_code == 137


def test_a_stopped_process_hears_of_the_stop(world: World) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGSTOP)
    begun = time.monotonic()
    world.runtime.stop(seen, signal="SIGTERM", grace=30)
    assert time.monotonic() - begun < 20
    assert world.look("a").exit_code == 143


@pytest.mark.parametrize("main", ["time.sleep(300)", "signal.pause()"])
def test_the_whole_tree_goes_with_a_stop(world: World, main: str) -> None:
    # time.sleep: the main process is deaf to TERM, too
    end = "" if "sleep" in main else "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
    seen = world.start("a", python(f"{STUBBORN}\nescape(1)\n{end}{main}"))
    world.await_alive(3)
    world.runtime.stop(seen, signal="SIGTERM", grace=1.0)
    assert world.alive() == []
    assert world.look("a").state is RunState.EXITED


def test_what_a_main_process_leaves_behind_holds_the_gpu(world: World) -> None:
    world.runtime.start(world.launch("a", python(f"{STUBBORN}\nescape(0)\nos.wait()\nos._exit(0)")))
    until(lambda: world.look("a").error is not None, "the main process to end")
    [left] = world.alive()
    seen = world.look("a")
    assert (seen.state, seen.pid, seen.exit_code) == (RunState.RUNNING, None, None)
    assert seen.error == (
        f"its main process has ended, and its other processes still run: PID {left}"
    )
    with pytest.raises(RuntimeRefused, match="it still runs") as refused:
        world.make(remains_grace=0.5).remove(seen)
    assert refused.value.hint == "stop it first"
    world.runtime.stop(seen, signal="SIGTERM", grace=0.5)
    assert world.alive() == []
    seen = world.look("a")
    assert (seen.state, seen.exit_code) == (RunState.EXITED, 0)


def test_what_a_crash_leaves_behind_is_ended_by_pid_1(world: World) -> None:
    program = f"{STUBBORN}\nescape(0)\nos.wait()\ntime.sleep({TICK})\nos._exit(4)"
    world.runtime.start(world.launch("a", python(program), stop_timeout=5.0))
    until(lambda: world.look("a").pid is None, "the main process to end")
    seen = world.look("a")
    assert (seen.state, seen.pid) == (RunState.RUNNING, None)
    assert seen.error == "its main process has ended, and what it left is being ended"
    assert world.ended("a").exit_code == 4
    assert world.alive() == []


def test_a_start_ends_what_the_run_before_left(world: World) -> None:
    runtime = world.make(remains_grace=0.5)
    program = f"{STUBBORN}\nescape(0)\nos.wait()\ntime.sleep({TICK})\nos._exit(0)"
    runtime.start(world.launch("a", python(program)))
    until(lambda: world.look("a").error is not None, "the main process to end")
    runtime.start(world.launch("a", sh("exec sleep 300")))
    assert world.await_alive(1) == [world.look("a").pid]


def test_events_end_what_was_left_behind(world: World) -> None:
    runtime = world.make(remains_grace=0.5)
    stop = threading.Event()
    heard: list[str] = []
    thread = threading.Thread(target=lambda: heard.extend(runtime.events(stop)))
    thread.start()
    world.runtime.start(world.launch("a", python(f"{STUBBORN}\nescape(0)\nos._exit(0)")))
    world.await_alive(0)
    assert world.ended("a").exit_code == 0
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_another_supervisor_adopts_what_runs(world: World) -> None:
    first = world.start("a", sh("exec sleep 300"))
    world.runtime.close()
    later = world.make()
    assert world.look("a", later) == first
    later.start(world.launch("a", sh("exec sleep 300")))
    assert world.look("a", later).pid == first.pid
    later.stop(first, signal="SIGTERM", grace=30)
    assert world.look("a", later).exit_code == 143


def test_restart_takes_who_started_it(world: World) -> None:
    first = world.start("a", sh("echo run; exec sleep 300"), env=(("KEY", "secret"),))
    world.runtime.stop(first, signal="SIGTERM", grace=30)
    with pytest.raises(RuntimeRefused) as refused:
        world.make().restart(first)
    assert str(refused.value) == (
        f"cannot start {first.name} again: its environment may hold secrets, is therefore not "
        "kept, and was lost when the supervisor was restarted"
    )
    world.runtime.restart(world.look("a"))
    second = world.look("a")
    assert second.state is RunState.RUNNING
    environ = lambda: procfs.environ(second.pid or 0) or {}  # noqa: E731
    until(lambda: environ().get("KEY") == "secret", "its environment")


def test_remove_makes_systemd_forget(world: World) -> None:
    for code in (0, 1):
        world.runtime.start(world.launch("a", sh(f"exit {code}")))
        seen = world.ended("a")
        assert world.loaded() == [seen.ref]
        world.runtime.remove(seen)
        assert (world.loaded(), world.runtime.observe().workloads) == ([], ())
        world.runtime.remove(seen)
        world.runtime.stop(seen, signal="SIGTERM", grace=1)
    assert run("systemctl", "--failed", "--no-legend") == ""


def test_what_runs_is_not_removed(world: World) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    with pytest.raises(RuntimeRefused) as refused:
        world.runtime.remove(seen)
    assert str(refused.value) == f"cannot remove {seen.name}: it still runs"
    assert world.look("a") == seen


def test_limits_that_are_lowered_are_in_force(world: World) -> None:
    # No cpus: where its control groups are of version 1, this machine's PID 1 removes with the unit
    # the group that the machine itself is in, and nobody gets into it any more.
    limits = Limits(nofile=300, memlock=65536, memory=64 << 20)
    seen = world.start("a", sh("exec sleep 300"), limits=limits)
    text = Path(f"/proc/{seen.pid}/limits").read_text()
    rows = {line[:25].strip(): line[25:].split()[:2] for line in text.splitlines()}
    assert rows["Max open files"] == ["300", "300"]
    assert rows["Max locked memory"] == ["65536", "65536"]
    assert run("systemctl", "show", "--value", "-p", "MemoryMax", seen.ref) == f"{64 << 20}\n"


def test_one_that_takes_too_much_memory_is_killed(world: World) -> None:
    program = "data = [bytearray(1 << 20) for _ in range(300)]\nprint('took it all')"
    world.runtime.start(world.launch("a", python(program), limits=Limits(memory=64 << 20)))
    seen = world.ended("a")
    assert seen.exit_code == 137
    assert seen.error in (
        "ended by SIGKILL",  # version 1 of the control groups does not tell more
        "it used more memory than there was, or than its limit, and was killed",
    )


def test_eight_start_at_once(world: World) -> None:
    launches = [world.launch(f"i{n}", sh("exec sleep 300")) for n in range(8)]
    threads = [threading.Thread(target=world.runtime.start, args=(one,)) for one in launches]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    took = time.monotonic() - begun
    looked = time.monotonic()
    view = world.runtime.observe()
    observed = time.monotonic() - looked
    print(f"8 starts {took * 1000:.0f} ms, observed in {observed * 1000:.1f} ms")
    assert [one.name for one in view.workloads] == sorted(one.name for one in launches)
    assert {one.state for one in view.workloads} == {RunState.RUNNING}
    assert observed < 1


def test_three_programs_that_start_one_name_start_it_once(world: World) -> None:
    launch = world.launch("a", sh("exec sleep 300"))
    runtimes = [world.make() for _ in range(3)]
    failures: list[Exception] = []

    def start(one: int) -> None:
        try:
            runtimes[one].start(launch)
        except MicError as error:
            failures.append(error)

    threads = [threading.Thread(target=start, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert failures == []
    assert world.await_alive(1) == [world.look("a").pid]


def test_signals_that_do_not_exist_are_refused(world: World) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    with pytest.raises(RuntimeRefused) as refused:
        world.runtime.stop(seen, signal="SIGNONE", grace=1)
    assert str(refused.value) == f"cannot stop {seen.name}: there is no signal SIGNONE"
    world.runtime.stop(seen, signal=str(signal.SIGKILL.value), grace=5)
    assert world.look("a").exit_code == 137


def test_one_that_cannot_be_killed_is_named(world: World) -> None:
    # Stands for a process in the kernel's hands: systemd's own is never killed by KillUnit.
    seen = world.start("a", sh("exec sleep 300"))
    assert seen.pid is not None
    runtime = world.make(kill_timeout=0.0, remains_grace=0.0)
    with pytest.raises(StopFailed) as failed:
        runtime.stop(seen, signal="SIGCONT", grace=0.0)
    assert str(failed.value) == f"cannot stop {seen.ref}: PID {seen.pid} (sleep 300) survived KILL"
    assert failed.value.hint is not None


def test_a_copied_unit_is_left_alone(world: World) -> None:
    """Under another name, and from a unit file under the very name once ours is gone."""
    launch = world.launch("a", sh("exec sleep 300"))
    launch = replace(launch, identity=replace(launch.identity, spec={}))
    world.runtime.start(launch)
    seen = world.look("a")
    variables = identity_variables(launch.name, launch.identity).items()
    shown = "".join(f"Environment='{key}={value}'\n" for key, value in variables)
    copy = f"mic-{world.scope}-copy.service"
    path = Path("/run/systemd/system") / seen.ref
    service = f"[Service]\nExecStart=/bin/sleep 300\n{shown}"
    path.with_name(copy).write_text(service)
    run("systemctl", "daemon-reload")
    run("systemctl", "start", copy)
    try:
        view = world.runtime.observe()
        assert view.workloads == (seen,)
        (foreign,) = view.foreign_workloads
        assert (foreign.name, foreign.running, foreign.claims) == (copy, True, "a")
        assert (
            foreign.reason
            == f"it has the environment of {seen.ref}, and another name: it is a copy"
        )
        world.runtime.stop(seen, signal="SIGTERM", grace=30)
        world.runtime.remove(seen)
        path.write_text(service)
        run("systemctl", "daemon-reload")
        run("systemctl", "start", seen.ref)
        view = world.runtime.observe()
        assert view.workloads == ()
        assert {one.name: one.reason for one in view.foreign_workloads}[seen.ref] == (
            f"it comes from a unit file, {path}"
        )
        with pytest.raises(StopFailed, match="it comes from a unit file"):
            world.runtime.stop(seen, signal="SIGTERM", grace=1)
        assert run("systemctl", "is-active", copy, seen.ref).split() == ["active", "active"]
    finally:
        run("systemctl", "stop", copy, seen.ref, rc=None)
        for name in (copy, seen.ref):
            path.with_name(name).unlink(missing_ok=True)
        run("systemctl", "daemon-reload")
