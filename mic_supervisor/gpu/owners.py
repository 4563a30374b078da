"""Whose a process on a GPU is: one of our instances, a foreign container or unit, or nobody's.

A process tells by its control group (cgroups(7)). Docker, Podman and the Kubernetes runtimes put
a container's id, 64 hex digits, into the name of its group; systemd puts the unit's name there.
What is in no group of ours tells by its ancestors, and last by its environment. That may be set by
anybody, so it is believed where all users of the process could be ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mic_supervisor.host import processes
from mic_supervisor.model import GpuInventory, GpuProcess, Owner, OwnerKind, RunState, RuntimeView

INSTANCE_VARIABLE = "MIC_INSTANCE"
SCOPE_VARIABLE = "MIC_SCOPE"

# "3f…e9", "docker-3f…e9.scope", "cri-containerd-3f…e9.scope", "kubepods-…:cri-containerd:3f…e9"
_CONTAINER = re.compile(r"(?:^|[-:])([0-9a-f]{64})(?:\.scope)?$")
_LXC = re.compile(r"^lxc\.payload\.(.+)$")
_UNIT = re.compile(r"\.(?:service|scope)$")
_ENDED = (RunState.CREATED, RunState.EXITED)
_ESCAPES = re.compile(r"(?:\\x[0-9a-fA-F]{2})+")


def owner_ref(cgroup_text: str) -> tuple[OwnerKind, str | None]:
    """What the text of /proc/PID/cgroup says, version 1 and 2.

    (CONTAINER, id), (UNIT, name without systemd's \\xNN escapes) or (ORPHAN, None). Of containers
    in containers it is the outermost, the one that this machine's engine knows.
    """
    containers, units = _refs(cgroup_text)
    if containers:
        return OwnerKind.CONTAINER, containers[0]
    if units:
        return OwnerKind.UNIT, units[-1]
    return OwnerKind.ORPHAN, None


def annotate(inventory: GpuInventory, managed: Mapping[str, str]) -> GpuInventory:
    """The inventory with `owner` filled in for every process on every GPU.

    `managed` maps to instance ids; `managed_refs` makes it. Its keys are container ids, unit names,
    "pid:<pid>:<start_time>", the root of a process tree, and "env:<scope>:<instance>", with a
    ":<uid>" where its processes may have that user besides root and this one. A process is in a
    tree if the root is one of its ancestors, or, its ancestors being gone, if MIC_SCOPE and
    MIC_INSTANCE in its environment say so. What cannot be read is UNKNOWN; a process that no
    longer exists is ORPHAN without a start time.
    """
    known: dict[tuple[int, int | None], Owner] = {}
    owners = Owners(managed)

    def owned(process: GpuProcess) -> GpuProcess:
        key = process.pid, process.start_time
        if key not in known:
            known[key] = owners.of(process)
        return replace(process, owner=known[key])

    return replace(
        inventory,
        gpus=tuple(
            gpu
            if gpu.processes is None
            else replace(gpu, processes=tuple(owned(process) for process in gpu.processes))
            for gpu in inventory.gpus
        ),
    )


def managed_refs(views: Iterable[RuntimeView]) -> dict[str, str]:
    """What `annotate` wants to know of our workloads.

    Containers and units go by their `ref` in whatever state they are: what still runs in the group
    of an ended unit is ours too. A process tree goes by its root and its keeper while they run, and
    only without a keeper by what its runtime puts into the environment of the whole tree.
    """
    refs = {}
    for view in views:
        for workload in view.workloads:
            instance = workload.identity.instance
            refs[workload.ref] = instance
            if view.runtime != "subprocess" or workload.state in _ENDED:
                continue
            kept = False
            for pid in (workload.pid, workload.keeper):
                if pid is not None and (stat := processes.readable(pid)):
                    refs[_process_ref(stat)] = instance
                    kept = pid == workload.keeper
            if not kept:
                refs[_environment_ref(workload.identity.scope, instance)] = instance
                user: Any = (workload.identity.spec or {}).get("user")
                if (uid := processes.user_id(user)) is not None:
                    refs[_environment_ref(workload.identity.scope, instance, uid)] = instance
    return refs


def _process_ref(stat: processes.Stat) -> str:
    return f"pid:{stat.pid}:{stat.start_time}"


def _claimed_by(pid: int) -> str:
    """The "env:" reference of what a process says of itself, "" where it says nothing.

    A container is a PID namespace of its own, and most are root's: its environment is foreign.
    """
    try:
        here = processes.pid_namespace(pid) == processes.pid_namespace()
    except OSError:
        here = False
    users = processes.user_ids(pid)
    variables = processes.environ(pid)
    if not here or not users or not variables:
        return ""
    scope, instance = variables.get(SCOPE_VARIABLE, ""), variables.get(INSTANCE_VARIABLE, "")
    return _environment_ref(scope, instance, *sorted(users - {0, os.geteuid()}))


def _environment_ref(scope: str, instance: str, *users: int) -> str:
    return ":".join(("env", scope, instance, *map(str, users)))


class Owners:
    """What is ours, in a form that can be looked up. `managed` is as for `annotate`."""

    def __init__(self, managed: Mapping[str, str]) -> None:
        self._managed = managed
        self._groups = {_unescape(ref): ref for ref in managed}
        self._has_trees = any(ref.startswith(("pid:", "env:")) for ref in managed)

    def of(self, process: GpuProcess) -> Owner:
        try:
            text = processes.cgroup(process.pid)
            now = processes.stat(process.pid)
        except OSError:
            return Owner(OwnerKind.UNKNOWN)
        if text is None or now is None:
            # Where /proc is mounted with hidepid, another user's process looks as if it were gone.
            hidden = processes.exists(process.pid)
            return Owner(OwnerKind.UNKNOWN if hidden else OwnerKind.ORPHAN)
        if now.start_time != process.start_time:
            return Owner(OwnerKind.UNKNOWN)  # the PID went to somebody else since the look
        owner = self.of_group(text)
        tree = None
        if self._has_trees and owner.kind is not OwnerKind.MANAGED:
            tree = self._tree(process.pid)
        return tree or owner

    def of_group(self, text: str) -> Owner:
        """Whose the processes are that have this in /proc/PID/cgroup, as far as that tells."""
        containers, units = _refs(text)
        for ref in (*containers, *reversed(units)):
            if ours := self._groups.get(ref):
                return self._owned_by(ours)
        return Owner(*owner_ref(text))

    def _tree(self, pid: int) -> Owner | None:
        """The instance whose process tree it belongs to."""
        for stat in processes.lineage(pid):
            if (ref := _process_ref(stat)) in self._managed:
                return self._owned_by(ref)
        ref = _claimed_by(pid)
        return self._owned_by(ref) if ref in self._managed else None

    def _owned_by(self, ref: str) -> Owner:
        return Owner(OwnerKind.MANAGED, ref, self._managed[ref])


def _refs(cgroup_text: str) -> tuple[list[str], list[str]]:
    """Container ids, outermost first, and the units outside of them, innermost last."""
    lines = [line.split(":", 2) for line in cgroup_text.split("\n")]
    fields = [(line[0], line[1], line[2]) for line in lines if len(line) == 3]
    # With version 1 each controller has a tree of its own, and only systemd's is sure to hold
    # every process; version 2 has one tree and is line 0.
    fields.sort(key=lambda line: (line[1] != "name=systemd", line[0] != "0"))
    containers: list[str] = []
    units: list[str] = []
    for _, _, path in fields:
        inside: list[str] = []
        around: list[str] = []
        for component in path.removesuffix(" (deleted)").split("/"):
            if found := _CONTAINER.search(component) or _LXC.match(component):
                inside.append(found[1])
            # A unit inside a container is not the unit of that name out here.
            elif not inside and _UNIT.search(component):
                # systemd puts "_" before a name that the kernel could take for a file of its own.
                around.append(_unescape(component.removeprefix("_")))
        if not containers:
            containers = inside
        if not units:
            units = around
    return containers, units


def _unescape(name: str) -> str:
    """`\\xNN` is how systemd writes bytes that a unit's name cannot hold, see systemd.unit(5)."""
    return _ESCAPES.sub(
        lambda m: bytes.fromhex(m[0].replace("\\x", "")).decode(errors="replace"), name
    )
