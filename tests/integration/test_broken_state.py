"""Two at once, and what is kept between runs: malformed, unreadable, gone."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from mic_supervisor.host.lock import writer
from tests.integration.job_world import World, gated, progress, web
from tests.support.mic import PROGRAM, Result
from tests.support.require import program
from tests.support.waiting import until

pytestmark = pytest.mark.engine


def kept(job: World, name: str) -> Path:
    return job.mic.state_dir / job.mic.scope / name


def test_a_second_apply_says_who_is_at_work_and_since_when(job: World) -> None:
    gate = job.gate()
    job.write({0: "a"}, a=gated(gate))
    first = job.mic.start("apply")
    until(lambda: "a-51000000: starting" in first.text() and job.runs(), "the start")
    done = job.mic("apply", "--lock-timeout", "0s", rc=1)
    assert done.stdout == ""
    found = re.fullmatch(
        r"error: cannot converge: PID (\d+) \(mic-supervisor apply, started by ([^()]+)\) "
        r"is converging since (\d\d:\d\d:\d\d)\n"
        r"hint: wait for it, or set a longer --lock-timeout\n",
        done.stderr,
    )
    assert found is not None, done.stderr
    assert int(found[1]) == first.pid
    assert found[2] == os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    since = datetime.strptime(found[3], "%H:%M:%S")
    age = (datetime.now() - since.replace(*datetime.now().timetuple()[:3])).total_seconds()
    assert -1 <= age < 60 or age < -86000  # midnight

    # Reading needs no lock.
    assert job.plan() == "No changes.\n"
    assert job.instances()["a-51000000"]["phase"] == "starting"

    second = job.mic.start("apply", "--lock-timeout", "60s")
    time.sleep(0.5)
    assert second.text() == ""
    (gate / "go").touch()
    assert second.process.wait(60) == 0
    assert first.process.wait(60) == 0
    assert progress(second.text()) == []
    assert len(job.containers()) == 1


def test_the_lock_falls_with_its_holder(job: World) -> None:
    gate = job.gate()
    job.write({0: "a"}, a=gated(gate))
    first = job.mic.start("apply")
    until(lambda: "a-51000000: starting" in first.text(), "the start")
    first.process.kill()
    first.process.wait()
    (gate / "go").touch()
    job.apply("--lock-timeout", "0s")
    assert len(job.containers()) == 1


def test_a_run_directory_that_is_removed_under_a_daemon_comes_back(job: World) -> None:
    job.write({0: "a"}, a=web())
    daemon = job.mic.run()
    until(lambda: job.mic("status").rc == 0, "it to be ready", timeout=60)
    before = job.run_of("a-51000000")
    shutil.rmtree(
        job.mic.run_dir.rename(job.mic.home / "gone")
    )  # the daemon writes to it meanwhile
    lock = job.mic.run_dir / f"{job.mic.scope}.lock"
    until(lambda: lock.exists() and job.mic.socket.exists(), "the lock and the socket")
    until(lambda: job.mic("apply").rc == 0, "the daemon to answer on its socket")
    assert job.run_of("a-51000000") == before
    assert daemon.process.poll() is None


def test_a_daemon_ends_where_another_has_its_lock(job: World) -> None:
    job.write({0: "a"}, a=web())
    daemon = job.mic.run()
    until(lambda: job.mic("status").rc == 0, "it to be ready", timeout=60)
    before = job.run_of("a-51000000")
    with writer(job.mic.run_dir / "other.lock", "mic-supervisor apply", 1.0):
        (job.mic.run_dir / "other.lock").replace(job.mic.run_dir / f"{job.mic.scope}.lock")
        assert daemon.process.wait(60) == 1
    assert "is converging since" in daemon.text()
    assert job.run_of("a-51000000") == before


def test_a_lock_timeout_that_is_none(job: World) -> None:
    job.write({0: "a"}, a=web())
    done = job.mic("apply", "--lock-timeout", "soon", rc=64)
    assert done.stderr.splitlines()[-1].startswith("Error: Invalid value for '--lock-timeout': ")


ALL = "damaged, and what it held is lost: "
MALFORMED = {
    "{": f"{ALL}not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
    "(char 1)",
    "": f"{ALL}not JSON: Expecting value: line 1 column 1 (char 0)",
    "[]": f"{ALL}Input should be an object, not []",
    '{"instances": []}': "damaged: instances was lost",
    '{"instances": {"a": 1}}': "damaged: instances.a was lost",
    '{"instances": {"a": {"failures": "two"}}}': "damaged: instances.a.failures was lost",
}


def test_a_malformed_memory(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    before, path = job.runs(), kept(job, "memory.json")
    for count, (text, cause) in enumerate(MALFORMED.items(), 1):
        path.write_text(text)
        kept(job, "memory.json.old").unlink()  # which would stand in
        assert job.plan() == (
            "= adopt    a-51000000  GPU 0  it runs already, as the file asks\n"
            "\n"
            f"warning: {path} was {cause}\n"
            "\n"
            "No changes; 1 to adopt.\n"
        )
        assert path.read_text() == text  # who only looks changes nothing
        job.apply()
        assert path.with_name(f"memory.json.damaged-{count}").read_text() == text
        job.unchanged()
    assert job.runs() == before


@pytest.mark.parametrize("text", ["{", "", "[]"])
def test_what_a_malformed_memory_held_before_its_last_change_is_used(job: World, text: str) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    before, path = job.runs(), kept(job, "memory.json")
    path.write_text(text)
    warning = f"warning: {path} was damaged; what it held before the last change is used\n"
    assert job.plan() == f"{warning}\nNo changes.\n"
    job.apply()
    assert path.with_name("memory.json.damaged-1").read_text() == text
    job.unchanged()
    assert job.runs() == before


def test_what_runs_is_only_adopted_after_a_loss_until_somebody_applies(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    before = job.runs()
    job.write({0: "a"}, a=web("env: {MORE: x}"))
    kept(job, "memory.json").write_text("{")
    kept(job, "memory.json.old").unlink()
    said = "it stays as it is, since what was remembered of it is lost; would replace: "
    for _ in range(2):  # the daemon's restart is no word of a person
        daemon = job.mic.run(http=False)
        until(lambda: said in job.mic("status").stdout, "it to be said", timeout=60)
        assert job.runs() == before
        assert daemon.stop() == 0
    job.apply()
    assert "MORE=x" in job.one("a-51000000")["Config"]["Env"]
    job.unchanged()


def test_what_is_paused_in_a_damaged_memory_stays_paused(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    job.mic("pause", "a", rc=0)
    before, path = job.runs(), kept(job, "memory.json")
    data = json.loads(path.read_text())
    data["instances"]["a-51000000"]["restarts"] = data["paused"]["models"]["a"]["since"] = "x"
    path.write_text(json.dumps(data))
    job.write({0: "a"}, a=web("env: {MORE: x}"))
    plan = job.plan()
    assert "instances.a-51000000.restarts, paused.models.a.since was lost\n" in plan
    assert "! paused   a-51000000" in plan
    assert job.runs() == before


def test_an_older_memory_with_unknown_members_is_read(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    path = kept(job, "memory.json")
    data = json.loads(path.read_text())
    data["from_the_future"] = True
    data["instances"]["a-51000000"]["from_the_future"] = 1
    path.write_text(json.dumps(data))
    job.unchanged()


def test_a_lost_key_makes_secrets_unknown_not_changed(job: World) -> None:
    job.write({0: "a"}, a=web("env: {TOKEN: hunter}"))
    job.apply()
    before = job.runs()
    kept(job, "spec.key").unlink()
    name = job.one("a-51000000")["Name"].lstrip("/")
    warning = (
        f"warning: {name}: its secrets were recorded with another key, so whether they changed is "
        "unknown\n"
    )
    assert job.plan() == f"{warning}\nNo changes.\n"
    job.apply()
    assert job.runs() == before
    job.write({0: "a"}, a=web("env: {TOKEN: hunter, MORE: x}"))
    assert "its specification changed: env.MORE\n" in job.plan()


def test_files_are_for_their_owner_only(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    assert kept(job, "").stat().st_mode & 0o777 == 0o700
    for name in ("memory.json", "spec.key"):
        assert kept(job, name).stat().st_mode & 0o777 == 0o600


def as_weak_root(job: World, *args: str) -> Result:
    """Root without the capability to open what its owner has closed."""
    setpriv = program("setpriv", "util-linux")
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")
    bounds = "-dac_override,-dac_read_search"
    done = subprocess.run(
        [setpriv, "--bounding-set", bounds, PROGRAM, *args],
        env=job.mic.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_state_directory_that_may_not_be_read(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    before, path = job.runs(), kept(job, "")
    os.chown(path, 65534, 65534)
    for command in ("plan", "apply", "status"):
        done = as_weak_root(job, command)
        assert (done.rc, done.stdout) == (1, ""), done
        assert done.stderr == (
            f"error: cannot read {kept(job, 'spec.key')}: Permission denied\n"
            "hint: run as root: the state belongs to the user that converges\n"
        )
    os.chown(path, 0, 0)
    assert job.runs() == before
    job.unchanged()


def test_a_state_directory_that_may_not_be_written(job: World) -> None:
    job.write({0: "a"}, a=web())
    os.chown(job.mic.state_dir, 65534, 65534)
    job.mic.state_dir.chmod(0o755)
    done = as_weak_root(job, "apply")
    assert (done.rc, done.stderr) == (0, ""), done
    assert f"warning: {unsaved(kept(job, 'spec.key'), 'Permission denied')}" in done.stdout
    assert sorted(job.runs()) == ["a-51000000"]
    # Looking writes nothing, and says nothing of it.
    done = as_weak_root(job, "plan")
    assert (done.rc, done.stdout) == (0, f"{ADOPT}\nNo changes; 1 to adopt.\n")


def test_a_state_directory_that_cannot_be_made(job: World) -> None:
    job.write({0: "a"}, a=web("env: {TOKEN: hunter}"))
    job.mic.env["MIC_STATE_DIR"] = "/proc/nonexistent"
    done = job.mic("apply", rc=0)
    path = Path(f"/proc/nonexistent/{job.mic.scope}/spec.key")
    assert f"warning: {unsaved(path, 'No such file or directory')}" in done.stdout
    before = job.runs()
    assert sorted(before) == ["a-51000000"]
    # The key of its secrets is gone with the command that made it.
    assert "its secrets were recorded with another key" in job.mic("apply", rc=0).stdout
    assert job.runs() == before


ADOPT = "= adopt    a-51000000  GPU 0  it runs already, as the file asks\n"


def unsaved(path: Path, why: str) -> str:
    return (
        f"cannot write {path}: {why}; a supervisor that ends meanwhile forgets what happened since "
        "the last save\n"
    )


FULL = """
cp -a "$1" "$1.copy" && mount -t tmpfs -o size=64k,mode=700 none "$1" && cp -a "$1.copy/." "$1"
head -c 1M /dev/zero > "$1/full" 2> /dev/null
"""
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"\n'
BOUND = 'mount --bind "$1" "$1"\n'
WHY = {FULL: "No space left on device", READ_ONLY: "Read-only file system"}


def on_disk(job: World, script: str) -> list[str]:
    """What runs a command with mounts of its own: `script` changes its state directory."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    shell = f'{script}shift\nexec "$@"'
    unshare = program("unshare", "util-linux")
    return [unshare, "--mount", "sh", "-c", shell, "sh", str(job.mic.state_dir)]


