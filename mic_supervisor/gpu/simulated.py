"""GPUs that do not exist: for laptops, demos and tests."""

from __future__ import annotations

from mic_supervisor.model import Gpu, GpuInventory, GpuMemory

TOTAL = 24 * 1024**3


class SimulatedSource:
    """`count` GPUs that are the same every time: no used memory, no holders, nothing measured.

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
