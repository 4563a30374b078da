"""`mic-supervisor kill`: real processes, on the GPUs of the mock NVML."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from mic_supervisor.gpu.owners import owner_ref
from mic_supervisor.model import OwnerKind
from tests.mock_nvml import GIB, MockGpu, MockNvml, MockProcess
from tests.support.mic import PROGRAM, Mic, Result
from tests.support.require import missing
from tests.support.waiting import until

STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
SINCE = re.compile(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d")

Spawn = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def nvml(tmp_path: Path, mic: Mic) -> MockNvml:
    mock = MockNvml(tmp_path)
    mock.set([MockGpu(), MockGpu()])
    mic.env |= {"MIC_GPU_SOURCE": "nvml", "MIC_DOCKER_HOST": "none", **mock.env()}
    return mock


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a process of nobody's, as far as this machine's control groups say so."""
    made: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **env: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command or ("/bin/sleep", "1000"),
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **env},
        )
        made.append(process)
        return process

    yield start
    for process in made:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def nobodys() -> None:
    """Whatever this test starts is in no unit and in no container."""
    kind, ref = owner_ref(Path("/proc/self/cgroup").read_text())
    if kind is not OwnerKind.ORPHAN:
        missing(f"the tests run inside {ref}, and so would its orphans")


def hold(nvml: MockNvml, gpu: int, *processes: subprocess.Popen[bytes], used: int = GIB) -> None:
    nvml.change(gpu, processes=[MockProcess(one.pid, used) for one in processes])


def let_go_when_gone(nvml: MockNvml, gpu: int, process: subprocess.Popen[bytes]) -> None:
    """The driver forgets a process that has ended, a little later."""
    import threading

    def watch() -> None:
        process.wait()
        time.sleep(0.3)
        nvml.change(gpu, processes=[])

    threading.Thread(target=watch, daemon=True).start()


def words(text: str) -> list[str]:
    return SINCE.sub("since THEN", text).splitlines()


