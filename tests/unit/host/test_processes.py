"""What is read of processes, on this machine's own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mic_supervisor import clocks
from mic_supervisor.host import processes
from mic_supervisor.model import Listener
from tests.support.waiting import until


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], env={"MIC_TEST_MARK": f"mark-{os.getpid()}"})
    until(
        lambda: processes.environ(process.pid) == {"MIC_TEST_MARK": f"mark-{os.getpid()}"}, "exec"
    )
    yield process
    process.kill()
    process.wait()


def start_time(pid: int) -> int:
    found = processes.stat(pid)
    assert found is not None
    return found.start_time


def test_a_process_is_its_pid_and_its_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    found = processes.stat(sleeper.pid)
    assert found is not None
    assert (found.pid, found.name, found.ppid) == (sleeper.pid, "sleep", os.getpid())
    assert found.session == os.getsid(sleeper.pid)
    ticks = os.sysconf("SC_CLK_TCK")
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 <= uptime - found.start_time / ticks < 30
    assert processes.is_running(sleeper.pid, found.start_time)
    assert not processes.is_running(sleeper.pid, found.start_time + 1)


def test_a_zombie_has_a_start_time_and_does_not_run(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    sleeper.kill()
    until(lambda: not processes.is_running(sleeper.pid, started), "the end")
    assert start_time(sleeper.pid) == started  # nobody has waited for it
    sleeper.wait()
    assert processes.stat(sleeper.pid) is None


def test_a_process_whose_first_thread_ended_runs_on() -> None:
    text = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)"  # exit, of this thread only
    )
    if os.uname().machine != "x86_64":
        text = text.replace("60, 0", "93, 0")
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", text])
    try:
        until(lambda: (one := processes.stat(process.pid)) and one.state == "Z", "a zombie leader")
        found = processes.stat(process.pid)
        assert found is not None and found.threads == 2 and found.running
    finally:
        process.kill()
        process.wait()


def test_names_may_hold_brackets_and_spaces() -> None:
    text = (
        "import ctypes, time\n"
        "ctypes.CDLL(None).prctl(15, b'a) Z (b', 0, 0, 0)\n"
        "print(flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", text], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        found = processes.stat(process.pid)
        assert found is not None
        assert (found.name, found.ppid, found.running) == ("a) Z (b", os.getpid(), True)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["python", "a b", "x) R 1 (y", "", "Web\tContent"])
def test_whatever_a_process_calls_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    (tmp_path / "42").mkdir()
    rest = " ".join(["S", "7", *["0"] * 17, "123456", *["0"] * 30])
    (tmp_path / "42/stat").write_text(f"42 ({name}) {rest}\n")
    assert processes.stat(42) == processes.Stat(42, name, "S", 7, 0, 123456, 0)


@pytest.mark.parametrize("text", ["", "42", "42 (python) S 7", "no brackets " * 20])
def test_a_stat_that_is_cut_short_is_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    (tmp_path / "42").mkdir()
    (tmp_path / "42/stat").write_text(text)
    assert processes.stat(42) is None


def test_descendants_have_their_parents_first() -> None:
    process = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60 & wait' & wait"])
    try:
        until(lambda: len(processes.descendants([process.pid])) == 2, "three processes")
        below = processes.descendants([process.pid])
        parents = [processes.processes()[pid].ppid for pid in below]
        assert parents == [process.pid, below[0]]
    finally:
        for pid in [*reversed(processes.descendants([process.pid])), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert processes.descendants([process.pid]) == []


def test_descendants_survive_a_loop_in_what_was_read() -> None:
    one = processes.Stat(10, "a", "S", 11, 1, 5)
    other = processes.Stat(11, "b", "S", 10, 1, 5)
    assert processes.descendants([10], {10: one, 11: other}) == [11]


def test_processes_are_found_by_their_environment(sleeper: subprocess.Popen[bytes]) -> None:
    mark = f"mark-{os.getpid()}"
    assert processes.with_environ("MIC_TEST_MARK", [mark, "other"]) == {sleeper.pid: mark}
    assert processes.with_environ("MIC_TEST_MARK", [mark[:-1]]) == {}
    assert processes.with_environ("TEST_MARK", [mark]) == {}
    assert processes.environ(2**22 - 1) is None


def test_a_signal_reaches_the_process_that_is_meant(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    assert not processes.send_signal(sleeper.pid, started - 1, signal.SIGKILL)
    assert processes.is_running(sleeper.pid, started)
    assert processes.send_signal(sleeper.pid, started, signal.SIGKILL)
    assert sleeper.wait() == -signal.SIGKILL
    assert not processes.send_signal(sleeper.pid, started, signal.SIGKILL)


def test_a_thread_is_not_signalled() -> None:
    idents: list[int] = []
    release = threading.Event()

    def work() -> None:
        idents.append(threading.get_native_id())
        release.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: idents, "the thread")
        started = start_time(idents[0])
        assert not processes.send_signal(idents[0], started, signal.SIGKILL)
    finally:
        release.set()
        thread.join()


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/mic.service", "mic.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope", None),
        ("0::/user.slice/user-1000.slice/session-3.scope", None),
        ("0::/user.slice/user-1.slice/user@1.service/app.slice/mic.service", "mic.service"),
        ("4:memory:/a/b.service\n1:name=systemd:/system.slice/mic.service", "mic.service"),
        ("4:memory:/a/b.service\n0::/", None),
        ("0::/system.slice/docker-0123.scope", None),
        ("", None),
        ("nonsense", None),
    ],
)
def test_the_service_that_a_cgroup_names(cgroup: str, unit: str | None) -> None:
    assert processes.service_of(cgroup) == unit


def test_outside_of_systemd_there_is_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    assert processes.enclosing_service() is None


def test_boot_and_namespace_have_names() -> None:
    assert len(clocks.boot_id()) == 36
    assert processes.pid_namespace().startswith("pid:[")


def test_command_lines_and_environments_are_exact(tmp_path: Path) -> None:
    """What psutil 7.2 makes of each stands in docs/architecture.md."""
    program = tmp_path / "a b"
    shutil.copy(shutil.which("cat") or "", program)
    with subprocess.Popen(
        [program],
        stdin=subprocess.PIPE,
        env={b"CR": b"a\r\nb\rc", b"BYTES": b"\xff=\xfe", b"LAST": b""},
    ) as process:
        until(lambda: processes.command_line(process.pid) == [str(program)], "one argument")
        found = processes.environ(process.pid)
    assert found == {"CR": "a\r\nb\rc", "BYTES": os.fsdecode(b"\xff=\xfe"), "LAST": ""}
    assert processes.command_line(process.pid) == []
    assert processes.environ(process.pid) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"", []), (b"a\0", ["a"]), (b"a\0\0", ["a", ""]), (b"nginx: worker", ["nginx: worker"])],
)
def test_command_lines_end_as_they_do(
    text: bytes, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    (tmp_path / "10").mkdir()
    (tmp_path / "10/cmdline").write_bytes(text)
    assert processes.command_line(10) == expected


def test_an_empty_entry_ends_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    (tmp_path / "10").mkdir()
    (tmp_path / "10/environ").write_bytes(b"A=1\0\0no pair\0MIC_SCOPE=x\0")
    assert processes.environ(10) == {"A": "1", "MIC_SCOPE": "x"}


LOOK = """
import os, sys
from mic_supervisor.host import processes
pid = int(sys.argv[1])
started = processes.stat(pid).start_time
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
one = processes.readable(pid)
try:
    sent = processes.send_signal(pid, started, 0)
