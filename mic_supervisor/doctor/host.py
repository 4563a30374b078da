"""Ports and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from mic_supervisor.config.settings import Address, PortRange
from mic_supervisor.doctor import Finding, fail, ok, warn
from mic_supervisor.host import programs
from mic_supervisor.host.lock import lock_holder
from mic_supervisor.model import Listener

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_PORTS_PER_GPU = 6  # three for an instance and three for its successor
_PLAUSIBLE = 1735689600.0  # 2025-01-01, before this program was written
_PATIENCE = 5.0  # seconds
_WRITTEN = ("memory.json", "history.jsonl")


def ports(
    within: PortRange,
    listeners: Callable[[], tuple[Listener, ...] | None],
    gpus: int,
    *,
    ephemeral: Path = _EPHEMERAL,
    reserved: Path = _RESERVED,
) -> Iterator[Finding]:
    found = listeners()
    if found is None:
        yield fail("ports", "which ports are taken cannot be read", "check that /proc is mounted")
        return
    taken = {item.port for item in found if within.first <= item.port <= within.last}
    total = within.last - within.first + 1
    free = total - len(taken)
    text = f"{free} of {total} free in {within.first}-{within.last}"
    if free < _PORTS_PER_GPU * gpus:
        yield warn(
            "ports",
            f"{text}, and {gpus} GPUs may need {_PORTS_PER_GPU * gpus}",
            "widen MIC_PORT_RANGE",
        )
    else:
        yield ok("ports", text)
    yield from _outgoing(within, ephemeral, reserved)


def listen(
    address: Address, lock_path: Path, owner: Callable[[int], Listener | None]
) -> Iterator[Finding]:
    """Whether the daemon can answer where it is told to."""
    found = owner(address.port)
    holder = lock_holder(lock_path)
    if found is None:
        yield ok("http", f"{address} is free")
    elif holder is not None and found.pid == holder.pid:
        yield ok("http", f"the daemon answers at {address}")
    else:
        who = "somebody" if found.pid is None else f"PID {found.pid} ({found.name or '?'})"
        yield fail("http", f"{who} listens at port {address.port}", "change MIC_LISTEN")
    if not address.is_loopback:
        yield warn("http", f"{address} can be reached from elsewhere", "see MIC_HTTP_TOKEN_FILE")


def _outgoing(within: PortRange, ephemeral: Path, reserved: Path) -> Iterator[Finding]:
    try:
        first, last = map(int, ephemeral.read_text().split())
        kept = _numbers(reserved.read_text())
    except (OSError, ValueError):
        return
    shared = range(max(first, within.first), min(last, within.last) + 1)
    if any(port not in kept for port in shared):
        yield warn(
            "ports",
            f"the kernel gives ports of {within.first}-{within.last} to outgoing connections "
            f"({first}-{last})",
            "sysctl net.ipv4.ip_local_reserved_ports="
            f"{within.first}-{within.last}, or change MIC_PORT_RANGE",
        )


def _numbers(text: str) -> Collection[int]:
    """ "8080,9000-9010" as a set."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def clock(state: Path, *, systemd: bool, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Times that are remembered decide when something is tried again."""
    at = now()
    if at < _PLAUSIBLE:
        yield fail("clock", "it says a year before 2025", "set it, and enable NTP")
        return
    newest = max((_mtime(state / name) for name in _WRITTEN), default=0.0)
    if newest > at + 60:
        yield warn(
            "clock",
            f"it went back: {state} was written {newest - at:.0f} s in the future",
            "enable NTP",
        )
        return
    if systemd and _synchronized() == "no":
        yield warn("clock", "it is not synchronised", "timedatectl set-ntp true")
        return
    yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at)))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _synchronized() -> str:
    command = ("timedatectl", "show", "--property=NTPSynchronized", "--value")
    try:
        done = programs.run(command, _PATIENCE, apart=True)
    except OSError:
        return "unknown"
    return done.output.decode(errors="replace").strip()
