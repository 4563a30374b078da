"""What the driver says, in our terms: return codes, slices, neighbours, and what decides nothing.

Codes: nvmlReturn_t in nvml.h of NVIDIA's driver.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from importlib.metadata import packages_distributions
from typing import Any

from mic_supervisor.model import Gpu, GpuTelemetry, Near
from mic_supervisor.text import one_line, quoted

UNINITIALIZED = 1
NOT_SUPPORTED = 3
NO_PERMISSION = 4
INSUFFICIENT_SIZE = 7
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
LIB_RM_VERSION_MISMATCH = 18
ARGUMENT_VERSION_MISMATCH = 25
GPU_NOT_FOUND = 28
UNKNOWN = 999

MISSING = frozenset({NOT_SUPPORTED, FUNCTION_NOT_FOUND})
GONE = frozenset({GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND})
REINITIALISE = frozenset(
    {UNINITIALIZED, DRIVER_NOT_LOADED, GPU_IS_LOST, LIB_RM_VERSION_MISMATCH, GPU_NOT_FOUND}
)


def binding_error(module: Any) -> tuple[str, str] | None:
    """Why the module `pynvml` is not that of nvidia-ml-py, and what to do; None where it is.

    The package pynvml brought one of its own until version 11.5, a directory, which is imported
    instead of nvidia-ml-py's file where both are installed.
    """
    if not hasattr(module, "__path__") and hasattr(module, "NVMLLibraryMismatchError"):
        return None
    where = module.__file__ or "an unknown place"
    others = [name for name in _distributions() if name != "nvidia-ml-py"]
    pip = f"{sys.executable} -m pip"
    if not others:
        return (
            f"the Python module pynvml in {where} is not that of nvidia-ml-py",
            f"remove it, or upgrade it with: {pip} install --upgrade nvidia-ml-py; then restart "
            "this program",
        )
    return (
        f"the Python module pynvml in {where} is not that of nvidia-ml-py, but of the package "
        f"{', '.join(others)}",
        f"remove that with: {pip} uninstall {' '.join(others)}; then: {pip} install "
        "--force-reinstall nvidia-ml-py, and restart this program",
    )


@cache
def _distributions() -> tuple[str, ...]:
    """The installed packages that bring the module, by name."""
    return tuple(sorted(set(packages_distributions().get("pynvml", ()))))


def library_error(code: int, text: str, *, was_open: bool) -> tuple[str, str]:
    """Why NVML as a whole does not answer, and what to do about it."""
    if code == LIBRARY_NOT_FOUND:
        return (
            "libnvidia-ml.so.1 was not found or cannot be loaded",
            "install the NVIDIA driver, or set MIC_GPU_SOURCE=simulated:N to go without GPUs",
        )
    if code == DRIVER_NOT_LOADED:
        return "the NVIDIA kernel module is not loaded", "load it with: modprobe nvidia"
    if code == LIB_RM_VERSION_MISMATCH and was_open:
        return (
            "the NVIDIA driver was replaced while this program ran",
            "restart it with: systemctl restart mic",
        )
    if code == LIB_RM_VERSION_MISMATCH:
        return (
            "the NVIDIA driver library and the loaded kernel module differ in version",
            "load the installed module (stop what uses the GPUs, then rmmod nvidia_uvm nvidia and "
            "modprobe nvidia), or reboot",
        )
    if code == NO_PERMISSION:
        return "no permission to open the NVIDIA devices", "run it as root"
    if code == UNKNOWN:
        return (
            "NVML answers Unknown Error (999), as it does where the device cgroup denies "
            "/dev/nvidiactl",
            "allow the NVIDIA devices to the unit (DeviceAllow=char-nvidiactl rw, char-nvidia rw, "
            "char-nvidia-uvm rw); in a container, recreate it",
        )
    return f"NVML says: {quoted(text)} ({code})", "check the driver with: nvidia-smi"


def gpu_error(what: str, code: int, text: str = "") -> tuple[str, str]:
    """Why one GPU does not answer, and what to do about it."""
    if code == RESET_REQUIRED:
        hint = "reset it with: nvidia-smi --gpu-reset -i ID"
        return f"cannot {what}: the GPU needs a reset", hint
    if code in GONE:
        hint = "find the cause with: dmesg | grep -i xid, then reboot"
        return f"cannot {what}: the GPU fell off the bus", hint
    if code == NO_PERMISSION:
        return f"cannot {what}: no permission", "check the mode of its /dev/nvidia device"
    return f"cannot {what}: NVML says: {quoted(text)} ({code})", "check it with: nvidia-smi"


_LAST_PID = 1 << 22  # PID_MAX_LIMIT of Linux, include/linux/threads.h


def plausible(row: Any, total: int | None) -> bool:
    """Whether a row of a list of processes can be true; `total` is the card's memory in bytes.

    A process of another PID namespace has PID 0 here, which names nobody.
    """
    fits = total is None or row.usedGpuMemory is None or row.usedGpuMemory <= total
    return 0 < row.pid <= _LAST_PID and fits


# --- MIG: Multi-Instance GPU parts one in several ---------------------------------------------


def read_slices(
    nvml: Any,
    handle: Any,
    gpu: Gpu,
    get: Callable[..., Any],
    held: Callable[[Any], dict[str, Any]],
) -> list[Gpu]:
    """The GPU, and after it its MIG slices, each a device to CUDA. `handle` is the GPU's.

    Nothing here makes one: they come and go while NVML is open, so each look asks for them anew. A
    slice has a UUID, a name, memory and processes; its power and utilization stay unknown.
    Source: NVIDIA, "NVML API Reference" on Multi Instance GPU Management, "MIG User Guide".

    `get(function, *arguments)` calls it, and answers None where there is nothing to know;
    `held(handle)` reads memory and processes of a slice. The driver lists the processes of all
    slices for their GPU, too; each stays with its slice only, which it holds.
    """
    if not gpu.mig:
        return [gpu]
    slices = []
    for number in range(get(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        # A number without a slice is no end: those that were made later follow.
        one = get(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        uuid = None if one is None else get(nvml.nvmlDeviceGetUUID, one)
        if uuid is None:
            continue
        name = get(nvml.nvmlDeviceGetName, one)
        slices.append(
            Gpu(
                uuid=uuid,
                index=gpu.index,
                name=one_line(name or f"{gpu.name} MIG", 96),
                parent=gpu.uuid,
                trouble=gpu.trouble,
                recovery_action=gpu.recovery_action,
                near=gpu.near,
                **held(one),
            )
        )
    if gpu.processes is not None:
        on_slices = {process.pid for one in slices for process in one.processes or ()}
        rest = tuple(process for process in gpu.processes if process.pid not in on_slices)
        gpu = replace(gpu, processes=rest)
    return [gpu, *slices]


# --- what is next to a GPU ----------------------------------------------------------------------

_CPU_WORDS = 64  # of 64 bits: more CPUs than Linux can have on most machines, 4096
_NODE_WORDS = 16  # MAX_NUMNODES of Linux is 1024 at most


def read_near(nvml: Any, handle: Any, get: Callable[..., Any]) -> Near | None:
    """Which CPUs and which memory are next to a GPU; it never changes while a machine is up.

    None: this GPU or this driver does not say. `get` makes what is not supported None.
    Source: nvml.h, nvmlDeviceGetCpuAffinityWithinScope and nvmlDeviceGetMemoryAffinity; the scope
    is the NUMA node. A socket can have several.
    """
    if not hasattr(nvml, "nvmlDeviceGetCpuAffinityWithinScope"):  # a binding from before 2020
        return None
    scope = nvml.NVML_AFFINITY_SCOPE_NODE
    cpus = get(nvml.nvmlDeviceGetCpuAffinityWithinScope, handle, _CPU_WORDS, scope)
    nodes = get(nvml.nvmlDeviceGetMemoryAffinity, handle, _NODE_WORDS, scope)
    found = _numbers(cpus or ())
    return Near(found, _numbers(nodes or ())) if found else None


def _numbers(words: Iterable[int]) -> tuple[int, ...]:
    """The bits that are set, of words of 64 with the lowest first."""
    return tuple(
        64 * number + bit
        for number, word in enumerate(words)
        for bit in range(64)
        if word >> bit & 1
    )


# --- what decides nothing -----------------------------------------------------------------------


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


def read_telemetry(nvml: Any, handle: Any, get: Callable[..., Any]) -> GpuTelemetry:
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


def temperature(nvml: Any, handle: Any, get: Callable[..., Any]) -> float | None:
    """Degrees Celsius; `get` is as for `read_telemetry`."""
    value = None
    if hasattr(nvml, "nvmlDeviceGetTemperatureV"):  # nvidia-ml-py 12.570 brought it
        value = get(nvml.nvmlDeviceGetTemperatureV, handle, nvml.NVML_TEMPERATURE_GPU)
    if value is None:
        value = get(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    return None if value is None else float(value)


def cuda_version(number: int | None) -> str | None:
    """ "12.9" of 12090, as cuDriverGetVersion counts."""
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"