except PermissionError:
    sent = "refused"
print(one and one.name, processes.environ(pid), processes.user_ids(pid), sent, os.getuid())
print(processes.exists(pid), processes.exists(pid + 1000))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mounted", "seen"),
    [
        ("rw", "sleep None {0} refused 65534"),
        ("hidepid=2", "None None set() False 65534"),
    ],
)
def test_a_process_of_another_user_exists_whatever_may_be_read(mounted: str, seen: str) -> None:
    """In a PID namespace of its own, so that the mount option stays there."""
    script = f'mount -t proc -o {mounted} proc /proc; sleep 60 & {sys.executable} -c "$1" $!'
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-c", script, "sh", LOOK],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert (done.stdout, done.stderr) == (f"{seen}\nTrue False\n", "")


# --- listening sockets ------------------------------------------------------------------------

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
TABLE = f"""\
{HEAD}   0: 0100007F:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 15
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 77
   2: 0100007F:1770 0100007F:A3B2 01 00000000:00000000 00:00000000 00000000     0        0 99
   3: what stands below the first connection is not read
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text(TABLE)
    return tmp_path / "net"


def by_port() -> dict[int, frozenset[str]]:
    return {one.port: one.addresses for one in processes.listeners() or ()}


def test_the_tables_are_read_as_far_as_they_list_listeners(net: Path) -> None:
    here, everywhere = frozenset({"127.0.0.1"}), frozenset({"0.0.0.0"})
    assert by_port() == {22: everywhere, 20000: here}  # and no IPv6
    (net / "tcp6").write_text(f"{HEAD}   0: {'0' * 32}:0050 {'0' * 32}:0000 0A 0:0 0:0 0 0 0 9\n")
    assert by_port() == {22: everywhere, 80: frozenset({"::"}), 20000: here}


@pytest.mark.parametrize("text", [None, "", f"{HEAD}   0: cut"])
def test_tables_that_cannot_be_read_are_unknown(net: Path, text: str | None) -> None:
    (net / "tcp").unlink()
    if text is not None:
        (net / "tcp").write_text(text)
    assert processes.listeners() is None
    assert processes.listener_owners() == {}


def test_the_kernel_lists_what_listens_first() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()):
            lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    states = [line.split()[3] for line in lines]
    count = states.count("0A")
    assert len(states) > count > 0
    assert set(states[:count]) == {"0A"}


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_listener_and_its_owner_are_found(family: int, host: str) -> None:
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        port = listening.getsockname()[1]
        assert port not in processes.listener_owners()  # bound is not listening
        listening.listen()
        assert by_port()[port] == {host}
        mine = processes.stat(os.getpid())
        assert mine is not None
        assert processes.listener_owners()[port] == Listener(port, os.getpid(), mine.name)
    assert port not in by_port()
    assert port not in processes.listener_owners()


def test_a_connection_is_no_listener() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()) as client:
            port = client.getsockname()[1]
            assert port not in by_port()
            assert port not in processes.listener_owners()
