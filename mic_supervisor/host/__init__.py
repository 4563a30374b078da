"""This machine: who it is, its processes, the lock of a scope, and helpers run to their end."""

from __future__ import annotations

import hashlib
import pwd
import socket
import uuid
from contextlib import suppress
from pathlib import Path

SYSTEMD = Path("/run/systemd/system")  # it is there where systemd is PID 1: sd_booted(3)

_NO_LOGIN = 0xFFFFFFFF  # of a process that no login began: audit's "unset"


def host_id() -> str:
    """A digest of the machine id: stable over reboots, and it does not give the id away.

    A machine without /etc/machine-id is known by its first network card. machine-id(5) asks not to
    expose the id itself.
    """
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    if not machine:
        machine = f"node {uuid.getnode():x}"
    return hashlib.sha256(f"mic-supervisor {machine}".encode()).hexdigest()[:12]


def host_name() -> str:
    return socket.gethostname()


def systemd_is_pid1(marker: Path = SYSTEMD) -> bool:
    return marker.is_dir()


def start_daemon(marker: Path = SYSTEMD) -> str:
    """The command that starts the daemon on this machine."""
    return "systemctl start mic" if systemd_is_pid1(marker) else "mic-supervisor run"


def user_name(uid: int) -> str:
    """May ask a directory service, and so take its time."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def who_asks(uid: int, pid: int) -> str:
    """The user of a process, by name: "alice", "root (logged in as alice)".

    As whom somebody logged in is what the kernel kept of it, over sudo and su. SUDO_USER is not
    asked: anybody may set a variable.
    """
    name, login = user_name(uid), _NO_LOGIN
    with suppress(OSError, ValueError):  # it is gone already, or the kernel keeps none
        login = int(Path(f"/proc/{pid}/loginuid").read_text())
    return name if login in (uid, _NO_LOGIN) else f"{name} (logged in as {user_name(login)})"