def slow(seconds: int, step: int) -> str:
    """It takes its time to end."""
    command = f"trap 'sleep {seconds}; exit' TERM; while :; do sleep 0.1; done"
    return (
        f'{{backend: container, image: "mic-test/busybox:1", command: [sh, -c, "{command}"], '
        f"stop_timeout: 30s, env: {{STEP: '{step}'}}}}"
    )


@pytest.mark.parametrize("script", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_apply_goes_on_where_nothing_can_be_saved(job: World, script: str) -> None:
    """From the stop, which takes longer than anything waits at the end, to the start."""
    job.write({0: "a"}, a=slow(9, 1))
    job.apply()
    job.write({0: "a"}, a=slow(9, 2))
    job.mic.within = on_disk(job, script)
    done = job.mic("apply", rc=0)
    job.mic.within = []
    said = [f"warning: cannot write {kept(job, 'generation.json')}: {WHY[script]}\n"]
    if script == READ_ONLY:  # on a full disk what cannot be renewed goes, and makes room
        said += [
            f"warning: cannot write {kept(job, 'history.jsonl')}: {WHY[script]}\n",
            f"warning: {unsaved(kept(job, 'memory.json'), WHY[script])}",
        ]
    assert [line for line in done.stdout.splitlines(True) if line.startswith("warning: ")] == said
    assert "STEP=2" in job.one("a-51000000")["Config"]["Env"]
    assert sorted(job.runs()) == ["a-51000000"]


@pytest.mark.parametrize("script", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_daemon_starts_and_heals_where_nothing_can_be_saved(job: World, script: str) -> None:
    job.write({0: "a"}, a=web())
    job.mic.within = on_disk(job, script)
    daemon = job.mic.run()
    job.mic.within = []
    until(lambda: job.mic("status").rc == 0, "it to be ready", timeout=60)
    before = job.run_of("a-51000000")
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: job.instances()["a-51000000"]["restarts"] == 1, "the restart", timeout=60)
    until(lambda: job.mic("status").rc == 0, "it to be ready", timeout=60)
    said = unsaved(kept(job, "spec.key"), WHY[script])
    assert f"warning: {said}" in job.mic("status").stderr
    assert f"it warns: {said.strip()}" in job.mic("doctor").stdout
    assert "mic_state_saved 0.0" in httpx.get(f"{job.mic.url}/metrics").text
    assert daemon.text().count("a supervisor that ends meanwhile") == 1
    assert daemon.stop() == 0


def test_a_daemon_whose_state_directory_becomes_read_only_and_back(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.mic.within = on_disk(job, BOUND)
    daemon = job.mic.run()
    job.mic.within = []
    until(lambda: job.mic("status").rc == 0, "it to be ready", timeout=60)

    def remount(how: str) -> None:
        inside = ["nsenter", "--target", str(daemon.pid), "--mount", "mount", "-o"]
        command = [*inside, f"remount,{how},bind", str(job.mic.state_dir)]
        # Where a file is being written the kernel calls it busy.
        until(lambda: subprocess.run(command, check=False).returncode == 0, f"to be {how}")

    remount("ro")
    before = job.run_of("a-51000000")
    os.kill(before.pid, signal.SIGKILL)
    said = f"warning: {unsaved(kept(job, 'memory.json'), WHY[READ_ONLY])}"
    until(lambda: said in job.mic("status").stderr, "it to be said", timeout=60)
    until(lambda: job.mic("status").rc == 0, "it to be back", timeout=60)
    assert job.run_of("a-51000000") != before
    remount("rw")
    until(lambda: said not in job.mic("status").stderr, "it to be saved", timeout=60)
    assert json.loads(kept(job, "memory.json").read_text())["instances"]["a-51000000"]["restarts"]
