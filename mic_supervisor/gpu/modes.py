"""Modes of a GPU that decide nothing and that an operator wants to know of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


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
