"""A short memory of what the GPUs measured, for the sparklines of the page."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mic_supervisor.model import GpuInventory

KEPT = 90
SPACING = 9.0  # seconds between two samples at least: 90 of them are a quarter of an hour or more


@dataclass(frozen=True, slots=True)
class Sample:
    """`memory` is a ratio, `power` is in watts; None was unknown then."""

    at: float  # steady
    memory: float | None
    power: float | None


class Samples:
    """The last samples of each GPU that is there now. A GPU that was away leaves a gap."""

    def __init__(self) -> None:
        self._of: dict[str, deque[Sample]] = {}
        self._last = float("-inf")

    def add(self, at: float, inventory: GpuInventory) -> None:
        if at - self._last < SPACING:
            return
        self._last = at
        found = {gpu.uuid: gpu for gpu in inventory.gpus}
        for uuid in found:
            self._of.setdefault(uuid, deque(maxlen=KEPT))
        for uuid, ring in [*self._of.items()]:
            gpu = found.get(uuid)
            memory = gpu.memory if gpu is not None else None
            used = None
            if memory is not None and memory.used is not None and memory.total:
                used = memory.used / memory.total
            ring.append(Sample(at, used, gpu.power_draw if gpu is not None else None))
            if all(sample.memory is None and sample.power is None for sample in ring):
                del self._of[uuid]

    def of(self, uuid: str) -> tuple[Sample, ...]:
        """Oldest first; empty for a GPU that nothing was measured of."""
        return tuple(self._of.get(uuid, ()))
