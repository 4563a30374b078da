"""Run in the place of the daemon, confined as mic.service is: prints what it may and may not do.

One line of JSON: the name of each attempt, and what came of it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mic_supervisor.errors import MicError
from mic_supervisor.host import processes as procfs
from mic_supervisor.host import programs
from mic_supervisor.model import Identity, Launch, ProcessSpec
from mic_supervisor.runtimes import checks
from mic_supervisor.runtimes.systemd.runtime import SystemdRuntime

IDENTITY = Identity("confined", "h", "a", "MAM", "process", ("GPU-1",), {}, {}, "0")
PROGRAM = "/home/alice/bin/serve"  # 0700, in a home that is 0700
SPEC = ProcessSpec((PROGRAM, "300"), user="alice", working_dir="/home/alice")


def attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (OSError, MicError) as error:
        return getattr(error, "strerror", None) or str(error)


def write(path: str) -> str:
    Path(path).write_text("x")
    return "written"


def unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        return client.recv(10).decode()


def listen() -> str:
    with socket.create_server(("127.0.0.1", 6004)) as server:
        ports = {one.port for one in procfs.listeners() or ()}
        return f"6004 is {'seen' if 6004 in ports else 'not seen'} of {server.getsockname()[1]}"


def whose() -> bool:
    """Whether the kernel says in which control group a socket was made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        return any(one.port == port and one.group is not None for one in procfs.listening_groups())


def home() -> str:
    """What a credential helper has for a HOME, which systemd sets for no service of root."""
    done = programs.run(["sh", "-c", 'echo "$HOME"'], 10.0)
    return f"{os.environ.get('HOME')}, then {done.output.decode().strip()}"


def give_socket() -> int:
    path = Path("/run/mic/mic.sock")
    with socket.socket(socket.AF_UNIX) as server:
        path.unlink(missing_ok=True)
        server.bind(str(path))
        os.chown(path, -1, 4242)
        return path.stat().st_gid


def packet() -> str:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW):
        return "opened"


def device() -> str:
    os.mknod("/run/mic/device", 0o20600, os.makedev(1, 8))
    return "made"


def unit() -> list[Any]:
    runtime = SystemdRuntime("confined", "h")
    launch = Launch("mic-confined-a-0", "systemd", IDENTITY, SPEC)
    runtime.prepare(launch, lambda text: None)
    runtime.start(launch)
    [seen] = runtime.observe().workloads
    group = Path(f"/proc/{seen.pid}/cgroup").read_text()
    checked = runtime.run_check(seen, ("id", "-un"), 10)
    end = time.monotonic() + 10
    while not (lines := [*runtime.logs(seen)]) and time.monotonic() < end:
        time.sleep(0.1)
    runtime.stop(seen, signal="SIGTERM", grace=30)
    [ended] = runtime.observe().workloads
    runtime.remove(ended)
    return [
        seen.state.value,
        f"mic.slice/{seen.ref}" in group,
        [*checked],
        lines,
        ended.exit_code,
        len(runtime.observe().workloads),
    ]


ATTEMPTS: dict[str, Callable[[], Any]] = {
    "read a secret in a home": lambda: Path("/home/alice/secret.env").read_text(),
    "read in /tmp": lambda: Path("/tmp/template.txt").read_text(),
    "write the state": lambda: write("/var/lib/mic/x"),
    "write the runtime directory": lambda: write("/run/mic/x"),
    "write in /etc": lambda: write("/etc/x"),
    "write in /usr": lambda: write("/usr/x"),
    "write in a home": lambda: write("/home/alice/x"),
    "reach a socket like Docker's": lambda: unix("/run/docker-like.sock"),
    "listen": listen,
    "ask whose a socket is": whose,
    "have a home": home,
    "give the socket to its group": give_socket,
    "see PID 1": lambda: procfs.service_of(Path("/proc/1/cgroup").read_text()),
    "name PID 1": lambda: (procfs.stat(1) or sys.exit("no PID 1")).name,
    "check a program of another user": lambda: checks.preflight(SPEC),
    "become another user": lambda: os.setuid(1000),
    "open a raw socket": packet,
    "make a device": device,
    "kill another's process": lambda: os.kill(int(os.environ["VICTIM"]), 9),
    "set the time": lambda: time.clock_settime(time.CLOCK_REALTIME, 0),
    "mount": lambda: subprocess.run(["mount", "-t", "tmpfs", "x", "/mnt"], check=False).returncode,
    "run a unit": unit,
}


if __name__ == "__main__":
    print(json.dumps({name: attempt(work) for name, work in ATTEMPTS.items()}))
