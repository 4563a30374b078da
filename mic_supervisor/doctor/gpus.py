"""The GPUs and their driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mic_supervisor.doctor import Finding, fail, ok, warn
from mic_supervisor.gpu.modes import GpuModes
from mic_supervisor.model import GpuInventory


def gpus(
    look: Callable[[], GpuInventory], modes: Callable[[], tuple[GpuModes, ...]]
) -> Iterator[Finding]:
    inventory = look()
    if inventory.source == "none":
        yield warn(
            "gpus", "switched off by MIC_GPU_SOURCE=none: every entry is blocked", "unset it"
        )
        return
    if inventory.error is not None:
        yield fail("gpus", inventory.error, inventory.hint)
        return
    count = len(inventory.gpus)
    if inventory.source == "simulated":
        yield ok("gpus", f"{count} simulated by MIC_GPU_SOURCE")
        return
    if not count and not inventory.unopened:
        yield fail("gpus", "the driver counts none", "look for them with: lspci -d 10de:")
        return
    names = sorted({gpu.name for gpu in inventory.gpus})
    driver = f", driver {inventory.driver}" if inventory.driver else ""
    yield ok("gpus", f"{count} of them ({', '.join(names)}){driver}")
    for lost in inventory.unopened:
        yield fail(f"gpu {lost.index}", lost.error, lost.hint)
    for gpu in inventory.gpus:
        if gpu.trouble is not None:
            yield fail(
                f"gpu {gpu.index}",
                f"is unhealthy: {gpu.trouble}; nothing is started on it",
                f"stop what uses it, then: nvidia-smi --gpu-reset -i {gpu.index}; or reboot",
            )
        if gpu.processes is None:
            yield warn(
                f"gpu {gpu.index}",
                "its holders cannot be read, so nothing is started on it",
                "check it with: nvidia-smi",
            )
    yield from _modes(modes())


def _modes(found: tuple[GpuModes, ...]) -> Iterator[Finding]:
    if asleep := [item.index for item in found if item.persistence is False]:
        yield warn(
            "persistence mode",
            f"is off on GPU {_list(asleep)}: each start wakes the driver first, for seconds",
            "switch it on with: systemctl enable --now nvidia-persistenced",
        )
    elif any(item.persistence for item in found):
        yield ok("persistence mode", "is on")
    if split := [item.index for item in found if item.mig]:
        yield warn(
            "mig",
            f"is on for GPU {_list(split)}: instances get whole GPUs, and utilization is unknown",
            f"switch it off with: nvidia-smi -i {_list(split).replace(' ', '')} -mig 0",
        )


def _list(indices: Iterable[int]) -> str:
    return ", ".join(map(str, indices))
