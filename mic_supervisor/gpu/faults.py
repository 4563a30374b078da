"""What speaks against a GPU, made of what the driver says now and of the Xids that it reported.

The driver's own word counts most: since 565 it says what a GPU needs to recover, and "none" takes
back whatever an Xid seemed to mean. Where it does not say, a critical Xid counts for `XID_COUNTS`:
nobody will ever report that the GPU is well again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mic_supervisor.gpu.events import RecoveryAction, XidRecord, XidSeverity
from mic_supervisor.model import GpuInventory

XID_COUNTS = 600.0  # seconds

SAYS = {
    RecoveryAction.NONE: "the driver asks for nothing",
    RecoveryAction.RESET: "the driver asks for a reset of the GPU",
    RecoveryAction.REBOOT: "the driver asks for a reboot",
    RecoveryAction.DRAIN_P2P: "the driver asks for its peers to be drained",
    RecoveryAction.DRAIN_AND_RESET: "the driver asks for it to be drained and reset",
    RecoveryAction.RECOVER_IMEX_DOMAIN: "the driver asks for its IMEX domain to be recovered",
    RecoveryAction.BUS_RESET: "the driver asks for a reset of its bus",
    RecoveryAction.SYSTEM_REBOOT: "the driver asks for a reboot of the whole system",
}
REMAP_FAILED = "a row of its memory could not be replaced, and the card is to be"


def trouble_of(action: RecoveryAction | None, remap_failed: bool) -> str | None:
    """What the driver itself says against a GPU; None: nothing."""
    said = [SAYS[action]] if action not in (None, RecoveryAction.NONE) else []
    return "; ".join([*said, *([REMAP_FAILED] if remap_failed else [])]) or None


def with_xids(inventory: GpuInventory, records: Iterable[XidRecord], now: float) -> GpuInventory:
    """The inventory with the critical Xids of each GPU in its `trouble`."""
    critical: dict[str, XidRecord] = {}
    for record in records:
        if record.uuid is None or record.severity is not XidSeverity.CRITICAL:
            continue
        known = critical.get(record.uuid)
        if known is None or record.last_at >= known.last_at:
            critical[record.uuid] = record
    if not critical:
        return inventory
    gpus = []
    for gpu in inventory.gpus:
        said, last = gpu.trouble, critical.get(gpu.uuid)
        if last is not None and said is not None:
            said = f"Xid {last.xid}; {said}"
        elif last is not None and gpu.recovery_action is None and now - last.last_at < XID_COUNTS:
            said = f"Xid {last.xid}; the driver does not say what it needs"
        gpus.append(gpu if said == gpu.trouble else replace(gpu, trouble=said))
    return replace(inventory, gpus=tuple(gpus))
