"""This machine: who it is, its processes, the lock of a scope, and helpers run to their end."""

from __future__ import annotations

import hashlib
import socket
import uuid
from pathlib import Path


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
