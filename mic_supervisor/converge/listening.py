"""Who listens on a port where one of ours should, and where that one listens instead.

The control group of a socket is told at no cost, and to a supervisor without any rights, but only a
container and a unit have one of their own. Else the processes are looked at that have the sockets.
"""

from __future__ import annotations

from collections.abc import Iterator

from mic_supervisor.gpu.owners import Owners, managed_refs
from mic_supervisor.host import processes
from mic_supervisor.model import (
    ContainerSpec,
    GpuProcess,
    Listener,
    ObservedWorkload,
    Owner,
    OwnerKind,
    RuntimeView,
    Workload,
)
from mic_supervisor.plan.launch import meet
from mic_supervisor.text import printable

_Owned = list[tuple[Listener, Owner]]
_LOOPBACK = ("127.", "::1", "::ffff:127.")


def is_own(workload: ObservedWorkload, spec: Workload, port: int) -> tuple[bool | None, str]:
    """Whether all who listen on the host's port are of the workload, and else, who is not.

    None: that cannot be told.
    """
    if _on_bridge(spec):
        return True, ""  # the engine has the port, and gives it to this container alone
    for sockets in _sockets(workload):
        there = [
            (one, owner)
            for one, owner in sockets
            if one.port == port and any(meet(address, spec.listen) for address in one.addresses)
        ]
        known = [(one, owner) for one, owner in there if owner.kind is not OwnerKind.UNKNOWN]
        for one, owner in known:
            if owner.kind is not OwnerKind.MANAGED:
                return False, _called(one, owner)
        if known and len(known) == len(there):
            return True, ""
    return None, ""


def instead(workload: ObservedWorkload, spec: Workload, port: int) -> str:
    """What else the workload listens on, where nothing answers on this port, and what to write.

    `port` is the one that it should listen on, on a bridge the container's own. Empty where it does
    listen there, or where nothing is known.
    """
    bridge = _on_bridge(spec)
    found = _in_container(workload) if bridge else _of(workload)
    addresses = {at for one in found if one.port == port for at in one.addresses}
    if bridge and addresses and all(at.startswith(_LOOPBACK) for at in addresses):
        return f"; in the container it listens on {min(addresses)} only: let it listen on 0.0.0.0"
    if addresses or not found:
        return ""
    numbers = ", ".join(map(str, sorted({one.port for one in found})))
    key = "container_port" if bridge else "port"
    return (
        f"; it listens on port {numbers}: let it listen on ${{port}}, or write the port that it "
        f"serves on as `{key}`"
    )


def _on_bridge(spec: Workload) -> bool:
    return isinstance(spec, ContainerSpec) and spec.network == "bridge"


def _in_container(workload: ObservedWorkload) -> tuple[Listener, ...]:
    pid = workload.pid or processes.in_group(workload.ref)
    return (processes.listeners(pid) or ()) if pid is not None else ()


def _of(workload: ObservedWorkload) -> tuple[Listener, ...]:
    for sockets in _sockets(workload):
        own = tuple(one for one, owner in sockets if owner.kind is OwnerKind.MANAGED)
        if own:
            return own
    return ()


def _sockets(workload: ObservedWorkload) -> Iterator[_Owned]:
    """All sockets that listen on this machine, with their owners: in two ways, the cheap one
    first.
    """
    owners = Owners(managed_refs([RuntimeView(workload.runtime, (workload,))]))
    if workload.runtime != "subprocess":
        yield [
            (one, owners.of_group(f"0::{one.group}") if one.group else _UNKNOWN)
            for one in processes.listening_groups()
        ]
    yield [(one, _owner(owners, one.pid)) for one in processes.listening_processes()]


_UNKNOWN = Owner(OwnerKind.UNKNOWN)


def _owner(owners: Owners, pid: int | None) -> Owner:
    stat = processes.readable(pid) if pid is not None else None
    if stat is None:
        return _UNKNOWN
    return owners.of(GpuProcess(stat.pid, stat.name, None, stat.start_time))


def _called(listener: Listener, owner: Owner) -> str:
    """ "nginx (PID 4121)", "unit nginx.service", "container c0ffee123456" """
    if listener.pid is not None:
        return f"{printable(listener.name or '?')} (PID {listener.pid})"
    if owner.kind is OwnerKind.CONTAINER:
        return f"container {(owner.ref or '?')[:12]}"
    return f"unit {owner.ref}" if owner.kind is OwnerKind.UNIT else f"who is in {listener.group}"