@pytest.mark.usefixtures("nobodys")
def test_a_holder_is_ended_and_its_gpu_awaited(mic: Mic, nvml: MockNvml, spawn: Spawn) -> None:
    process = spawn()
    hold(nvml, 1, process, used=3 * GIB // 2)
    let_go_when_gone(nvml, 1, process)
    done = mic("kill", str(process.pid), "--yes", rc=0)
    assert words(done.stdout) == [
        f"PID {process.pid} (sleep) on GPU 1 (1.5 GiB), since THEN, of nobody",
        f"{process.pid} (sleep) ended",
    ]
    assert process.wait() == -signal.SIGTERM
    assert mic("gpus", "--json").json()["gpus"][1]["processes"] == []


@pytest.mark.usefixtures("nobodys")
def test_the_start_time_is_the_kernels(mic: Mic, nvml: MockNvml, spawn: Spawn) -> None:
    process = spawn()
    hold(nvml, 0, process)
    let_go_when_gone(nvml, 0, process)
    before = time.time()
    done = mic("kill", str(process.pid), "--yes", rc=0)
    found = re.search(r"since (\S+ \S+),", done.stdout)
    assert found is not None
    said = time.mktime(time.strptime(found[1], "%Y-%m-%d %H:%M:%S"))
    assert before - 20 < said < before + 2


def test_one_that_ignores_term_is_killed_after_the_grace(
    mic: Mic, nvml: MockNvml, spawn: Spawn
) -> None:
    process = spawn("/bin/sh", "-c", STUBBORN)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    hold(nvml, 0, process)
    let_go_when_gone(nvml, 0, process)
    began = time.monotonic()
    done = mic("kill", str(process.pid), "--yes", "--grace", "500ms", rc=0)
    assert time.monotonic() - began > 0.5
    assert words(done.stdout)[1:] == [
        f"{process.pid} (sh) was killed: it did not end within 0.5 s of TERM"
    ]
    assert process.wait() == -signal.SIGKILL


def test_a_gpu_that_does_not_let_go_is_said(mic: Mic, nvml: MockNvml, spawn: Spawn) -> None:
    process = spawn()
    hold(nvml, 0, process)
    mic_env = dict(mic.env)
    done = short_release(mic, mic_env, "kill", str(process.pid), "--yes")
    assert done.rc == 70
    assert done.stderr == (
        f"error: {process.pid} (sleep) ended, but GPU 0 still lists it\n"
        "hint: see mic-supervisor gpus, and dmesg | grep -i -e xid -e nvrm\n"
    )


def short_release(mic: Mic, env: dict[str, str], *args: str) -> Result:
    """The command with a shorter wait for the driver."""
    program = (
        "import sys; from mic_supervisor import kill; "
        "kill.end.__kwdefaults__['release_wait'] = 0.6; "
        "from mic_supervisor.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        env=mic.environment() | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_there_is_no_such_process(mic: Mic, nvml: MockNvml, spawn: Spawn) -> None:
    process = spawn("/bin/true")
    process.wait()
    assert mic("kill", str(process.pid), "--yes", rc=1).stderr == (
        f"error: cannot kill {process.pid}: there is no such process\n"
    )
    nvml.change(0, processes=[MockProcess(process.pid)])
    assert mic("kill", str(process.pid), "--yes", rc=1).stderr == (
        f"error: cannot kill {process.pid}: there is no such process, although GPU 0 lists it\n"
        "hint: the driver has not cleaned up: see dmesg | grep -i -e xid -e nvrm\n"
    )


def test_what_holds_no_gpu_needs_force(mic: Mic, nvml: MockNvml, spawn: Spawn) -> None:
    process = spawn()
    assert mic("kill", str(process.pid), "--yes", rc=1).stderr == (
        f"error: cannot kill {process.pid}: sleep holds no GPU\nhint: end it anyway with: --force\n"
    )
    assert process.poll() is None
    mic("kill", str(process.pid), "--yes", "--force", rc=0)
    assert process.wait() == -signal.SIGTERM


def test_gpus_that_cannot_be_read_are_not_empty(mic: Mic, nvml: MockNvml, spawn: Spawn) -> None:
    process = spawn()
    nvml.break_library(999)
    said = mic("kill", str(process.pid), "--yes", rc=1).stderr
    assert said.startswith(
        f"error: cannot kill {process.pid}: it is not known whether it holds a GPU: "
        "cannot read GPUs"
    )
    assert mic("kill", "--all-orphans", "--yes", rc=1).stderr.startswith("error: cannot read GPUs")
    assert process.poll() is None


def test_without_a_terminal_nothing_is_asked_and_nothing_done(
    mic: Mic, nvml: MockNvml, spawn: Spawn
) -> None:
    process = spawn()
    hold(nvml, 0, process)
    done = mic("kill", str(process.pid), rc=1)
    assert done.stderr == (
        "error: cannot ask whether to go on: this is no terminal\nhint: say --yes\n"
    )
    assert process.poll() is None


@pytest.mark.parametrize(("answer", "ends"), [(b"y\n", True), (b"n\n", False), (b"\x03", False)])
def test_on_a_terminal_it_asks(
    mic: Mic, nvml: MockNvml, spawn: Spawn, answer: bytes, ends: bool
) -> None:
    process = spawn()
    hold(nvml, 0, process)
    let_go_when_gone(nvml, 0, process)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(PROGRAM, [str(PROGRAM), "kill", str(process.pid)], mic.environment())
    shown = b""
    try:
        while b"Kill it?" not in shown:
            assert select.select([terminal], [], [], 20)[0], shown
            shown += os.read(terminal, 4096)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            # An interrupt just before readline waits is noticed with the next key only.
            os.write(terminal, answer)
            while select.select([terminal], [], [], 5)[0]:
                shown += os.read(terminal, 4096)
    except OSError:  # the other side has ended
        pass
    finally:
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert f"PID {process.pid} (sleep) on GPU 0 (1.0 GiB)" in shown.decode()
    assert os.waitstatus_to_exitcode(status) == (0 if ends else 130)
    if ends:
        assert process.wait(60) == -signal.SIGTERM
    else:
        assert process.poll() is None
        assert ("not killed" in shown.decode()) == (answer == b"n\n")


def test_a_pid_that_went_to_another_process_while_it_asked_is_left_alone(
    mic: Mic, nvml: MockNvml, spawn: Spawn
) -> None:
    """What was looked at has ended: whoever has its number now was never asked about."""
    from mic_supervisor.kill import Survey, end
    from mic_supervisor.model import GpuInventory

    process = spawn()
    look = Survey(GpuInventory("simulated"), ())
    target = look.target(process.pid)
    assert target is not None
    from dataclasses import replace

    (result,) = end([replace(target, started=target.started - 1)], lambda: look, grace=0.1)
    assert result.outcome == "gone"
    time.sleep(0.1)
    assert process.poll() is None


@pytest.mark.parametrize("pid", ["1"])
def test_the_first_process_is_refused(mic: Mic, nvml: MockNvml, pid: str) -> None:
    assert mic("kill", pid, "--yes", "--force", rc=1).stderr == (
        "error: cannot kill 1: it is the machine's first process, and everything ends with it\n"
    )


@pytest.mark.parametrize("arguments", [[], ["4121", "--all-orphans"], ["0"], ["x"], ["-1"]])
def test_wrong_usage(mic: Mic, nvml: MockNvml, arguments: list[str]) -> None:
    assert "Usage:" in mic("kill", *arguments, rc=64).stderr


INSTANCE = """
    version: 1
    models:
      a: {backend: process, command: [/bin/sleep, "1000"]}
    gpus: {1: a}
"""


def test_ours_and_the_supervisor_are_refused_whatever_is_said(
    mic: Mic, nvml: MockNvml, spawn: Spawn
) -> None:
    mic.write(INSTANCE)
    daemon = mic.run()

    def running() -> dict[str, object] | None:
        rows = mic.status()["instances"]
        return next((row for row in rows if row["phase"] == "unprobed"), None)

    row = until(running, "the instance")
    assert row is not None
    pid = row["pid"]
    hint = "hint: stop it with: mic-supervisor stop a --gpu 1\n"
    expected = f"cannot kill {pid}: it belongs to our instance {row['id']}\n{hint}"
    assert mic("kill", str(pid), "--yes", "--force", rc=1).stderr == f"error: {expected}"

    keeper = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    assert mic("kill", keeper, "--yes", "--force", rc=1).stderr == (
        f"error: cannot kill {keeper}: it belongs to our instance {row['id']}\n{hint}"
    )
    assert mic("kill", str(daemon.pid), "--yes", "--force", rc=1).stderr == (
        f"error: cannot kill {daemon.pid}: it is the supervisor of scope {mic.scope} "
        "(mic-supervisor run)\nhint: stop it with: systemctl stop mic\n"
    )
    nvml.change(1, processes=[MockProcess(int(str(pid)))])
    assert mic("kill", "--all-orphans", "--yes", rc=0).stdout == (
        "There are no processes that hold a GPU and that nobody owns.\n"
    )
    os.kill(int(str(pid)), 0)
    assert daemon.stop() == 0


@pytest.mark.usefixtures("nobodys")
def test_all_orphans_are_those_and_no_others(mic: Mic, nvml: MockNvml, spawn: Spawn) -> None:
    first, second, other = spawn(), spawn(), spawn(MIC_SCOPE="other", MIC_INSTANCE="b-0")
    bystander = spawn()
    nvml.change(0, processes=[MockProcess(first.pid), MockProcess(other.pid), MockProcess(4194303)])
    nvml.change(1, processes=[MockProcess(second.pid), MockProcess(first.pid, None)])
    let_go_when_gone(nvml, 0, first)
    let_go_when_gone(nvml, 1, second)
    done = mic("kill", "--all-orphans", "--yes", rc=0)
    one, two = sorted([first, second], key=lambda process: process.pid)
    holds = {
        first.pid: "GPU 0 (1.0 GiB), GPU 1 (memory unknown)",
        second.pid: "GPU 1 (1.0 GiB)",
    }
    assert words(done.stdout) == [
        f"PID {one.pid} (sleep) on {holds[one.pid]}, since THEN, of nobody",
        f"PID {two.pid} (sleep) on {holds[two.pid]}, since THEN, of nobody",
        f"{one.pid} (sleep) ended",
        f"{two.pid} (sleep) ended",
    ]
    assert (first.wait(), second.wait()) == (-signal.SIGTERM, -signal.SIGTERM)
    assert other.poll() is None
    assert bystander.poll() is None
    nvml.change(0, processes=[MockProcess(other.pid)])
    assert mic("kill", str(other.pid), "--yes", rc=1).stderr == (
        f"error: cannot kill {other.pid}: it belongs to instance b-0 of scope other\n"
        "hint: look at it with: MIC_SCOPE=other mic-supervisor status\n"
    )


def test_permission_denied_is_77(mic: Mic, nvml: MockNvml) -> None:
    if os.geteuid() != 0:
        missing("needs root, to try it without root's power to signal anyone")
    process = subprocess.Popen(["/bin/sleep", "1000"], user=65534)
    try:
        hold(nvml, 0, process)
        done = subprocess.run(
            [PROGRAM, "kill", str(process.pid), "--yes"],
            env=mic.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=_without_cap_kill,
        )
        assert (done.returncode, done.stderr) == (
            77,
            f"error: cannot kill {process.pid}: permission denied\nhint: run as root\n",
        )
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def _without_cap_kill() -> None:
    import ctypes

    pr_capbset_drop, cap_kill = 24, 5  # linux/prctl.h, linux/capability.h
    assert ctypes.CDLL(None, use_errno=True).prctl(pr_capbset_drop, cap_kill, 0, 0, 0) == 0


@pytest.mark.engine
def test_a_foreign_container_is_named_and_asked_about(
    mic: Mic, nvml: MockNvml, engine: docker.APIClient, busybox_image: str
) -> None:
    del mic.env["MIC_DOCKER_HOST"]
    name = f"{mic.scope}-stranger"
    host = engine.create_host_config()
    made = engine.create_container(
        busybox_image, ["sleep", "1000"], name=name, host_config=host, labels={"io.mic.scope": "x"}
    )
    try:
        engine.start(made["Id"])
        pid = engine.inspect_container(made["Id"])["State"]["Pid"]
        nvml.change(0, processes=[MockProcess(pid)])
        asked = mic("kill", str(pid), rc=1)
        assert words(asked.stdout) == [
            f"PID {pid} (sleep) on GPU 0 (1.0 GiB), since THEN, of container {name} "
            f"({made['Id'][:12]}): its manager may start it again"
        ]
        assert "say --yes" in asked.stderr
        # Docker cannot be asked: it may well be one of ours.
        mic.env["MIC_DOCKER_HOST"] = "unix:///nowhere.sock"
        assert (
            "it is not known whether it is one of ours: "
            in mic("kill", str(pid), "--yes", rc=1).stderr
        )
        del mic.env["MIC_DOCKER_HOST"]
        assert mic("kill", "--all-orphans", "--yes", rc=0).stdout.startswith("There are no")
        assert engine.inspect_container(made["Id"])["State"]["Running"]
    finally:
        engine.remove_container(made["Id"], force=True)
