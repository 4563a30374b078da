"""One sentence about everything, for `systemctl status`."""

from __future__ import annotations

from mic_supervisor.http.published import Published
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.words import clock, gpu_names

_SHOWN = 3


def sentence(published: Published) -> str:
    """ "7/8 ready; GPU 3 backoff until 12:04:10; config generation 5" """
    snapshot, config = published.snapshot, published.config
    if snapshot is None:
        return "looking at the machine"
    indices = {gpu.uuid: gpu.index for gpu in snapshot.observed.inventory.gpus}
    rows = snapshot.statuses
    parts = [f"{sum(row.settled_well for row in rows)}/{len(rows)} ready"]
    troubled = [row for row in rows if not row.settled_well]
    for row in troubled[:_SHOWN]:
        until = f" until {clock(row.next_retry)}" if row.next_retry is not None else ""
        why = f": {row.reason}" if row.phase is Phase.BLOCKED and row.reason else ""
        parts.append(f"{gpu_names(row.gpus, indices)} {row.phase.value}{until}{why}")
    if len(troubled) > _SHOWN:
        parts.append(f"{len(troubled) - _SHOWN} more")
    parts += [
        f"{view.runtime} cannot be read"
        for view in snapshot.observed.runtimes
        if view.error is not None
    ]
    if config.generation == 0:
        parts.append("no configuration yet")
    else:
        parts.append(f"config generation {config.generation}")
    if config.error is not None:
        first = next((line for line in config.error.splitlines() if line.strip()), "")
        parts.append(f"the file has errors and is not used: {first}")
    if config.unconfirmed is not None:
        parts.append(f"the file is not used yet: {config.unconfirmed}")
    return "; ".join(parts)
