"""Starting, seeing and forgetting host processes. Every process here is real."""

from __future__ import annotations

import ast
import getpass
import json
import os
import pwd
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mic_supervisor.errors import PreflightFailed, RuntimeRefused
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import ContainerSpec, Launch, Limits, RunState
from mic_supervisor.runtimes import Runtime
from mic_supervisor.runtimes.keeper.run import START_TIMEOUT
from tests.support.waiting import until
from tests.unit.runtimes.process_world import HOST, World, python, runs, sh

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may switch users")


def test_it_is_a_runtime(world: World) -> None:
    runtime: Runtime = world.runtime
    assert (runtime.name, runtime.creates_ahead) == ("subprocess", False)


def test_a_process_is_seen_as_it_was_asked_for(world: World) -> None:
    before = time.time()
    launch = world.launch("one", ("sleep", "60"))
    world.runtime.start(launch)
    view = world.runtime.observe()
    assert (view.runtime, view.error, view.foreign_workloads) == ("subprocess", None, ())
    (seen,) = view.workloads
    assert seen.identity == launch.identity
    assert (seen.runtime, seen.name, seen.ref) == ("subprocess", "one", "one")
    assert (seen.state, seen.exit_code, seen.error) == (RunState.RUNNING, None, None)
    assert seen.created_at is not None and seen.started_at is not None
    assert before <= seen.created_at <= seen.started_at <= time.time()
    assert seen.pid is not None
    assert procfs.environ(seen.pid) is not None
    assert Path(f"/proc/{seen.pid}/cmdline").read_bytes() == b"sleep\x0060\x00"


def test_nothing_runs_where_nothing_was_started(world: World) -> None:
    assert world.runtime.observe().workloads == ()
    assert not world.directory.exists()  # looking makes nothing


def test_the_environment_is_exact(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_SUPERVISOR", "1")
    command = ("/usr/bin/env", "-0")
    world.start("one", command, env=(("B", "2=3\n4"), ("LANG", "de_DE.UTF-8"), ("LEER", "")))
    world.await_state("one", "exited")
    text = world.log("one").read_text()
    found = dict(item.split("=", 1) for item in text.split("\0") if item)
    main, its_keeper = world.record("one")["child"], world.record("one")["keeper"]
    assert json.loads(found["MIC_IDENTITY"])["gpus"] == ["GPU-1", "GPU-2"]
    assert found == {
        "B": "2=3\n4",
        "HOME": pwd.getpwuid(os.geteuid()).pw_dir,
        "LANG": "de_DE.UTF-8",
        "LEER": "",
        "MIC_IDENTITY": found["MIC_IDENTITY"],
        "MIC_INSTANCE": "one",
        "MIC_MAIN": "{}:{}:{}:{}".format(*main.values(), *its_keeper.values()),
        "MIC_RUN_ID": world.record("one")["run_id"],
        "MIC_SCOPE": world.scope,
        "MIC_SPEC_HASH": "0badcafe",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }


def test_a_process_inherits_nothing_of_the_supervisor(world: World, tmp_path: Path) -> None:
    text = (
        "import os\n"
        "print(sorted(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')"
        " if os.path.exists(f'/proc/self/fd/{n}')))\n"
        "print(os.getcwd(), oct(os.umask(0)), os.getsid(0) == os.getpid())\n"
        "print([l for l in open('/proc/self/status') if l.startswith(('SigBlk', 'SigIgn'))])\n"
    )
    leaked = (tmp_path / "leaked").open("w")
    os.set_inheritable(leaked.fileno(), True)
    old = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)}
    mask = os.umask(0o077)
    try:
        world.start("one", python(text))
    finally:
        os.umask(mask)
        for number, handler in old.items():
            signal.signal(number, handler)
        leaked.close()
    world.await_state("one", "exited")
    files, place, signals = world.await_lines("one", 3)
    log = str(world.log("one"))
    assert files == str(["/dev/null", log, log])
    assert place == "/ 0o22 True"
    blocked, ignored = (int(line.split()[1], 16) for line in ast.literal_eval(signals))
    assert blocked == 0
    # Python itself ignores SIGPIPE (13) and SIGXFSZ (25), and nothing else. 32 and 33 are the C
    # library's own, which lets nobody change them.
    assert ignored & ~(3 << 31) == 1 << 12 | 1 << 24


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("exit 0", 0, None),
        ("exit 3", 3, None),
        ("kill -KILL $$", 137, "ended by SIGKILL"),
        ("kill -TERM $$", 143, "ended by SIGTERM"),
    ],
)
def test_the_exit_status_is_kept(world: World, command: str, code: int, reason: str | None) -> None:
    world.start("one", sh(command))
    seen = world.await_state("one", "exited")
    assert (seen.exit_code, seen.error, seen.pid) == (code, reason, None)
    assert seen.started_at is not None and seen.finished_at is not None
    assert seen.started_at <= seen.finished_at <= time.time()
    assert world.make().observe().workloads == (seen,)  # whoever looks


