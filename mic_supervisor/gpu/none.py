"""No GPUs by choice: MIC_GPU_SOURCE=none."""

from __future__ import annotations

from mic_supervisor.model import GpuInventory


class NoSource:
    """An inventory that is known to be empty."""

    def observe(self) -> GpuInventory:
        return GpuInventory(source="none")

    def close(self) -> None:
        pass
