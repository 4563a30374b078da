"""The sources of GPU facts that a setting names: the driver, simulated GPUs, or none."""

from __future__ import annotations

from typing import Literal

from mic_supervisor.gpu import GpuSource
from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.model import Gpu, GpuInventory, GpuMemory

TOTAL = 24 * 1024**3


def open_source(kind: Literal["nvml", "simulated", "none"], count: int = 0) -> GpuSource:
    """The source called `kind`; `count` is for "simulated" only. Touches no driver yet."""
    if kind == "simulated":
        return SimulatedSource(count)
    return NoSource() if kind == "none" else NvmlSource()


class NoSource:
    """An inventory that is known to be empty."""

    def observe(self) -> GpuInventory:
        return GpuInventory(source="none")

    def close(self) -> None:
        pass


class SimulatedSource:
    """For laptops, demos and tests: `count` GPUs that are the same every time.

    They have no used memory and no holders, and nothing of them is measured.

    The first eight hex digits of their UUIDs differ, since names of containers and units hold
    no more than those.
    """

    def __init__(self, count: int) -> None:
        if count < 0:
            raise ValueError(f"cannot simulate {count} GPUs")
        self._inventory = GpuInventory(
            source="simulated", gpus=tuple(_gpu(index) for index in range(count))
        )

    def observe(self) -> GpuInventory:
        return self._inventory

    def close(self) -> None:
        pass


def _gpu(index: int) -> Gpu:
    return Gpu(
        uuid=f"GPU-{0x51000000 + index:08x}-0000-4000-8000-{index:012x}",
        index=index,
        name="Simulated GPU",
        pci_bus_id=f"{0x5100 + (index >> 8):08X}:{index & 0xFF:02X}:00.0",
        memory=GpuMemory(total=TOTAL, used=None, free=None),
        processes=(),
        simulated=True,
    )
