"""The first process of a host, in network, mount, UTS and PID namespaces of its own.

`python host.py NAME FILES COMMANDS`: FILES is a folder of the host's own. What is in its folder
`root` is put on the host; `services.json` there says what runs, as a list of `Service`. COMMANDS is
a folder whose programs come first on the PATH. The host has its own /etc, /opt, /var, /root and
/run; what it writes there is gone with it, and what it writes below FILES stays. A service that
ends is started again, as systemd would do it. Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
BIND = 4096 | 16384  # MS_BIND | MS_REC, see mount(2)


@dataclass(frozen=True)
class Service:
    """`needs` is a file without which it is not started, `before` what the shell does each time.

    `tree` is a Debian tree in which it runs, unpacked somewhere on this machine. It has the host's
    /run and FILES, for each path of `binds` the folder that is given for it, and an /etc of its own
    with what is in the folder `etc` of FILES.
    """

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    before: str = ""
    tree: str = ""
    binds: dict[str, str] = field(default_factory=dict)


def mount(source: str, target: str, kind: str, options: str = "", flags: int = 0) -> None:
    if LIBC.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"cannot mount {kind or source} on {target}")


def own(target: str, layers: Path, lower: str = "") -> None:
    """What is written below `target` from now on is the host's own."""
    name = target.strip("/").replace("/", "-")
    upper, work = layers / f"{name}-upper", layers / f"{name}-work"
    upper.mkdir()
    work.mkdir()
    options = f"lowerdir={lower or target},upperdir={upper},workdir={work}"
    mount("overlay", target, "overlay", options)


def set_up(name: str, files: Path) -> Path:
    """The folder of what the host writes, which is in memory."""
    socket.sethostname(name)
    layers = files / "layers"
    layers.mkdir(exist_ok=True)
    mount("tmpfs", str(layers), "tmpfs")
    for target in ("/etc", "/opt", "/var", "/root"):
        own(target, layers)
    mount("tmpfs", "/run", "tmpfs")
    Path("/run/sshd").mkdir(mode=0o755)
    Path("/etc/machine-id").write_text(name.encode().hex().ljust(32, "0") + "\n")
    with Path("/etc/passwd").open("a") as passwd:
        passwd.write("sshd:x:65533:65533::/run/sshd:/usr/sbin/nologin\n")
    # What this machine has of its own is not the host's.
    for path in ("/etc/mic", "/var/lib/mic"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(files / "root", "/", dirs_exist_ok=True)
    return layers


def enter(service: Service, files: Path, layers: Path) -> list[str]:
    """The words before the command of a service that run it in its tree. FILES has the PID of a
    process in there, as NAME.pid.
    """
    root = layers / Path(service.tree).name
    if not root.exists():
        root.mkdir()
        own(str(root), layers, service.tree)
        shared = ("/proc", "/sys", "/dev", "/run", str(files))
        for path, source in (*zip(shared, shared, strict=True), *service.binds.items()):
            inside = Path(f"{root}{path}")
            inside.mkdir(parents=True, exist_ok=True)
            mount(source, str(inside), "", flags=BIND)
        if (files / "etc").is_dir():
            shutil.copytree(files / "etc", root / "etc", dirs_exist_ok=True)
        (files / f"{root.name}.pid").write_text(str(pivot(root)))
    pid = (files / f"{root.name}.pid").read_text()
    return ["nsenter", "--mount", "--target", pid, "--"]


def pivot(root: Path) -> int:
    """The PID of a process in a mount namespace whose root is `root`.

    In a mere chroot, what an engine runs in a container later would start at the host's root.
    """
    script = "cd $0 && pivot_root . . && umount -l . && exec sleep infinity"
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", script, str(root)])
    while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
        time.sleep(0.01)
    return process.pid


class Running:
    """A service, and the process that it has."""

    def __init__(self, service: Service, files: Path, layers: Path, path: str) -> None:
        self._service = service
        self._prefix = enter(service, files, layers) if service.tree else []
        self._env = {"PATH": path, **service.env}
        self._log = files / f"{service.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def tend(self) -> None:
        """Start it where it is to run and does not."""
        if self.process is not None and self.process.poll() is None:
            return
        if self._service.needs and not Path(self._service.needs).exists():
            return
        with self._log.open("ab") as log:
            if self._service.before:
                command = ["sh", "-c", self._service.before]
                subprocess.run(command, env=os.environ | self._env, stdout=log, stderr=log)
            self.process = subprocess.Popen(
                [*self._prefix, *self._service.command],
                env=os.environ | self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def main() -> None:
    name, files, commands = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    layers = set_up(name, files)
    path = f"{commands}:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    listed = json.loads((files / "services.json").read_text())
    services = [Running(Service(**one), files, layers, path) for one in listed]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    while True:
        for service in services:
            service.tend()
        # Whoever lost its parent is ours to reap.
        ours = {service.process.pid for service in services if service.process is not None}
        for _ in range(100):
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid in ours:
                break
            os.waitpid(found.si_pid, 0)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
