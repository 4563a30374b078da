"""Who ordered something: in the history and in the log, as the kernel knows it."""

from __future__ import annotations

import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon_world import DaemonWorld, daemon_world, identity, lines, process
from tests.mock_nvml import GIB, MockGpu, MockNvml, MockProcess
from tests.support.mic import PROGRAM
from tests.support.require import program

A0, A1 = identity("a", 0), identity("a", 1)
NOBODY = pwd.getpwuid(65534).pw_name


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path, None, gpus=2) as made:
        made.write({0: "a", 1: "a"}, a=process())
        yield made


def orders(world: DaemonWorld) -> list[tuple[str, str, str]]:
    """What stands in the history of orders, newest last: of what, what, and by whom.

    The watch may have read the file before the command that wrote it.
    """
    found = [event for event in world.history("order", "config", "pause") if event["by"]]
    return [(e["instance"], e["text"].replace("accepted", "confirmed"), e["by"]) for e in found]


def as_nobody(world: DaemonWorld, *args: str) -> None:
    """By a member of the group mic, as whom a shell without any power of root acts."""
    caps = "+dac_override,+dac_read_search"  # for the checkout, and the test's directories
    member = [program("setpriv", "util-linux"), "--reuid=65534", "--clear-groups"]
    member += [f"--inh-caps={caps}", f"--ambient-caps={caps}", str(PROGRAM)]
    env = world.mic.environment() | {"SUDO_USER": "root", "USER": "root"}
    subprocess.run([*member, *args], env=env, check=True, timeout=60)


def after_login(world: DaemonWorld, *args: str) -> None:
    """By root, in the session of somebody else, as behind sudo."""
    text = 'echo 65534 > /proc/self/loginuid && exec "$@"'
    env = world.mic.environment()
    subprocess.run(["sh", "-c", text, "sh", PROGRAM, *args], env=env, check=True, timeout=60)


def test_every_order_has_the_user_whom_the_kernel_names(world: DaemonWorld) -> None:
    daemon = world.mic.run(http=False)
    world.converged(A0, A1)
    assert orders(world) == []
    as_nobody(world, "restart", "a")
    as_nobody(world, "pause", "a", "--reason", "new fans")
    after_login(world, "resume", "a")
    after_login(world, "stop", "--gpu", "1")
    world.mic("apply", rc=0)
    world.mic("reload", "--wait", rc=0)
    world.mic("retry", A0, rc=0)
    behind_sudo = f"root (logged in as {NOBODY})"
    assert orders(world) == [
        (A0, "restart a", NOBODY),
        (A1, "restart a", NOBODY),
        ("a", "paused: new fans", NOBODY),
        ("a", "resumed", behind_sudo),
        ("configuration", "generation 2 confirmed (stop on GPU 1)", behind_sudo),
        (A1, "stop on GPU 1", behind_sudo),
        ("configuration", "generation 2 confirmed (apply)", "root"),
        ("configuration", "generation 2 confirmed (reload)", "root"),
        (A0, f"retry {A0}", "root"),
    ]
    assert lines(daemon, f"{A0}: restart a, by {NOBODY}$")
    assert f"a: paused: new fans, by {NOBODY}\n" in world.mic("history", "a", rc=0).stdout


def test_without_a_daemon_it_is_the_user_of_the_command(world: DaemonWorld) -> None:
    world.mic("apply", rc=0)
    after_login(world, "restart", A1)
    world.mic("down", "--yes", rc=0)
    behind_sudo = f"root (logged in as {NOBODY})"
    assert orders(world) == [
        ("configuration", "apply, without a daemon", "root"),
        ("configuration", f"restart {A1}, without a daemon", behind_sudo),
        (A1, f"restart {A1}", behind_sudo),
        ("configuration", "down, without a daemon", "root"),
    ]
    phases = [e["phase"] for e in world.history("phase") if e["instance"] == A0]
    started = phases[: phases.index("unprobed")]  # between two looks it may have been starting
    assert started in (["pending"], ["pending", "starting"]), "what it did is kept as well"


@pytest.mark.parametrize("runs", [True, False], ids=["a daemon", "no daemon"])
def test_a_kill_is_kept_with_the_user(tmp_path: Path, runs: bool) -> None:
    mock = MockNvml(tmp_path)
    with subprocess.Popen(["/bin/sleep", "60"], start_new_session=True) as foreign:
        mock.set([MockGpu(processes=[MockProcess(foreign.pid, GIB)])])
        with daemon_world(tmp_path, None, nvml=mock) as world:
            world.write({0: "none"})
            if runs:
                world.mic.run(http=False)
                world.converged()
            killing = world.mic.start("kill", str(foreign.pid), "--yes", "--force")
            foreign.wait(60)
            mock.change(0, processes=[])
            assert killing.process.wait(60) == 0, killing.text()
            (event,) = world.history("order")
            assert event["text"] == "kill: sleep ended"
            assert (event["instance"], event["by"]) == (f"PID {foreign.pid}", "root")
            assert event["gpus"], "so that `history 0` shows it"


def test_all_are_restarted_one_gpu_of_a_model_at_a_time(world: DaemonWorld) -> None:
    world.mic.run(http=False)
    world.converged(A0, A1)
    before = world.marks()
    done = world.mic("restart", "--all", rc=0)
    assert "2" not in done.stderr
    after = world.marks()
    assert all(after[name] != before[name] for name in (A0, A1))
    begun = [(e["kind"], e["instance"]) for e in world.history("begin", "done")][-4:]
    first, second = begun[0][1], begun[2][1]
    assert begun == [(kind, name) for name in (first, second) for kind in ("begin", "done")]
    world.mic("pause", "a", rc=0)
    assert "cannot restart --all: " in world.mic("restart", "--all", rc=1).stderr
    assert "say --all" in world.mic("restart", rc=64).stderr


def test_apply_says_whether_it_changed_anything(world: DaemonWorld) -> None:
    assert world.mic("apply", "--json", rc=0).json()["changed"] is True
    assert world.mic("apply", "--json", rc=0).json()["changed"] is False
    world.mic.env["MIC_WATCH"] = "plan"  # else the daemon may have done it before it is asked
    world.mic.run(http=False)
    assert world.mic("apply", "--json", rc=0).json()["changed"] is False
    world.mic.config.write_text(world.text({0: "a", 1: "none"}))
    assert world.mic("apply", "--json", rc=0).json()["changed"] is True
    assert world.mic("apply", "--json", "--target", "0", rc=0).json()["changed"] is False
