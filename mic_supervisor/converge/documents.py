"""The versioned JSON documents that commands print and the daemon sends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mic_supervisor.plan import render
from mic_supervisor.plan.status import InstanceStatus, gpu_rows, status_json

if TYPE_CHECKING:
    from mic_supervisor.converge.events import Event
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.model import DesiredState, ObservedState

EXIT_ALL_FAILED = 1
EXIT_SOME_FAILED = 3


def exit_code(rows: Iterable[InstanceStatus]) -> int:
    """Of an apply: 0 all is as desired, 3 some is and some is not, 1 nothing is."""
    good = [row.settled_well for row in rows]
    if all(good):
        return 0
    return EXIT_SOME_FAILED if any(good) else EXIT_ALL_FAILED


def in_gpu_order(
    rows: Iterable[InstanceStatus], indices: Mapping[str, int]
) -> list[InstanceStatus]:
    """As the driver counts the GPUs; what has none that is there comes last."""
    return sorted(
        rows,
        key=lambda row: (min((indices.get(u, 1 << 16) for u in row.gpus), default=1 << 17), row.id),
    )


def apply_document(snapshot: Snapshot, errors: Mapping[str, Event], host: str) -> dict[str, Any]:
    """What `apply --json` prints. `errors` holds the last failure of each instance."""
    indices = {gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus}
    config_hash = snapshot.desired.config_hash
    return {
        "version": 1,
        "host": host,
        "config_hash": config_hash,
        "exit_code": exit_code(snapshot.statuses),
        "instances": [
            status_json(row, indices) | {"as_desired": row.settled_well}
            for row in in_gpu_order(snapshot.statuses, indices)
        ],
        "failures": [
            {"instance": name, "reason": event.text, "hint": event.hint}
            for name, event in sorted(errors.items())
        ],
        "remaining": render.to_json(snapshot.plan, host=host, config_hash=config_hash),
    }


def status_document(
    *,
    host: str,
    config: Mapping[str, Any],
    desired: DesiredState,
    observed: ObservedState,
    statuses: Iterable[InstanceStatus],
    warnings: Iterable[str] = (),
) -> dict[str, Any]:
    """What `status --json` prints and `/api/v1/status` answers."""
    indices = {gpu.uuid: gpu.index for gpu in observed.inventory.gpus}
    unreadable = [
        f"{view.runtime} cannot be read: {view.error}"
        for view in observed.runtimes
        if view.error is not None
    ]
    if observed.inventory.error is not None:
        unreadable.append(observed.inventory.error)
    return {
        "version": 1,
        "host": host,
        "at": observed.at,
        "config": dict(config),
        "instances": [
            status_json(row, indices) | {"as_desired": row.settled_well}
            for row in in_gpu_order(statuses, indices)
        ],
        "gpus": gpu_rows(desired, observed),
        "unreadable": unreadable,
        "warnings": list(warnings),
    }
