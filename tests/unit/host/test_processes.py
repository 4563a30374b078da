"""Readers over /proc, against this machine's own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mic_supervisor import clocks
from mic_supervisor.host import processes as procfs
from mic_supervisor.model import Listener
from tests.support.waiting import until


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], env={"MIC_TEST_MARK": f"mark-{os.getpid()}"})
    until(lambda: procfs.environ(process.pid) == {"MIC_TEST_MARK": f"mark-{os.getpid()}"}, "exec")
    yield process
    process.kill()
    process.wait()


def start_time(pid: int) -> int:
    found = procfs.stat(pid)
    assert found is not None
    return found.start_time


def test_a_process_is_its_pid_and_its_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    found = procfs.stat(sleeper.pid)
    assert found is not None
    assert (found.pid, found.name, found.ppid) == (sleeper.pid, "sleep", os.getpid())
    assert found.session == os.getsid(sleeper.pid)
    ticks = os.sysconf("SC_CLK_TCK")
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 <= uptime - found.start_time / ticks < 30
    assert procfs.is_running(sleeper.pid, found.start_time)
    assert not procfs.is_running(sleeper.pid, found.start_time + 1)


def test_a_zombie_has_a_start_time_and_does_not_run(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    sleeper.kill()
    until(lambda: not procfs.is_running(sleeper.pid, started), "the end")
    assert start_time(sleeper.pid) == started  # nobody has waited for it
    sleeper.wait()
    assert procfs.stat(sleeper.pid) is None


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
        until(lambda: (one := procfs.stat(process.pid)) and one.state == "Z", "a zombie leader")
        found = procfs.stat(process.pid)
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
        found = procfs.stat(process.pid)
        assert found is not None
        assert (found.name, found.ppid, found.running) == ("a) Z (b", os.getpid(), True)
    finally:
        process.kill()
        process.communicate()


def test_descendants_have_their_parents_first() -> None:
    process = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60 & wait' & wait"])
    try:
        until(lambda: len(procfs.descendants([process.pid])) == 2, "three processes")
        below = procfs.descendants([process.pid])
        parents = [procfs.processes()[pid].ppid for pid in below]
        assert parents == [process.pid, below[0]]
    finally:
        for pid in [*reversed(procfs.descendants([process.pid])), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert procfs.descendants([process.pid]) == []


def test_descendants_survive_a_loop_in_what_was_read() -> None:
    one = procfs.Stat(10, "a", "S", 11, 1, 5)
    other = procfs.Stat(11, "b", "S", 10, 1, 5)
    assert procfs.descendants([10], {10: one, 11: other}) == [11]


def test_processes_are_found_by_their_environment(sleeper: subprocess.Popen[bytes]) -> None:
    mark = f"mark-{os.getpid()}"
    assert procfs.with_environ("MIC_TEST_MARK", [mark, "other"]) == {sleeper.pid: mark}
    assert procfs.with_environ("MIC_TEST_MARK", [mark[:-1]]) == {}
    assert procfs.with_environ("TEST_MARK", [mark]) == {}
    assert procfs.environ(2**22 - 1) is None


def test_a_signal_reaches_the_process_that_is_meant(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    assert not procfs.send_signal(sleeper.pid, started - 1, signal.SIGKILL)
    assert procfs.is_running(sleeper.pid, started)
    assert procfs.send_signal(sleeper.pid, started, signal.SIGKILL)
    assert sleeper.wait() == -signal.SIGKILL
    assert not procfs.send_signal(sleeper.pid, started, signal.SIGKILL)


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
        assert not procfs.send_signal(idents[0], started, signal.SIGKILL)
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
    assert procfs.service_of(cgroup) == unit


def test_outside_of_systemd_there_is_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    assert procfs.enclosing_service() is None


def test_boot_and_namespace_have_names() -> None:
    assert len(clocks.boot_id()) == 36
    assert procfs.pid_namespace().startswith("pid:[")


# --- listening sockets ------------------------------------------------------------------------

TABLE = b"""\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1520 1
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 77 1
   2: 0100007F:1770 0100007F:A3B2 01 00000000:00000000 00:00000000 00000000     0        0 99 1
   3: 0200007F:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1521 1
"""


def test_the_tables_of_the_kernel_are_read() -> None:
    assert procfs.parse_listeners(TABLE) == {20000: {1520, 1521}, 22: {77}}
    assert procfs.parse_listeners(b"") == {}


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_listener_and_its_owner_are_found(family: int, host: str) -> None:
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        port = listening.getsockname()[1]
        assert procfs.listener_owner(port) is None  # bound is not listening
        listening.listen()
        assert Listener(port) in (procfs.listeners() or ())
        assert procfs.listener_owner(port) == Listener(
            port, os.getpid(), procfs.processes()[os.getpid()].name
        )
    assert Listener(port) not in (procfs.listeners() or ())
    assert procfs.listener_owner(port) is None


def test_a_connection_is_no_listener() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()) as client:
            assert Listener(client.getsockname()[1]) not in (procfs.listeners() or ())


def test_both_ways_to_ask_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(family: int) -> dict[int, set[int]]:
        raise OSError("no such protocol")

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        asked = procfs.listener_owner(port)
        monkeypatch.setattr(procfs, "_ask_kernel", refuse)
        assert Listener(port) in (procfs.listeners() or ())
        assert procfs.listener_owner(port) == asked


def test_tables_that_cannot_be_read_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(procfs, "_ask_kernel", refuse)
    monkeypatch.setattr(procfs, "_read", refuse)
    assert procfs.listeners() is None
    assert procfs.listener_owner(80) is None


def test_listeners_are_cheap() -> None:
    best = min(_timed(procfs.listeners) for _ in range(10))
    assert best < 0.003


def _timed(call: object) -> float:
    assert callable(call)
    before = time.perf_counter()
    call()
    return time.perf_counter() - before
