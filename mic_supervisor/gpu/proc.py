"""What /proc says about one process. A PID alone does not identify one: start times do.

Format: proc(5), /proc/PID/stat.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    pid: int
    name: str  # at most 15 bytes; a process may change it
    parent: int
    start_time: int  # clock ticks since boot


def boot_time(proc: Path = PROC) -> float | None:
    """When the machine was booted, in seconds since the epoch: `btime` of /proc/stat."""
    try:
        text = (proc / "stat").read_text()
    except OSError:
        return None
    found = re.search(r"^btime (\d+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


def started_at(stat: ProcessStat, booted: float | None) -> float | None:
    """When the process was started, in seconds since the epoch."""
    return None if booted is None else booted + stat.start_time / os.sysconf("SC_CLK_TCK")


def read_stat(pid: int, proc: Path = PROC) -> ProcessStat | None:
    """The process with this PID, or None: it is gone, or it may not be read."""
    try:
        text = (proc / str(pid) / "stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    # The name stands in parentheses and may itself hold parentheses and blanks.
    start, end = text.find("("), text.rfind(")")
    fields = text[end + 1 :].split()
    if start < 0 or end < start or len(fields) < 20:
        return None
    return ProcessStat(pid, text[start + 1 : end], int(fields[1]), int(fields[19]))


def exists(pid: int) -> bool:
    """Whether there is such a process, also where /proc hides it (mount option hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