def test_starting_what_runs_changes_nothing(world: World) -> None:
    before = world.start("one", ("sleep", "60"))
    world.runtime.start(world.launch("one", ("sleep", "60")))
    world.make().start(world.launch("one", ("sleep", "60")))
    assert world.look("one") == before


def test_an_ended_process_is_started_anew_and_its_log_kept(world: World) -> None:
    world.start("one", sh("echo first; exit 1"))
    ended = world.await_state("one", "exited")
    assert list(world.runtime.previous_logs(ended)) == []
    world.start("one", sh("echo second; sleep 60"))
    seen = world.look("one")
    assert (seen.state, seen.exit_code, seen.finished_at) == (RunState.RUNNING, None, None)
    until(lambda: list(world.runtime.logs(seen)) == ["second"], "the second log")
    assert list(world.runtime.previous_logs(seen)) == ["first"]
    assert list(world.runtime.previous_logs(seen, tail=0)) == []


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (
            ("/nowhere/serve",),
            "cannot start one: [Errno 2] No such file or directory: '/nowhere/serve'",
        ),
        (("/etc/passwd",), "cannot start one: [Errno 13] Permission denied: '/etc/passwd'"),
        (("no-such-program-4711",), "cannot start one: [Errno 2] No such file or directory"),
    ],
)
def test_a_program_that_cannot_be_executed_leaves_nothing(
    world: World, command: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(RuntimeRefused) as raised:
        world.runtime.start(world.launch("one", command))
    assert str(raised.value).startswith(reason)
    assert list(world.directory.iterdir()) == []
    assert world.alive() == []


def test_a_working_directory_that_is_gone_is_named(world: World) -> None:
    with pytest.raises(RuntimeRefused) as raised:
        world.runtime.start(world.launch("one", ("true",), working_dir="/nowhere"))
    assert str(raised.value) == (
        "cannot start one: [Errno 2] No such file or directory: '/nowhere'"
    )


def test_a_failed_second_start_leaves_the_first_run_to_be_read(world: World) -> None:
    world.start("one", sh("echo first; exit 7"))
    before = world.await_state("one", "exited")
    with pytest.raises(RuntimeRefused):
        world.runtime.start(world.launch("one", ("/nowhere/serve",)))
    assert world.look("one") == before
    assert list(world.runtime.logs(before)) == ["first"]
    assert sorted(p.name for p in (world.directory / "one").iterdir()) == [
        "exit.json",
        "record.json",
    ]
    assert len(list((world.logs / "one").iterdir())) == 1


def test_secrets_are_in_the_process_only(world: World) -> None:
    secret = "hunter2-hunter2"
    seen = world.start("one", ("sleep", "60"), env=(("TOKEN", secret),))
    assert seen.pid is not None
    assert (procfs.environ(seen.pid) or {})["TOKEN"] == secret
    keeper = world.record("one")["keeper"]["pid"]
    for name in ("cmdline", "environ"):
        assert secret.encode() not in Path(f"/proc/{keeper}/{name}").read_bytes()
    roots = (world.directory, world.logs)
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    assert len(files) == 2
    for path in files:
        assert secret.encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0
    assert secret not in repr(world.runtime.observe())


def test_it_is_started_again_from_memory_only(world: World) -> None:
    launch = world.launch("one", sh('echo "$TOKEN"'), env=(("TOKEN", "s3"),))
    world.runtime.start(launch)
    ended = world.await_state("one", "exited")
    world.runtime.restart(ended)
    again = world.await_state("one", "exited")
    assert again.started_at != ended.started_at
    assert list(world.runtime.logs(again)) == ["s3"]
    with pytest.raises(RuntimeRefused) as raised:
        world.make().restart(again)
    assert str(raised.value).startswith("cannot start one again: its environment may hold secrets")
    world.runtime.remove(again)
    with pytest.raises(RuntimeRefused):
        world.runtime.restart(again)


def test_what_runs_is_not_removed(world: World) -> None:
    seen = world.start("one", ("sleep", "60"))
    with pytest.raises(RuntimeRefused) as raised:
        world.runtime.remove(seen)
    assert (str(raised.value), raised.value.hint) == (
        "cannot remove one: it still runs",
        "stop it first",
    )
    world.runtime.stop(seen, signal="SIGTERM", grace=5)
    world.runtime.remove(seen)
    world.runtime.remove(seen)
    assert list(world.directory.iterdir()) == []


def test_it_outlives_the_supervisor(world: World) -> None:
    supervisor = os.fork()
    if supervisor == 0:
        try:
            world.runtime.start(world.launch("one", ("sleep", "60")))
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        until(lambda: world.names() and world.look("one").pid, "the process")
    finally:
        os.kill(supervisor, signal.SIGKILL)
        os.waitpid(supervisor, 0)
    seen = world.look("one")
    assert seen.state is RunState.RUNNING and seen.pid is not None and runs(seen.pid)
    world.runtime.stop(seen, signal="SIGTERM", grace=5)
    assert world.look("one").exit_code == 143


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04])
def test_a_supervisor_killed_while_starting_leaves_nothing_unrecorded(
    world: World, delay: float
) -> None:
    launch = world.launch("one", ("sleep", "60"))
    world.directory.mkdir(parents=True)
    supervisor = os.fork()
    if supervisor == 0:
        try:
            world.runtime.start(launch)
        finally:
            os._exit(1)
    time.sleep(delay)
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    # At once, as a supervisor does that is started again: there must be one, not two.
    fresh = world.make()
    fresh.start(launch)
    (seen,) = fresh.observe().workloads
    assert seen.state is RunState.RUNNING
    until(lambda: world.alive() == [seen.pid], "one process, the recorded one")
    assert fresh.observe().foreign_workloads == ()


