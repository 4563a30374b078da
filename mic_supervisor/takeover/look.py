"""Looks for what could be taken over: containers first, then host processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil

from mic_supervisor.errors import MicError, RuntimeRefused
from mic_supervisor.host.processes import listener_owners
from mic_supervisor.host.processes import processes as every_process
from mic_supervisor.kill import Survey
from mic_supervisor.model import OwnerKind
from mic_supervisor.takeover import Proposal, containers, distinct, processes

if TYPE_CHECKING:
    from mic_supervisor.runtimes.docker.engine import Engine


def running(look: Survey, engine: Engine | None) -> tuple[list[Proposal], list[str]]:
    """The proposals, each with a name of its own, and what stands in the way of knowing more.

    `engine` None: there is no Docker here. Raises MicError when the GPUs cannot be read.
    """
    if look.inventory.error is not None:
        raise MicError(look.inventory.error, hint=look.inventory.hint)
    warnings: list[str] = []
    found: list[Proposal] = []
    if engine is not None:
        try:
            found += _containers(look, engine)
        except MicError as error:
            warnings.append(f"containers are left out: {error.message}")
    found += _processes(look, warnings)
    return distinct(found), warnings


def _containers(look: Survey, engine: Engine) -> list[Proposal]:
    what = "cannot look for containers"
    info = engine.call(what, lambda api: api.info())
    default = info.get("DefaultRuntime")
    known = {gpu.uuid: gpu.index for gpu in look.inventory.gpus}
    found = []
    for listed in sorted(engine.call(what, lambda api: api.containers()), key=_name):
        try:
            inspected = _inspect(engine, str(listed["Id"]))
            wanted = containers.wanted_gpus(inspected, default)
            held = _held(look, str(listed["Id"]))
            if not containers.is_candidate(inspected) or not (wanted or held):
                continue
            image = _image(engine, str(inspected.get("Image")))
        except RuntimeRefused:
            continue  # it has ended meanwhile
        wanted = wanted or [str(index) for index in held]
        found.append(containers.propose(inspected, image, wanted, known, held))
    return found


def _name(listed: Any) -> str:
    return str((listed.get("Names") or [listed.get("Id")])[0])


def _inspect(engine: Engine, ref: str) -> dict[str, Any]:
    found: dict[str, Any] = engine.call(
        f"cannot inspect container {ref[:12]}",
        lambda api: api.inspect_container(ref),
    )
    return found


def _image(engine: Engine, ref: str) -> dict[str, Any] | None:
    try:
        return engine.image(f"cannot inspect image {ref}", ref)
    except RuntimeRefused:
        return None


def _held(look: Survey, container: str) -> list[int]:
    return [
        gpu.index
        for gpu in look.inventory.gpus
        if any(
            process.owner is not None
            and process.owner.kind is OwnerKind.CONTAINER
            and process.owner.ref == container
            for process in gpu.processes or ()
        )
    ]


def _processes(look: Survey, warnings: list[str]) -> list[Proposal]:
    known = every_process()
    roots: dict[int, list[int]] = {}
    for pid in sorted({*look.pids(OwnerKind.ORPHAN), *look.pids(OwnerKind.UNIT)}):
        target = look.target(pid)
        if target is None:
            continue
        if target.instance is not None:
            warnings.append(
                f"PID {pid} is left out: it belongs to instance {target.instance} "
                f"of scope {target.scope}"
            )
            continue
        roots.setdefault(processes.root_of(pid, known), []).append(pid)
    for pid in look.pids(OwnerKind.UNKNOWN):
        warnings.append(f"PID {pid} is left out: whose it is cannot be read")
    if not roots:
        return []
    ports = {port: one.pid for port, one in listener_owners().items() if one.pid is not None}
    found = []
    for root, holders in sorted(roots.items()):
        target = look.target(holders[0])
        indices = sorted({hold.index for pid in holders for hold in _holds(look, pid)})
        if target is None:
            continue
        try:
            proposal = processes.propose(root, holders, indices, target.owner, ports)
        except psutil.NoSuchProcess:
            continue  # it has ended meanwhile
        except (OSError, psutil.AccessDenied):
            warnings.append(f"PID {root} is left out: it may be looked at by root alone")
            continue
        if proposal is not None:
            found.append(proposal)
    return found


def _holds(look: Survey, pid: int) -> Any:
    target = look.target(pid)
    return () if target is None else target.holds
