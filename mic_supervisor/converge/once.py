"""Health for commands that run once: every probe one time, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mic_supervisor.converge.probes import Target, look
from mic_supervisor.model import Health
from mic_supervisor.plan.assess import Assessment, is_alive
from mic_supervisor.plan.fallback import as_it_runs
from mic_supervisor.plan.memory import Memory

if TYPE_CHECKING:
    from mic_supervisor.converge.desired import FileDesired
    from mic_supervisor.converge.observe import Sources


def health_of_all(
    assessments: Iterable[Assessment],
    memory: Memory,
    provider: FileDesired,
    sources: Sources,
    indices: Mapping[str, int],
    now: float,
) -> dict[str, Health]:
    """By the workload's ref, of everything that is alive, as desired or not yet.

    `indices` maps UUIDs to the numbers that the driver gives them today.
    """
    targets = {
        item.match.ref: Target(
            instance=item.instance,
            workload=item.match,
            backend=provider.backend(item.instance.backend),
            execute=sources.runtimes[item.match.runtime].run_check,
            indices=",".join(str(indices[u]) for u in item.instance.gpus if u in indices),
        )
        for item in (as_it_runs(memory.of(one.instance.id), one) for one in assessments)
        if item.match is not None and is_alive(item.match)
    }
    if not targets:
        return {}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(targets)) as pool:
        looks = pool.map(lambda target: look(target, now), targets.values())
        return dict(zip(targets, looks, strict=True))
