"""The versioned JSON documents that commands print and the daemon sends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mic_supervisor.plan import render
from mic_supervisor.plan.status import InstanceStatus, by_model, gpu_rows, status_json

if TYPE_CHECKING:
    from mic_supervisor.converge.events import Event
    from mic_supervisor.converge.snapshot import Snapshot
    from mic_supervisor.model import DesiredState, ObservedState
    from mic_supervisor.plan.actions import Change
    from mic_supervisor.plan.memory import Paused
    from mic_supervisor.plan.selection import Selection

EXIT_ALL_FAILED = 1
EXIT_SOME_FAILED = 3


def exit_code(rows: Iterable[InstanceStatus]) -> int:
    """Of an apply: 0 all is as desired, 3 some is and some is not, 1 nothing is."""
    good = [one.settled_well for row in rows for one in by_model(row)]
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


def row_json(row: InstanceStatus, indices: Mapping[str, int]) -> dict[str, Any]:
    """One entry of `instances`, in every document that has them."""
    return status_json(row, indices) | {"as_desired": row.settled_well}


def apply_document(
    snapshot: Snapshot,
    errors: Mapping[str, Event],
    host: str,
    targets: Selection | None = None,
    left_out: Iterable[Change] = (),
) -> dict[str, Any]:
    """What `apply --json` prints. `errors` holds the last failure of each instance.

    Of `targets`, where there are any, it tells alone, and what was left out for them.
    """
    rows = [*snapshot.statuses]
    if targets is not None:
        rows = targets.rows(snapshot.desired, rows)
        chosen = {row.id for row in rows} | {change.instance for change in snapshot.plan.changes}
        errors = {name: event for name, event in errors.items() if name in chosen}
    indices = {gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus}
    config_hash = snapshot.desired.config_hash
    return {
        "version": 1,
        "host": host,
        "config_hash": config_hash,
        "exit_code": exit_code(rows),
        "instances": [row_json(row, indices) for row in in_gpu_order(rows, indices)],
        "left_out": render.left_out_json(left_out),
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
    paused: Paused,
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
        "instances": [row_json(row, indices) for row in in_gpu_order(statuses, indices)],
        "gpus": gpu_rows(desired, observed),
        "paused": paused_json(paused, indices),
        "unreadable": unreadable,
        "warnings": list(warnings),
    }


def paused_json(paused: Paused, indices: Mapping[str, int]) -> list[dict[str, Any]]:
    """Models first, then GPUs; `index` is null for a GPU that is not there."""
    models: list[dict[str, Any]] = [
        {"model": name, "gpu": None, "since": pause.since, "reason": pause.reason}
        for name, pause in sorted(paused.models.items())
    ]
    return models + [
        {
            "model": None,
            "gpu": {"uuid": uuid, "index": indices.get(uuid)},
            "since": pause.since,
            "reason": pause.reason,
        }
        for uuid, pause in sorted(
            paused.gpus.items(), key=lambda item: (indices.get(item[0], 1 << 16), item[0])
        )
    ]
