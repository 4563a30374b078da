"""Whom the servers of CUDA's Multi-Process Service (MPS) on a GPU work for.

The first client of a control daemon makes it start a server, which holds the GPU from then on: it
stays there when the client has ended. Its control group is the daemon's, so it looks foreign where
an operator started the daemon. Daemon and clients meet in one directory, which CUDA takes from
CUDA_MPS_PIPE_DIRECTORY, and where the daemon leaves its PID. A server that is a child of the daemon
in an instance's directory serves that instance.
Source: NVIDIA, "Multi-Process Service", chapters on its architecture and environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mic_supervisor.backends.common import on_host
from mic_supervisor.host import processes
from mic_supervisor.host.files import read_in_time
from mic_supervisor.model import (
    ContainerSpec,
    Gpu,
    GpuInventory,
    GpuProcess,
    Instance,
    Owner,
    OwnerKind,
)
from mic_supervisor.plan.launch import listed, text_of

_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
_DIRECTORY = "/tmp/nvidia-mps"  # where CUDA looks without the variable
_PID_FILE = "nvidia-cuda-mps-control.pid"
_NAME = "nvidia-cuda-mps"  # of daemon and server: the kernel keeps 15 characters


def with_servers(inventory: GpuInventory, instances: Mapping[str, Instance]) -> GpuInventory:
    """The inventory with the instance that each foreign MPS server serves on each GPU.

    `instances` are keyed by the UUIDs of their GPUs. What such a server is otherwise, a unit or a
    container of the operator's, stays. It stays foreign where a client on the GPU is foreign, too.
    """
    indices = inventory.indices

    def with_its_servers(gpu: Gpu) -> Gpu:
        instance = instances.get(gpu.uuid)
        rows = gpu.processes or ()
        if instance is None or any(_is_foreign_client(row) for row in rows):
            return gpu
        servers = [row for row in rows if row.name == _NAME and row.instance != instance.id]
        daemon = _daemon(instance, listed(instance.gpus, indices)) if servers else None
        if daemon is None:
            return gpu
        serving = {row.pid for row in servers if _is_child(row, *daemon)}
        return replace(
            gpu,
            processes=tuple(
                replace(row, owner=replace(row.owner or _UNKNOWN, instance=instance.id))
                if row.pid in serving
                else row
                for row in rows
            ),
        )

    return replace(inventory, gpus=tuple(map(with_its_servers, inventory.gpus)))


_UNKNOWN = Owner(OwnerKind.UNKNOWN)


def _is_foreign_client(process: GpuProcess) -> bool:
    there = process.start_time is not None
    return there and "mps" in process.kinds and process.instance is None


def _daemon(instance: Instance, indices: str) -> tuple[int, frozenset[int]] | None:
    """The PID that the daemon in the instance's directory has noted, and whose it may be.

    The daemon lets anybody write that file, so who it names must be of a user that could be ours.
    """
    directory = _directory(instance, indices)
    if directory is None:
        return None
    try:
        pid = int(read_in_time(directory / _PID_FILE))
    except (OSError, ValueError):
        return None
    user = processes.user_id(instance.workload.user)
    return pid, frozenset({0, os.geteuid()} | ({user} if user is not None else set()))


def _directory(instance: Instance, indices: str) -> Path | None:
    """Where the instance's processes look for the daemon, as a path of this host.

    None where that is inside of a container.
    """
    workload = instance.workload
    value = {**dict(workload.file_env), **dict(workload.env)}.get(_VARIABLE, _DIRECTORY)
    try:
        path = PurePosixPath(text_of(workload, value, {}, indices))
    except KeyError:  # a port: it was not chosen yet
        return None
    if not isinstance(workload, ContainerSpec):
        return Path(path)
    return on_host(path, workload.mounts)


def _is_child(server: GpuProcess, daemon: int, users: frozenset[int]) -> bool:
    found = processes.readable(server.pid)
    if found is None or found.start_time != server.start_time:
        return False
    parent = processes.readable(found.ppid)
    if parent is None or parent.name != _NAME:
        return False
    whose = processes.user_ids(parent.pid)
    # A daemon in a container notes the number that it has in there.
    return bool(whose) and whose <= users and daemon in processes.numbers(parent.pid)