def test_a_keeper_killed_while_starting_leaves_nothing_unrecorded(world: World) -> None:
    outcomes = set()
    for turn in range(8):
        name = f"n{turn}"
        launch = world.launch(name, ("sleep", "60"))
        errors: list[Exception] = []

        def start(launch: Launch = launch, errors: list[Exception] = errors) -> None:
            try:
                world.runtime.start(launch)
            except RuntimeRefused as error:
                errors.append(error)

        thread = threading.Thread(target=start)
        thread.start()
        path = world.directory / name / "record.json"
        until(lambda p=path: p.exists() and '"keeper": {' in p.read_text(), "a keeper", period=0)
        os.kill(world.record(name)["keeper"]["pid"], signal.SIGKILL)
        thread.join()
        outcomes.add(bool(errors))
        if errors:
            assert str(errors[0]) == f"cannot start {name}: its keeper failed: it was killed"
            assert name not in world.names()
        else:
            assert world.look(name).state is RunState.RUNNING
    recorded = sorted(one.pid for one in world.runtime.observe().workloads if one.pid)
    assert world.alive() == recorded
    assert outcomes  # which of the two it is, is the scheduler's choice


def test_many_start_at_once(world: World) -> None:
    launches = [world.launch(f"n{number}", ("sleep", "60")) for number in range(8)]
    threads = [threading.Thread(target=world.runtime.start, args=(one,)) for one in launches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(START_TIMEOUT / 2)  # nobody waited in vain for another
        assert not thread.is_alive()
    assert [one.state for one in world.runtime.observe().workloads] == [RunState.RUNNING] * 8
    assert min(_timed(world.runtime.observe) for _ in range(5)) < 0.005


def _timed(call: object) -> float:
    assert callable(call)
    """Seconds of processor time: others may be at work."""
    before = time.process_time()
    call()
    return time.process_time() - before


def test_one_name_started_by_many_runs_once(world: World) -> None:
    launch = world.launch("one", ("sleep", "60"))
    runtimes = [world.make() for _ in range(4)]
    threads = [threading.Thread(target=one.start, args=(launch,)) for one in runtimes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.alive() == [world.look("one").pid]


@as_root
@pytest.mark.parametrize("user", ["nobody", "65534", "65534:65534", "12345:54321"])
def test_it_runs_as_the_user_that_was_asked_for(world: World, user: str) -> None:
    command = sh('echo $(id -u) $(id -g) $(id -G) "$HOME"; echo again >> /dev/stdout')
    world.runtime.prepare(world.launch("one", command, user=user), print)
    world.start("one", command, user=user)
    seen = world.await_state("one", "exited")
    uid, gid = (12345, 54321) if user.startswith("12345") else (65534, 65534)
    home = "/" if uid == 12345 else pwd.getpwuid(65534).pw_dir
    assert list(world.runtime.logs(seen)) == [f"{uid} {gid} {gid} {home}", "again"]


def test_our_own_name_is_no_other_user(world: World) -> None:
    world.start("one", sh("id -un"), user=getpass.getuser())
    seen = world.await_state("one", "exited")
    assert list(world.runtime.logs(seen)) == [getpass.getuser()]


def test_limits_are_in_force(world: World) -> None:
    limits = Limits(nofile=512, memlock=65536)
    world.start("one", sh("ulimit -n; ulimit -Hn; ulimit -l"), limits=limits)
    seen = world.await_state("one", "exited")
    assert list(world.runtime.logs(seen)) == ["512", "512", "64"]


def test_a_keeper_is_small(world: World) -> None:
    world.start("one", ("sleep", "60"))
    keeper = world.record("one")["keeper"]["pid"]
    (resident,) = [
        line for line in Path(f"/proc/{keeper}/status").read_text().splitlines() if "VmRSS" in line
    ]
    assert int(resident.split()[1]) < 16 * 1024
    found = procfs.stat(keeper)
    assert found is not None and found.name == "mic-keeper"


def test_inside_a_unit_it_refuses(world: World) -> None:
    runtime = world.make(enclosing_service=lambda: "mic.service")
    launch = world.launch("one", ("sleep", "60"))
    for call in (lambda: runtime.prepare(launch, print), lambda: runtime.start(launch)):
        with pytest.raises(PreflightFailed) as raised:
            call()
        assert str(raised.value) == (
            "cannot start a process from within mic.service: "
            "systemd would end it whenever that unit is restarted"
        )
        assert raised.value.hint == "set MIC_PROCESS_RUNTIME=systemd"
    assert not world.directory.exists()


def test_a_container_is_refused(world: World) -> None:
    base = world.launch("one", ("true",))
    launch = Launch("one", "subprocess", base.identity, ContainerSpec("busybox"))
    with pytest.raises(PreflightFailed, match="a container is no host process"):
        world.runtime.prepare(launch, print)
    with pytest.raises(RuntimeRefused, match="without starting it"):
        world.runtime.create(base)


def test_a_directory_that_cannot_be_made_is_said(world: World, tmp_path: Path) -> None:
    (tmp_path / "processes").write_text("a file is in the way")
    launch = world.launch("one", ("true",))
    with pytest.raises(PreflightFailed) as raised:
        world.runtime.prepare(launch, print)
    assert str(raised.value) == (
        f"cannot keep process records in {tmp_path}/processes: File exists"
    )
    with pytest.raises(RuntimeRefused, match="cannot start one"):
        world.runtime.start(launch)
    error = world.runtime.observe().error
    assert error is not None and "Not a directory" in error


@pytest.mark.parametrize("name", ["../x", ".x", "a/b", "x" * 201])
def test_names_that_are_no_directory_are_refused(world: World, name: str) -> None:
    with pytest.raises(PreflightFailed, match="cannot keep a record called"):
        world.runtime.prepare(world.launch(name, (sys.executable,)), print)


def test_names_of_any_script_are_kept(world: World) -> None:
    seen = world.start("换脸-ü", ("sleep", "60"))
    assert (seen.name, seen.identity.host) == ("换脸-ü", HOST)
