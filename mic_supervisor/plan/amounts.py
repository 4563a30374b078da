"""Memory of GPUs, as far as more than one decision is about it."""

from __future__ import annotations

from mic_supervisor.model import GpuProcess, OwnerKind

SLACK = 512 << 20  # bytes; what is less is not worth a word


def size(count: int) -> str:
    """ "3.1 GiB", "512 MiB"."""
    if count < 1 << 30:
        return f"{-(-count // (1 << 20))} MiB"
    return f"{count / (1 << 30):.1f} GiB"


def lets_go(process: GpuProcess) -> bool:
    """Whether it has ended, and the driver still has to notice."""
    owner = process.owner
    return process.start_time is None and owner is not None and owner.kind is OwnerKind.ORPHAN
