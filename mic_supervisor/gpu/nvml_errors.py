"""NVML's return codes, and what each means for the person who has to mend it.

Codes: nvmlReturn_t in nvml.h of NVIDIA's driver.
"""

from __future__ import annotations

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
    return f"NVML says: {text} ({code})", "check the driver with: nvidia-smi"


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
    return f"cannot {what}: NVML says: {text} ({code})", "check it with: nvidia-smi"
