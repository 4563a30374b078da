"""Who converges a scope at the moment, without touching its lock."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LockHolder:
    """What the holder of a scope's lock wrote into it. `since` is seconds since the epoch."""

    pid: int
    command: str
    user: str
    since: float


def lock_holder(path: Path, locks: Path = Path("/proc/locks")) -> LockHolder | None:
    """The holder of the lock at `path`; None: nobody, or it cannot be told.

    What stands in the file may be of one that was killed: the kernel's own list (proc(5),
    /proc/locks) says whether it still holds the lock.
    """
    try:
        inode = path.stat().st_ino
        holder = json.loads(path.read_text())
        found = LockHolder(
            int(holder["pid"]),
            str(holder["command"]),
            str(holder["user"]),
            float(holder["since"]),
        )
        text = locks.read_text()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for line in text.splitlines():
        # "12: FLOCK  ADVISORY  WRITE 4121 fd:01:131 0 EOF"; "->" marks one that waits.
        fields = line.split()
        if len(fields) < 6 or fields[1] != "FLOCK" or not fields[5].endswith(f":{inode}"):
            continue
        # A PID of another PID namespace is 0 or -1 here.
        if int(fields[4]) in (found.pid, 0, -1):
            return found
    return None
