"""Xid errors, as the driver reports them.

An Xid is the driver's number for what went wrong on a GPU: an application's fault for most, the
hardware's for some. Numbers and their meaning: NVIDIA's "Xid Errors" catalogue. Since driver 565
the driver itself says what a GPU needs to recover (field 230), and its word counts for more than
the number.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, replace
from enum import StrEnum
from typing import Any

from mic_supervisor.gpu import GpuSource
from mic_supervisor.gpu.driver import binding_error
from mic_supervisor.model import GpuInventory

FIRST_RETRY = 1.0  # seconds
LAST_RETRY = 60.0
WAIT_MS = 500  # of one EventSetWait: how long the others may have to wait until we have left
_PARTIAL = 60.0  # seconds until GPUs that could not be registered are tried again

_TIMEOUT = 10  # NVML_ERROR_TIMEOUT
_XID = 0x8  # nvmlEventTypeXidCriticalError
RECOVERY_ACTION = 230  # NVML_FI_DEV_GET_GPU_RECOVERY_ACTION

# 94 is a contained memory error: the application has to be restarted, the GPU is well.
_APP = frozenset({13, 31, 43, 45, 68, 94, 109})
_CRITICAL = frozenset({48, 62, 64, 74, 79, 95, 119, 120})


class XidSeverity(StrEnum):
    APP = "app"  # the program on the GPU did it, or has to be restarted
    CRITICAL = "critical"  # the GPU itself is in trouble
    OTHER = "other"


class RecoveryAction(StrEnum):
    """What the driver says the GPU needs; nvmlDeviceGpuRecoveryAction_t of nvml.h."""

    NONE = "none"
    RESET = "reset"
    REBOOT = "reboot"
    DRAIN_P2P = "drain_p2p"
    DRAIN_AND_RESET = "drain_and_reset"
    RECOVER_IMEX_DOMAIN = "recover_imex_domain"
    BUS_RESET = "bus_reset"
    SYSTEM_REBOOT = "system_reboot"


_ACTIONS = dict(enumerate(RecoveryAction))


@dataclass(frozen=True, slots=True)
class XidEvent:
    """One Xid. `uuid` None: the driver would not say which GPU; `action` None: it does not know."""

    uuid: str | None
    xid: int
    at: float
    severity: XidSeverity
    action: RecoveryAction | None = None


@dataclass(frozen=True, slots=True)
class XidRecord:
    """How often one GPU reported one Xid since the program started; the rest is of the last."""

    uuid: str | None
    xid: int
    count: int
    last_at: float
    severity: XidSeverity
    action: RecoveryAction | None


def severity(xid: int) -> XidSeverity:
    if xid in _APP:
        return XidSeverity.APP
    return XidSeverity.CRITICAL if xid in _CRITICAL else XidSeverity.OTHER


def counted(records: tuple[XidRecord, ...], event: XidEvent) -> tuple[XidRecord, ...]:
    """The records with one more event in them, by GPU and number."""
    key = event.uuid, event.xid
    before = next((one.count for one in records if (one.uuid, one.xid) == key), 0)
    others = [one for one in records if (one.uuid, one.xid) != key]
    fresh = XidRecord(event.uuid, event.xid, before + 1, event.at, event.severity, event.action)
    return tuple(sorted([*others, fresh], key=lambda one: (one.uuid or "", one.xid)))


@dataclass(frozen=True)
class XidWatcher:
    """Follows the Xid events of every GPU that an open source knows. For one thread.

    It is inside NVML only while the source is (see NvmlUsers), and holds an nvmlInit of its own
    there. What the library refuses is tried again after a second, then less and less often, up to a
    minute; a GPU that cannot be registered leaves the others followed.
    """

    nvml_users: NvmlUsers
    _: KW_ONLY
    clock: Callable[[], float] = time.time
    retry: float = FIRST_RETRY
    partial: float = _PARTIAL

    def events(self, stop: threading.Event) -> Iterator[XidEvent]:
        """Each Xid as it comes, until `stop` is set. Never raises for what the library does."""
        try:
            import pynvml
        except ImportError:
            return
        if binding_error(pynvml) is not None:  # the source says so
            return
        delay = self.retry
        while not stop.is_set():
            if not self.nvml_users.enter(WAIT_MS / 1000):
                continue
            try:
                for event in self._follow(pynvml, stop):
                    delay = self.retry
                    if event is not None:
                        yield event
                continue  # sent away, told to stop, or GPUs were left to be tried again
            except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, UnicodeDecodeError):
                pass  # the source tells of a library that is broken; here it is only tried again
            finally:
                self.nvml_users.leave()
            stop.wait(delay)
            delay = min(LAST_RETRY, delay * 2)

    def _follow(self, nvml: Any, stop: threading.Event) -> Iterator[XidEvent | None]:
        """None whenever the library answered that nothing has happened."""
        nvml.nvmlInit()
        try:
            events = nvml.nvmlEventSetCreate()
            try:
                known, complete = _register(nvml, events)
                until = None if complete else time.monotonic() + self.partial
                while self.nvml_users.may_stay and not stop.is_set():
                    if until is not None and time.monotonic() >= until:
                        return
                    if not known:
                        stop.wait(WAIT_MS / 1000)
                        continue
                    try:
                        data = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
                    except nvml.NVMLError as error:
                        if error.value != _TIMEOUT:
                            raise
                        yield None
                        continue
                    if data.eventType & _XID:
                        yield self._event(nvml, known, data)
            finally:
                with suppress(nvml.NVMLError):
                    nvml.nvmlEventSetFree(events)
        finally:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _event(self, nvml: Any, known: dict[int, tuple[str, Any]], data: Any) -> XidEvent:
        at, number = self.clock(), int(data.eventData)
        # A GPU that fell off the bus answers no question any more, nor who it is.
        uuid, handle = known.get(_address(data.device), (None, data.device))
        if uuid is None:
            with suppress(nvml.NVMLError):
                uuid = nvml.nvmlDeviceGetUUID(handle)
        return XidEvent(uuid, number, at, severity(number), _recovery_action(nvml, handle))


def watcher_of(source: GpuSource, clock: Callable[[], float] = time.time) -> XidWatcher | None:
    """The watcher that goes with a source; None: GPUs of this source report no Xids."""
    nvml_users = getattr(source, "nvml_users", None)
    return XidWatcher(nvml_users, clock=clock) if isinstance(nvml_users, NvmlUsers) else None


def _register(nvml: Any, events: Any) -> tuple[dict[int, tuple[str, Any]], bool]:
    """The GPUs that the set follows, by the address of their handles, and whether those are all.

    Two handles of one GPU compare unequal in the binding, their addresses do not.
    """
    known: dict[int, tuple[str, Any]] = {}
    complete = True
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
            nvml.nvmlDeviceRegisterEvents(handle, _XID, events)
        except nvml.NVMLError:
            complete = False
            continue
        known[_address(handle)] = uuid, handle
    return known, complete


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _recovery_action(nvml: Any, handle: Any) -> RecoveryAction | None:
    try:
        (value,) = nvml.nvmlDeviceGetFieldValues(handle, [RECOVERY_ACTION])
    except nvml.NVMLError:
        return None
    return recovery_action(value)


def recovery_action(value: Any) -> RecoveryAction | None:
    """What a nvmlFieldValue_t of RECOVERY_ACTION says; None: this driver does not know it."""
    return _ACTIONS.get(int(value.value.uiVal)) if value.nvmlReturn == 0 else None


# --- what speaks against a GPU ------------------------------------------------------------------
#
# The driver's own word counts most: since 565 it says what a GPU needs to recover, and "none" takes
# back whatever an Xid seemed to mean. Where it does not say, a critical Xid counts for
# `XID_COUNTS`: nobody will ever report that the GPU is well again.

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
    trouble = [SAYS[action]] if action not in (None, RecoveryAction.NONE) else []
    return "; ".join([*trouble, *([REMAP_FAILED] if remap_failed else [])]) or None


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
        trouble, last = gpu.trouble, critical.get(gpu.parent or gpu.uuid)
        if last is not None and trouble is not None:
            trouble = f"Xid {last.xid}; {trouble}"
        elif last is not None and gpu.recovery_action is None and now - last.last_at < XID_COUNTS:
            trouble = f"Xid {last.xid}; the driver does not say what it needs"
        gpus.append(gpu if trouble == gpu.trouble else replace(gpu, trouble=trouble))
    return replace(inventory, gpus=tuple(gpus))


# --- who else is inside NVML --------------------------------------------------------------------
#
# NVML counts its users, and enumerates GPUs only when the first one initialises it. Whoever stays
# inside keeps a GPU that came back from being found.


class NvmlUsers:
    """The door of the library. Its host lets in and sends away; a user enters and leaves.

    A user inside has an nvmlInit of its own, so that nothing breaks if it does not leave in time:
    the host's new initialisation merely finds no other GPUs than the old one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._inside = 0

    def admit(self) -> None:
        """The library is initialised: come in."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def send_away(self, timeout: float) -> bool:
        """Whether everyone has left within `timeout` seconds. Nobody enters until `admit`."""
        with self._changed:
            self._open = False
            return self._changed.wait_for(lambda: not self._inside, timeout)

    def enter(self, timeout: float) -> bool:
        """Wait at the door for at most `timeout` seconds; who enters must `leave`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._open, timeout):
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @property
    def may_stay(self) -> bool:
        """False: leave at the next occasion."""
        return self._open
