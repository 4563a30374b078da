"""What NVML says that decides nothing: energy, clocks, what holds them back, errors, modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mic_supervisor.model import GpuTelemetry

# nvmlClockType_t and nvmlMemoryErrorType_t of nvml.h, by their number there.
_CLOCKS = ("graphics", "sm", "memory", "video")
_ERRORS = ("corrected", "uncorrected")
_SINCE_DRIVER_LOAD = 0  # NVML_VOLATILE_ECC

# nvmlClocksEventReason* of nvml.h.
_REASONS = (
    ("gpu_idle", 0x1),
    ("applications_clocks_setting", 0x2),
    ("sw_power_cap", 0x4),
    ("hw_slowdown", 0x8),
    ("sync_boost", 0x10),
    ("sw_thermal_slowdown", 0x20),
    ("hw_thermal_slowdown", 0x40),
    ("hw_power_brake_slowdown", 0x80),
    ("display_clock_setting", 0x100),
)

_MEGA = 1e6


def read(nvml: Any, handle: Any, get: Callable[..., Any]) -> GpuTelemetry:
    """`get(function, *arguments)` calls it, and answers None where this GPU does not know."""
    energy = get(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    clocks = [
        (name, get(nvml.nvmlDeviceGetClockInfo, handle, number))
        for number, name in enumerate(_CLOCKS)
    ]
    # Drivers before 535 know the reasons by their former name only.
    reasons = get(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if reasons is None:
        reasons = get(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    errors = [
        (name, get(nvml.nvmlDeviceGetTotalEccErrors, handle, number, _SINCE_DRIVER_LOAD))
        for number, name in enumerate(_ERRORS)
    ]
    return GpuTelemetry(
        energy=None if energy is None else energy / 1000,
        clocks=tuple((name, value * _MEGA) for name, value in clocks if value is not None),
        clock_events=()
        if reasons is None
        else tuple((name, bool(reasons & bit)) for name, bit in _REASONS),
        ecc_errors=tuple((name, int(value)) for name, value in errors if value is not None),
    )


def cuda_version(number: int | None) -> str | None:
    """ "12.9" of 12090, as cuDriverGetVersion counts."""
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


@dataclass(frozen=True, slots=True)
class GpuModes:
    """None: this GPU does not have the mode, or does not tell."""

    index: int
    persistence: bool | None
    mig: bool | None


def read_modes() -> tuple[GpuModes, ...]:
    """The modes of every GPU that can be opened; empty where NVML does not answer."""
    import pynvml

    found = []
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):
        return ()
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                persistence = _ask(pynvml, pynvml.nvmlDeviceGetPersistenceMode, handle)
                mig = _ask(pynvml, pynvml.nvmlDeviceGetMigMode, handle)
                found.append(
                    GpuModes(
                        index,
                        None if persistence is None else bool(persistence),
                        None if mig is None else bool(mig[0]),
                    )
                )
    except pynvml.NVMLError:
        return ()
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return tuple(found)


def _ask(nvml: Any, function: Callable[[Any], Any], handle: Any) -> Any:
    try:
        return function(handle)
    except nvml.NVMLError:
        return None
