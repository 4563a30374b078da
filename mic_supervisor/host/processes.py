"""Who runs on this machine: what psutil does not tell of a process, or not for certain.

A process is identified by its PID *and* its start time (field 22 of /proc/PID/stat, clock ticks
since boot, see proc(5)): PIDs are used again. A zombie still has both, but runs no more. The rest
of that line says who it is in the same moment. What psutil does otherwise, and what that costs,
stands in docs/architecture.md, "Choices that need a reason".

All paths are below `psutil.PROCFS_PATH`.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import signal
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil

from mic_supervisor.host import systemd_is_pid1
from mic_supervisor.model import Listener


class Stat(NamedTuple):
    """What /proc/PID/stat says of one process. `start_time` is in clock ticks since boot."""

    pid: int
    name: str  # at most 15 bytes; a process may change it
    state: str  # one letter: R, S, D, T, Z …
    ppid: int
    session: int
    start_time: int
    threads: int = 1

    @property
    def running(self) -> bool:
        """False for a zombie: it holds nothing but its exit status.

        A process whose first thread has ended looks like one, but for the number of its threads.
        """
        return self.state not in "ZXx" or self.threads > 1


def _read(pid: int | str, name: str) -> bytes | None:
    """A whole file of a process; None when that is gone. Other failures raise OSError."""
    try:
        with open(f"{psutil.PROCFS_PATH}/{pid}/{name}", "rb", buffering=0) as file:  # noqa: PTH123
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None


def stat(pid: int) -> Stat | None:
    """None when there is no such process. Other failures to read raise OSError."""
    # The name is whatever the program likes, brackets and spaces included.
    head, _, tail = (_read(pid, "stat") or b"").rpartition(b")")
    fields = tail.split()
    if not head or len(fields) < 20:
        return None
    return Stat(
        pid,
        head.partition(b"(")[2].decode(errors="replace"),
        state=fields[0].decode(),
        ppid=int(fields[1]),
        session=int(fields[3]),
        start_time=int(fields[19]),
        threads=int(fields[17]),
    )


def readable(pid: int) -> Stat | None:
    """As `stat`; None also where it may not be read."""
    try:
        return stat(pid)
    except OSError:
        return None


def is_running(pid: int, started: int) -> bool:
    """Whether the process that `pid` and `started` name still runs (a zombie does not)."""
    found = stat(pid)
    return found is not None and found.start_time == started and found.running


def exists(pid: int) -> bool:
    """Whether there is such a process, also where /proc hides it (mount option hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def processes() -> dict[int, Stat]:
    """Every process of this PID namespace, zombies included, by PID."""
    return {pid: one for pid in psutil.pids() if (one := stat(pid)) is not None}


def descendants(roots: Iterable[int], known: Mapping[int, Stat] | None = None) -> list[int]:
    """The PIDs below `roots`, parents before children, without the roots themselves."""
    children = defaultdict(list)
    for one in (processes() if known is None else known).values():
        children[one.ppid].append(one.pid)
    tops = set(roots)
    found = [*tops]
    for parent in found:  # which grows
        found += [pid for pid in children.pop(parent, ()) if pid not in tops]
    return found[len(tops) :]


def lineage(pid: int) -> Iterator[Stat]:
    """The process, its parent, and so on, as far as they can be read."""
    seen = set()
    while pid > 0 and pid not in seen and (one := readable(pid)) is not None:
        yield one
        seen.add(pid)
        pid = one.ppid


def ancestors(pid: int) -> set[int]:
    """PIDs of its parent and of those above, as far as they can be read."""
    return {one.ppid for one in lineage(pid)} - {0}


def environ(pid: int) -> dict[str, str] | None:
    """The environment that `pid` was started with; None when it is gone or may not be read."""
    text = _environ(pid)
    if text is None:
        return None
    return dict(os.fsdecode(item).split("=", 1) for item in text.split(b"\0") if b"=" in item)


def _environ(pid: int) -> bytes | None:
    try:
        return _read(pid, "environ")
    except PermissionError:
        return None


def with_environ(name: str, values: Collection[str]) -> dict[int, str]:
    """PID -> value, for every running process whose environment gives `name` one of `values`.

    Processes whose environment may not be read are left out: they are not known to be ours.
    """
    prefix = f"{name}=".encode()
    likely = [pid for pid in psutil.pids() if prefix in (_environ(pid) or b"")]
    found = ((pid, (environ(pid) or {}).get(name)) for pid in likely)
    return {pid: value for pid, value in found if value is not None and value in values}


def command_line(pid: int) -> list[str]:
    """The arguments it was started with; empty when it is gone, or is a zombie."""
    text = _read(pid, "cmdline")
    # A process may write another one over it, without the last NUL.
    return [os.fsdecode(item) for item in text.removesuffix(b"\0").split(b"\0")] if text else []


def user_ids(pid: int) -> set[int]:
    """The real, effective and saved user of `pid`; empty when it is gone or may not be read.

    All three: a set-user-ID program has the environment that whoever started it has made.
    """
    try:
        return set(psutil.Process(pid).uids())
    except psutil.Error:
        return set()


def numbers(pid: int) -> set[int]:
    """The PIDs of a process, here and in the namespaces inside; empty where it is gone."""
    try:
        lines = (_read(pid, "status") or b"").split(b"\n")
    except OSError:
        return set()
    found = next((line for line in lines if line.startswith(b"NSpid:")), b"")
    return {int(one) for one in found.split()[1:]}


def user_id(user: str | None) -> int | None:
    """The number of "name", "name:group" or "1000"; None when there is no such user."""
    name = (user or "").partition(":")[0]
    try:
        return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid if name else None
    except KeyError:
        return None


def send_signal(pid: int, started: int, number: int) -> bool:
    """Signal exactly the process that `pid` and `started` name; False when it no longer runs.

    The pidfd is opened before the start time is read, so that a PID that is used again in between
    is never hit. Raises PermissionError when the process may not be signalled.
    """
    try:
        handle = os.pidfd_open(pid)
    except PermissionError:
        raise
    except OSError:  # ESRCH; EINVAL or ENOENT where the number is a thread's by now
        return False
    try:
        if not is_running(pid, started):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def pid_namespace(pid: int | str = "self") -> str:
    """ "pid:[4026531836]": PIDs can be compared only within one. Raises OSError."""
    return os.readlink(f"{psutil.PROCFS_PATH}/{pid}/ns/pid")  # noqa: PTH115 - a magic link


def cgroup(pid: int | str) -> str | None:
    """The text of /proc/PID/cgroup; None when there is no such process. Else raises OSError."""
    text = _read(pid, "cgroup")
    return None if text is None else text.decode(errors="replace")


def in_group(part: str) -> int | None:
    """The PID of some process that runs and has this in its control groups, as a container's id."""
    for pid in psutil.pids():
        with suppress(OSError):
            if part in (cgroup(pid) or "") and (one := stat(pid)) is not None and one.running:
                return pid
    return None


def service_of(cgroup: str) -> str | None:
    """The systemd service that a process with this /proc/PID/cgroup is in, or None.

    Only the last part counts: a session scope below `user@1000.service` is not in a service.
    """
    for line in cgroup.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" or controllers == "name=systemd":
            leaf = path.rpartition("/")[2]
            if leaf.endswith(".service"):
                return leaf
    return None


def enclosing_service() -> str | None:
    """The systemd service that this very process belongs to, None outside of one.

    INVOCATION_ID alone proves nothing: terminals inherit it from the user's manager.
    """
    if "INVOCATION_ID" not in os.environ or not systemd_is_pid1():
        return None
    try:
        return service_of(cgroup("self") or "")
    except OSError:
        return None


# --- listening TCP sockets --------------------------------------------------------------------


def listeners(of: int | None = None) -> tuple[Listener, ...] | None:
    """The ports that something listens on, IPv4 and IPv6, sorted: of this network namespace, or of
    the one that the process `of` is in.

    Without the owners, see `listener_owners`: that takes a walk through every open file. None when
    the tables cannot be read: then nothing may be concluded.
    """
    found: dict[int, set[str]] = {}
    try:
        for name in ("tcp", "tcp6"):
            table = Path(psutil.PROCFS_PATH, "" if of is None else str(of), "net", name)
            if name == "tcp6" and not table.exists():
                continue  # a kernel without IPv6
            with table.open("rb", buffering=4096) as lines:
                next(lines)
                for line in lines:
                    _, local, _, state, _ = line.split(None, 4)
                    # The listening ones come first (net/ipv4/tcp_ipv4.c, tcp_get_idx); after
                    # them, there may be ten thousands of connections.
                    if state != b"0A":
                        break
                    address, _, port = local.rpartition(b":")
                    found.setdefault(int(port, 16), set()).add(_address(address))
    except (OSError, ValueError, StopIteration):
        return None
    return tuple(Listener(port, addresses=frozenset(found[port])) for port in sorted(found))


def _address(digits: bytes) -> str:
    """What the tables have of an address: words of 32 bits, each in this machine's byte order."""
    data = bytes.fromhex(digits.decode())
    words = [data[at : at + 4] for at in range(0, len(data), 4)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    packed = b"".join(words)
    return str(ipaddress.ip_address(packed))


def listener_owners() -> dict[int, Listener]:
    """Who listens, by port, as far as it can be told.

    `pid` is None when the owner may not be looked at, or is in another PID namespace, and `name` is
    then that of its service or container, where its control group tells.
    """
    found: dict[int, Listener] = {}
    for one in listening_processes():
        if one.port not in found or found[one.port].pid is None:
            found[one.port] = replace(one, addresses=frozenset())
    if any(one.pid is None for one in found.values()):
        for one in listening_groups():
            if one.group and (known := found.get(one.port)) is not None and known.pid is None:
                leaf = one.group.rpartition("/")[2]
                found[one.port] = replace(known, name=leaf or None, group=one.group)
    return found


def listening_processes() -> list[Listener]:
    """Each listening socket with the process that has it, as far as it may be looked at.

    That takes the rights to read another's /proc/PID/fd, which root without CAP_SYS_PTRACE lacks.
    """
    try:
        connections = psutil.net_connections("tcp")
    except (OSError, RuntimeError, psutil.Error):  # RuntimeError: a table that psutil cannot parse
        return []
    found = []
    for one in connections:
        if one.status == psutil.CONN_LISTEN and one.laddr:
            owner = readable(one.pid) if one.pid is not None else None
            name = owner.name if owner is not None else None
            found.append(Listener(one.laddr.port, one.pid, name, frozenset({one.laddr.ip})))
    return found


# linux/sock_diag.h, linux/inet_diag.h and linux/netlink.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_LISTENING = 1 << 10  # TCP_LISTEN
_CGROUP_ID = 21  # INET_DIAG_CGROUP_ID, since Linux 5.7
_HEADER = struct.Struct("=IHHII")
_DIAG_LENGTH = 72  # struct inet_diag_msg
_CGROUPS = Path("/sys/fs/cgroup")


def listening_groups() -> list[Listener]:
    """Each listening socket with the control group (version 2) it was made in, by sock_diag(7).

    Unlike the process, the kernel tells that to anybody. Empty where it does not tell. A `group` is
    None where it is not below /sys/fs/cgroup, and "" at its top, where there is no version 2.
    """
    found = []
    try:
        groups = _groups()
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in _diagnosed(family):
                (port,) = struct.unpack_from(">H", message, 4)
                packed = message[8 : 8 + (4 if family == socket.AF_INET else 16)]
                address = str(ipaddress.ip_address(packed))
                group = groups.get(_group_id(message[_DIAG_LENGTH:]))
                found.append(Listener(port, addresses=frozenset({address}), group=group))
    except (OSError, struct.error):
        return []
    return found


def _diagnosed(family: int) -> Iterator[bytes]:
    """What the kernel says of each listening socket: an inet_diag_msg and its attributes."""
    request = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, _LISTENING)
    length = _HEADER.size + len(request)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(1.0)
        kernel.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0) + request)
        while True:
            answer = kernel.recv(1 << 16)
            while answer:
                length, kind, *_ = _HEADER.unpack_from(answer)
                if kind != _SOCK_DIAG_BY_FAMILY or length < _HEADER.size:  # its end, or an error
                    return
                yield answer[_HEADER.size : length]
                answer = answer[(length + 3) & ~3 :]


def _group_id(attributes: bytes) -> int:
    """0 where there is none: no control group has that number."""
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == _CGROUP_ID:
            return int.from_bytes(attributes[4:length], sys.byteorder)
        attributes = attributes[max((length + 3) & ~3, 4) :]
    return 0


def _groups() -> dict[int, str]:
    """The control groups of version 2 that are seen here, by the kernel's number."""
    # Beside version 1 they are in a directory of their own.
    tops = [top for top in (_CGROUPS, _CGROUPS / "unified") if (top / "cgroup.procs").exists()]
    found = {top.stat().st_ino: "" for top in tops}
    left = [(str(top), "") for top in tops]
    while left:
        directory, path = left.pop()
        with suppress(FileNotFoundError), os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    found[entry.inode()] = f"{path}/{entry.name}"
                    left.append((entry.path, f"{path}/{entry.name}"))
    return found
