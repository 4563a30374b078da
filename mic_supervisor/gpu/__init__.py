"""Sources of GPU facts."""

from __future__ import annotations

from typing import Protocol

from mic_supervisor.model import GpuInventory


class GpuSource(Protocol):
    """Where the inventory comes from."""

    def observe(self) -> GpuInventory:
        """One look at every GPU. Never raises: what cannot be read is None or stands in `error`."""
        ...

    def close(self) -> None:
        """Release the driver library. Idempotent."""
        ...
