"""A Docker Engine for the tests: the one that answers, else one of our own, kept between runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import docker
from docker.errors import DockerException

from tests.setup.steps import Missing, cache_dir, say

SOCKET = Path("/var/run/docker.sock")

# Sockets live below it, whose paths may have 107 characters: the cache's own path may be too long.
EXEC_ROOT = Path("/run/mic-test-engine")
PIDFILE = EXEC_ROOT / "dockerd.pid"

START_TIMEOUT = 90.0  # seconds; the first start after a kill -9 also ends the old containers


def connect(timeout: float = 10.0) -> docker.APIClient | None:
    """A client of the engine that DOCKER_HOST or the default socket leads to, None: no answer."""
    try:
        client = docker.from_env(timeout=int(timeout)).api
        client.ping()
    except DockerException:
        return None
    except OSError:
        return None
    return client


def _program(pid: int) -> str | None:
    """What runs as `pid`; None: nothing. A zombie, which some PID 1s leave for minutes, is nothing.

    /proc/PID/stat reads "PID (NAME) STATE …".
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    return None if rest.split()[0] in "ZX" else name


def _ours(pid: int) -> bool:
    """Whether `pid` is the engine that this file started: the PID may have been used again."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return _program(pid) == "dockerd" and str(PIDFILE).encode() in command


def _engines_here() -> list[int]:
    """PIDs of every dockerd in this network namespace: a second one would take over docker0."""
    mine = Path("/proc/self/ns/net").readlink()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or _program(int(entry.name)) != "dockerd":
            continue
        try:
            same = (entry / "ns" / "net").readlink() == mine
        except OSError:
            same = True  # it cannot be told apart, so it counts
        if same:
            found.append(int(entry.name))
    return found


def _drop_stale_pidfile(path: Path, program: str) -> None:
    """A PID file that outlived its process makes the next start fail once the PID is used again."""
    try:
        pid = int(path.read_text())
    except (OSError, ValueError):
        path.unlink(missing_ok=True)
        return
    if _program(pid) != program:
        path.unlink(missing_ok=True)


def _hook_directory() -> Path:
    """With this program on its PATH when it starts, dockerd accepts requests for GPUs."""
    directory = cache_dir() / "engine" / "bin"
    directory.mkdir(parents=True, exist_ok=True)
    hook = directory / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\nexit 0\n")
    hook.chmod(0o755)
    return directory


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()[-15:]
    return "\n".join(f"    {line}" for line in lines)


def _await(alive: Callable[[], bool], seconds: float) -> docker.APIClient | None:
    """A client as soon as the engine answers; None once it is not alive or the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client = connect(5)
        if client is not None:
            return client
        if not alive():
            return None
        time.sleep(0.2)
    return None


def _start() -> docker.APIClient:
    if os.geteuid() != 0:
        raise Missing(
            "cannot start a Docker Engine: not root",
            hint="start one (systemctl start docker) and join its group, or run make test as root",
        )
    if shutil.which("dockerd") is None:
        raise Missing("cannot start a Docker Engine: dockerd is not installed", hint="make test")
    home = cache_dir() / "engine"
    EXEC_ROOT.mkdir(parents=True, exist_ok=True)
    _drop_stale_pidfile(PIDFILE, "dockerd")
    _drop_stale_pidfile(EXEC_ROOT / "containerd" / "containerd.pid", "containerd")
    log = home / "dockerd.log"
    path = f"{_hook_directory()}:/usr/local/sbin:/usr/sbin:/sbin:{os.environ['PATH']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *["dockerd", "--host", f"unix://{SOCKET}", "--data-root", str(home / "data")],
                *["--exec-root", str(EXEC_ROOT), "--pidfile", str(PIDFILE)],
            ],
            env={**os.environ, "PATH": path},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # it outlives make, and no Ctrl-C reaches it
        )
    client = _await(lambda: process.poll() is None, START_TIMEOUT)
    if client is not None:
        return client
    state = process.poll()
    if state is None:
        process.terminate()
        process.wait(30)
    ended = f"exited with {state}" if state is not None else f"no answer in {START_TIMEOUT:.0f} s"
    raise Missing(
        f"cannot start a Docker Engine: {ended}; {log} ends with:\n{_tail(log)}",
        hint="mend what the log says, or start an engine yourself",
    )


def _await_running() -> docker.APIClient | None:
    """The answer of a dockerd that runs here already; None: there is none, or it has ended."""
    running = _engines_here()
    if not running:
        return None
    pid = running[0]
    say(f"Docker Engine: dockerd (PID {pid}) runs; waiting for it to answer")
    client = _await(lambda: bool(_engines_here()), START_TIMEOUT)
    if client is None and _engines_here():
        raise Missing(
            f"cannot reach a Docker Engine: dockerd (PID {pid}) does not answer on {SOCKET}, "
            "and a second one must not share its network",
            hint="set DOCKER_HOST to its socket, or stop it",
        )
    return client


def ensure() -> docker.APIClient:
    """An engine that answers. Raises Missing. Nobody else's processes are touched."""
    client = connect()
    started = False
    if client is None:
        host = os.environ.get("DOCKER_HOST")
        if host and host != f"unix://{SOCKET}":
            raise Missing(
                f"cannot reach a Docker Engine: DOCKER_HOST is {host}, and nothing answers there",
                hint="start that engine, or unset DOCKER_HOST",
            )
        if SOCKET.exists() and not os.access(SOCKET, os.W_OK):
            raise Missing(
                f"cannot reach a Docker Engine: {SOCKET} may not be written by this user",
                hint="join the group of that socket: usermod -aG docker USER, then log in again",
            )
        client = _await_running()
    if client is None:
        say("Docker Engine: starting one")
        client = _start()
        started = True
    version = client.version()["Version"]
    whose = "started" if started else "answers already"
    say(f"Docker Engine: {version}, {whose}")
    return client


def stop() -> None:
    """Stops the engine that `ensure` started, whichever checkout it did so from, and no other."""
    try:
        pid = int(PIDFILE.read_text())
    except (OSError, ValueError):
        say("Docker Engine: none of ours runs")
        return
    if not _ours(pid):
        say("Docker Engine: ours has ended already")
        return
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 60
    while _ours(pid) and time.monotonic() < end:
        time.sleep(0.2)
    if _ours(pid):
        raise Missing(
            f"cannot stop the Docker Engine: PID {pid} is still there after 60 s",
            hint=f"look at it: ls -l /proc/{pid}/fd",
        )
    say("Docker Engine: stopped")
