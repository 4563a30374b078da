"""What goes wrong, who must not see what, and who is somebody else, from within the machine."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mic_supervisor import clocks
from mic_supervisor.errors import PreflightFailed, RuntimeRefused, RuntimeUnavailable, StopFailed
from mic_supervisor.host import processes as procfs
from mic_supervisor.host import systemd_is_pid1
from mic_supervisor.model import ForeignWorkload, Limits, Near
from mic_supervisor.runtimes.systemd.runtime import SystemdRuntime
from tests.integration.systemd.world import HOST, World, run
from tests.support.commands import python, sh
from tests.support.waiting import until

# What quoting, splitting and replacing could go wrong about.
NASTY = (
    *("$HOME", "${HOME}", "a$HOME", "$$", "$", "x$", "$1", "\\$", "%n", "%%", ";", "\\;", "a b"),
    *(
        "",
        " ",
        "'",
        '"',
        "\\",
        "\\\\",
        "\\x41",
        "\n",
        "a\n\nb\n",
        "\t",
        "#x",
        "`id`",
        "é世🙂",
        "\x01",
    ),
    *("\x1b[31m", "\r", "a=b", "!", "-x", "~", "*", "\\\n", 'end\\"'),
)
SHOW = "import os, sys\nprint(ascii(sys.argv[1:]))\nprint(ascii(dict(os.environ)))"


def test_systemd_is_pid_1() -> None:
    assert systemd_is_pid1()


# --- what arrives -----------------------------------------------------------------------------


def test_arguments_and_variables_arrive_unchanged(world: World) -> None:
    env = tuple((f"V{n}", value) for n, value in enumerate(NASTY))
    launch = world.launch("a", python(SHOW, *NASTY), env=env)
    world.runtime.prepare(launch, lambda text: None)
    world.runtime.start(launch)
    world.ended("a")
    arguments, variables = world.lines("a")
    assert arguments == ascii([*NASTY])
    found = eval(variables)
    assert {name: found.get(name) for name, _ in env} == dict(env)
    assert {name: found[name] for name in ("HOME", "LANG", "MIC_SCOPE", "MIC_INSTANCE")} == {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "MIC_SCOPE": world.scope,
        "MIC_INSTANCE": "a",
    }
    assert found["PATH"].startswith("/usr/local/sbin:")


def test_a_reload_of_systemd_by_somebody_else_changes_nothing(world: World) -> None:
    env = tuple((f"V{n}", value) for n, value in enumerate(NASTY))
    before = world.start("a", (*sh("sleep 2; exit 3"), *NASTY), env=env)
    other = world.start("b", sh("exec sleep 300"), limits=Limits(nofile=300))
    run("systemctl", "daemon-reload")
    assert world.look("a") == before
    assert world.look("b") == other
    assert run("systemctl", "show", "--value", "-p", "LoadState", before.ref) == "loaded\n"
    assert world.ended("a").exit_code == 3
    run("systemctl", "daemon-reload")
    assert world.ended("a").exit_code == 3
    world.runtime.stop(other, signal="SIGTERM", grace=30)
    assert world.look("b").exit_code == 143


def test_variables_that_would_be_lost_are_refused_beforehand(world: World) -> None:
    for env, text in (
        ((("A-B", "x"),), "cannot set the variable 'A-B': systemd takes letters, digits and _"),
        ((("A", "\udc80"),), "cannot set the variable A: systemd takes only UTF-8 as its value"),
    ):
        with pytest.raises(PreflightFailed) as failed:
            world.runtime.prepare(world.launch("a", sh("true"), env=env), lambda text: None)
        assert str(failed.value).startswith(text)


def test_a_name_that_no_unit_can_have(world: World) -> None:
    for instance in ("Modell-ä@1", "m" * 300):
        launch = world.launch(instance, sh("exec sleep 300"), name=world.name(instance))
        world.runtime.start(launch)
        seen = world.look(instance)
        assert seen.name == launch.name
        assert len(seen.ref) <= 255
        assert world.loaded() == [seen.ref]
        world.runtime.stop(seen, signal="SIGKILL", grace=5)
        world.runtime.remove(world.look(instance))
        assert world.loaded() == []


# --- secrets ----------------------------------------------------------------------------------


def test_other_users_see_who_it_is_and_no_secret(world: World) -> None:
    secret = "hunter2-hunter2"
    seen = world.start("a", sh("exec sleep 300"), env=(("API_KEY", secret),))
    assert seen.pid is not None
    assert (procfs.environ(seen.pid) or {})["API_KEY"] == secret
    shown = run("runuser", "-u", "bob", "--", "systemctl", "show", seen.ref)
    assert "MIC_INSTANCE=a" in shown
    assert secret not in shown
    assert secret not in run("systemctl", "cat", seen.ref)
    assert world.environment_files() == []


def test_the_environment_is_in_a_file_for_root_only_until_the_start(world: World) -> None:
    caught: list[tuple[int, int]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for path in world.environment_files():
                try:
                    caught.append((path.stat().st_mode, path.parent.stat().st_mode))
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        world.runtime.start(world.launch("a", sh("exit 0"), env=(("API_KEY", "hunter2"),)))
        world.ended("a")
    stop.set()
    watcher.join()
    assert caught
    assert {(stat.S_IMODE(a), stat.S_IMODE(b)) for a, b in caught} == {(0o600, 0o700)}
    assert world.environment_files() == []


def test_what_a_start_that_was_cut_short_left_is_deleted(world: World) -> None:
    directory = world.directory / "environ" / world.scope
    directory.mkdir(parents=True)
    for name, age in (("old", 3600), ("new", 1)):
        (directory / name).write_text("KEY=secret\n")
        os.utime(directory / name, (clocks.steady() - age,) * 2)
    world.start("a", sh("exec sleep 300"))
    assert [path.name for path in world.environment_files()] == ["new"]


# --- starts that fail -------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    (tmp_path / "plain").write_text("not a program")
    (tmp_path / "orphan").write_text("#!/no/such/interpreter\n")
    (tmp_path / "orphan").chmod(0o755)
    (tmp_path / "binary").write_bytes(b"\x7fELF" + bytes(60))
    (tmp_path / "binary").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("program", "spec", "reason"),
    [
        ("{}/absent", {}, "{}/absent: No such file or directory (step EXEC)"),
        ("{}/plain", {}, "{}/plain: Permission denied (step EXEC)"),
        ("{}/orphan", {}, "{}/orphan: No such file or directory (step EXEC)"),
        ("{}/binary", {}, "{}/binary: Exec format error (step EXEC)"),
        (
            "/bin/true",
            {"working_dir": "/absent"},
            "/bin/true: No such file or directory (step CHDIR)",
        ),
        ("/bin/true", {"user": "99999:99999x"}, None),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(
    world: World, programs: Path, program: str, spec: dict[str, str], reason: str | None
) -> None:
    command = (program.format(programs),)
    launch = world.launch("a", command, env=(("KEY", "secret"),), **spec)
    for attempt in (1, 2):
        with pytest.raises((RuntimeRefused, PreflightFailed)) as refused:
            world.runtime.start(launch)
        if reason is not None:
            assert str(refused.value) == f"cannot start {launch.name}: {reason.format(programs)}"
        assert (world.loaded(), world.environment_files()) == ([], []), attempt
    world.start("a", sh("exec sleep 300"))


def test_it_runs_on_the_cpus_and_the_memory_next_to_its_gpus_alone(world: World) -> None:
    launch = replace(world.launch("a", sh("exec sleep 300")), near=Near((0,), (0,)))
    world.runtime.start(launch)
    asked = ["systemctl", "show", "--property=AllowedCPUs,NUMAPolicy,NUMAMask"]
    shown = subprocess.run([*asked, launch.name], capture_output=True, text=True).stdout
    assert sorted(shown.split()) == ["AllowedCPUs=0", "NUMAMask=0", "NUMAPolicy=bind"]
    pid = world.look("a").pid
    assert "bind:0" in Path(f"/proc/{pid}/numa_maps").read_text()
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():  # systemd confines with version 2 alone
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Cpus_allowed_list:\t0\n" in status


def test_a_failed_start_after_an_ended_run_leaves_nothing(world: World) -> None:
    world.runtime.start(world.launch("a", sh("exit 1")))
    world.ended("a")
    with pytest.raises(RuntimeRefused):
        world.runtime.start(world.launch("a", ("/absent",)))
    assert world.loaded() == []


def test_without_the_journal_the_step_still_says_something(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    launch = world.launch("a", ("/absent",))
    with pytest.raises(RuntimeRefused) as refused:
        world.runtime.start(launch)
    assert str(refused.value) == f"cannot start {launch.name}: the program cannot be executed"


def test_a_directory_that_cannot_be_written(world: World) -> None:
    runtime = world.make(directory=Path("/proc/nowhere"))
    with pytest.raises(RuntimeUnavailable) as failed:
        runtime.start(world.launch("a", sh("true")))
    assert str(failed.value).startswith("cannot write /proc/nowhere/environ/")
    assert failed.value.hint is not None
    assert world.loaded() == []


# --- users ------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["alice", "{uid}", "{uid}:{gid}", "alice:bob"])
def test_it_runs_as_its_user(world: World, user: str) -> None:
    alice = pwd.getpwnam("alice")
    launch = world.launch(
        "a",
        sh('id -u; id -g; echo "$HOME"; exec sleep 300'),
        user=user.format(uid=alice.pw_uid, gid=alice.pw_gid),
        working_dir="/",
    )
    world.runtime.prepare(launch, lambda text: None)
    world.runtime.start(launch)
    group = pwd.getpwnam("bob").pw_gid if user == "alice:bob" else alice.pw_gid
    until(lambda: len(world.lines("a")) == 3, "three lines")
    assert world.lines("a") == [str(alice.pw_uid), str(group), "/home/alice"]


def test_numbers_without_a_name_are_nobody_to_systemd(world: World) -> None:
    for user in ("4711:4712", "0:4712"):
        launch = world.launch("a", sh("true"), user=user)
        with pytest.raises(PreflightFailed) as failed:
            world.runtime.prepare(launch, lambda text: None)
        assert str(failed.value) == f"cannot run as {user}: systemd knows no such user or group"


# --- foreign ----------------------------------------------------------------------------------


def test_a_unit_of_that_name_that_is_not_ours_is_left_alone(world: World) -> None:
    launch = world.launch("a", sh("exec sleep 300"))
    ref = f"{launch.name}.service"
    run("systemd-run", "--quiet", f"--unit={ref}", "sleep", "300")
    view = world.runtime.observe()
    reason = "its environment does not name it as ours"
    assert view.workloads == ()
    assert view.foreign_workloads == (ForeignWorkload("systemd", ref, ref, (), True, reason),)
    with pytest.raises(RuntimeRefused) as refused:
        world.runtime.start(launch)
    assert str(refused.value) == (
        f"cannot start {launch.name}: there is a unit of that name: {reason}"
    )
    assert refused.value.hint == f"look at it: systemctl status {ref}"
    run("systemctl", "stop", ref)


def test_what_another_supervisor_runs_is_left_alone(world: World) -> None:
    seen = world.start("a", sh("exec sleep 300"))
    foreign_workloads = world.make(host="another-host").observe().foreign_workloads
    assert [(one.ref, one.running, one.reason) for one in foreign_workloads] == [
        (seen.ref, True, "it was made by the supervisor of another machine")
    ]
    short = SystemdRuntime(world.scope[:3], HOST, directory=world.directory)
    assert short.observe().foreign_workloads == ()  # t12 is no beginning of mic-t12345678-
    with pytest.raises(StopFailed, match="by the supervisor of another machine"):
        world.make(host="another-host").stop(seen, signal="SIGKILL", grace=1)
    assert world.look("a") == seen


def test_a_scope_whose_name_begins_like_ours(world: World) -> None:
    other = SystemdRuntime(f"{world.scope}-b", HOST, directory=world.directory)
    launch = world.launch("a", sh("exec sleep 300"))
    from dataclasses import replace

    identity = replace(launch.identity, scope=f"{world.scope}-b")
    theirs = replace(launch, name=f"mic-{world.scope}-b-a-1", identity=identity)
    other.start(theirs)
    assert [one.name for one in other.observe().workloads] == [theirs.name]
    view = world.runtime.observe()
    assert view.workloads == ()
    assert [one.reason for one in view.foreign_workloads] == [
        f"it belongs to scope {world.scope}-b"
    ]
    other.close()
