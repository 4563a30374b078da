"""Which source of GPU facts a setting names."""

from __future__ import annotations

from typing import Literal

from mic_supervisor.gpu import GpuSource


def open_source(kind: Literal["nvml", "simulated", "none"], count: int = 0) -> GpuSource:
    """The source called `kind`; `count` is for "simulated" only. Touches no driver yet."""
    if kind == "simulated":
        from mic_supervisor.gpu.simulated import SimulatedSource

        return SimulatedSource(count)
    if kind == "none":
        from mic_supervisor.gpu.none import NoSource

        return NoSource()
    from mic_supervisor.gpu.nvml import NvmlSource

    return NvmlSource()
