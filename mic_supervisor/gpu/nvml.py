"""GPU facts from the NVIDIA driver, through nvidia-ml-py (`pynvml`).

Codes and their meaning: nvml.h of the driver. A driver is a neighbour one must not trust: GPUs
fall off the bus, functions are missing, calls hang, the library is replaced under a running
program. Each of these ends in a value that is None, in `unopened`, or in `error`; never in an
exception, and never in a number that was made up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from mic_supervisor import clocks
from mic_supervisor.gpu.driver import (
    ARGUMENT_VERSION_MISMATCH,
    FUNCTION_NOT_FOUND,
    GONE,
    INSUFFICIENT_SIZE,
    LIB_RM_VERSION_MISMATCH,
    MISSING,
    REINITIALISE,
    UNKNOWN,
    binding_error,
    cuda_version,
    gpu_error,
    library_error,
    plausible,
    read_near,
    read_slices,
    read_telemetry,
    temperature,
)
from mic_supervisor.gpu.events import RECOVERY_ACTION, NvmlUsers, recovery_action, trouble_of
from mic_supervisor.host import processes
from mic_supervisor.model import Gpu, GpuInventory, GpuMemory, GpuProcess, Near, UnopenedGpu
from mic_supervisor.text import one_line, quoted

FIRST_RETRY = 10.0  # seconds
LAST_RETRY = 300.0
_PARTING = 2.0  # seconds for others to leave NVML before it is initialised anew

_LISTS = (
    ("compute", "nvmlDeviceGetComputeRunningProcesses"),
    ("graphics", "nvmlDeviceGetGraphicsRunningProcesses"),
    ("mps", "nvmlDeviceGetMPSComputeRunningProcesses"),
)


@dataclass(frozen=True, slots=True)
class _Device:
    """A GPU that could be opened, and what never changes about it while NVML stays initialised."""

    index: int
    handle: Any
    uuid: str
    name: str
    pci_bus_id: str | None
    near: Near | None


@dataclass(slots=True)
class _Session:
    """NVML between init and shutdown: it enumerates GPUs at init and keeps to that."""

    driver: str | None = None
    nvml: str | None = None
    cuda: str | None = None
    devices: list[_Device] = field(default_factory=list)
    # By index, the code, and what is said of it.
    unopened: dict[int, tuple[int, tuple[str, str]]] = field(default_factory=dict)


class _Unreadable(Exception):
    """A GPU whose handle does not answer any more."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Implausible(Exception):
    """A list of processes that cannot be true."""


class NvmlSource:
    """Every GPU that the driver of this machine knows. Thread-safe.

    NVML is initialised with the first look and once more, at most every 10 s (later 300 s), after
    a look that found GPUs lost or missing: only a new initialisation enumerates anew. Nobody else
    in the process may be inside NVML without a reference of their own (nvmlInit) when that happens,
    and none but those who come and go by `nvml_users`.

    A look takes at most `timeout` seconds, or `init_timeout` when it has to initialise the driver,
    which wakes sleeping GPUs one by one. A call that hangs is left behind: the look, and every
    later one until that call returns, gives an inventory whose `error` says so.

    `outdated` turns true when the driver was replaced under this program: a process cannot load
    the new library beside the old one, so only its successor will see GPUs again.
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        init_timeout: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout = timeout
        self._init_timeout = init_timeout
        self._clock = clock
        self._calls = Contained("nvml")
        self.nvml_users = NvmlUsers()
        self.outdated = False
        # From here on: touched by one contained call at a time.
        self._session: _Session | None = None
        self._was_open = False
        self._asked = "the driver"
        self._closed = False
        self._known: set[str] = set()
        self._codes: set[int] = set()
        self._retry_at = 0.0
        self._retry_delay = FIRST_RETRY

    def observe(self) -> GpuInventory:
        timeout = self._timeout if self._session else self._init_timeout
        try:
            return self._calls.call(self._read_gpus, timeout)
        except DidNotReturn as error:
            return _failed(
                f"NVML did not answer within {error.timeout:g} s, asked about {self._asked}",
                "find the cause with: dmesg | grep -i -e xid -e nvrm",
            )
        # The binding raises its own types, ctypes' and whatever a broken library leads to; a look
        # that went wrong is an unknown inventory, not the end of the program.
        except Exception as error:  # noqa: BLE001
            said = quoted(f"{type(error).__name__}: {error}")
            return _failed(said, "check the driver with: nvidia-smi")

    def close(self) -> None:
        def end() -> None:
            self._closed = True
            self._shut_down()

        try:
            self._calls.call(end, self._timeout)
        except (DidNotReturn, RuntimeError):
            # Shutting NVML down while a call is inside it crashes the process.
            self._closed = True

    # --- one look -----------------------------------------------------------------------------

    def _read_gpus(self) -> GpuInventory:
        if self._closed:
            return _failed("its source was closed", "restart this program")
        try:
            return self._read_gpus_once()
        finally:
            if self._closed:  # by a close() that did not wait for this look
                self._shut_down()

    def _read_gpus_once(self) -> GpuInventory:
        try:
            import pynvml
        except ImportError as error:
            return _failed(str(error), "install it with: pip install nvidia-ml-py")
        if (why := binding_error(pynvml)) is not None:
            return _failed(*why)
        try:
            try:
                return self._read_or_start_over(pynvml)
            except pynvml.NVMLError as error:
                if self._session is None or error.value not in REINITIALISE:
                    raise
                self._shut_down()
                return self._read_or_start_over(pynvml)
        except pynvml.NVMLError as error:
            self._shut_down()
            self.outdated = self._was_open and error.value == LIB_RM_VERSION_MISMATCH
            return _failed(*library_error(error.value, str(error), was_open=self._was_open))
        except pynvml.NVMLLibraryMismatchError:
            return _failed("the driver is older than nvidia-ml-py supports", "upgrade the driver")

    def _read_or_start_over(self, nvml: Any) -> GpuInventory:
        session = self._open(nvml)
        inventory = self._read(nvml, session)
        if not self._is_incomplete(inventory):
            self._retry_at, self._retry_delay = 0.0, FIRST_RETRY
        elif self._clock() >= self._retry_at:
            self._retry_at = self._clock() + self._retry_delay
            self._retry_delay = min(LAST_RETRY, self._retry_delay * 2)
            if self._codes & REINITIALISE or self._missing(inventory):
                self._shut_down()
                session = self._open(nvml)
            else:
                for index in list(session.unopened):
                    self._open_device(nvml, session, index)
            inventory = self._read(nvml, session)
        self._known.update(inventory.indices)
        return inventory

    def _missing(self, inventory: GpuInventory) -> bool:
        return not self._known.issubset(inventory.indices)

    def _is_incomplete(self, inventory: GpuInventory) -> bool:
        return bool(inventory.unopened or self._codes & REINITIALISE or self._missing(inventory))

    def _open(self, nvml: Any) -> _Session:
        if self._session is not None:
            return self._session
        self._asked = "the driver"
        nvml.nvmlInit()
        self._was_open = True
        session = self._session = _Session()
        no_text = nvml.NVMLError, UnicodeDecodeError
        with suppress(*no_text):
            session.driver = one_line(nvml.nvmlSystemGetDriverVersion(), 80)
        with suppress(*no_text):
            session.nvml = one_line(nvml.nvmlSystemGetNVMLVersion(), 80)
        with suppress(nvml.NVMLError):
            session.cuda = cuda_version(nvml.nvmlSystemGetCudaDriverVersion())
        for index in range(nvml.nvmlDeviceGetCount()):
            self._open_device(nvml, session, index)
        self.nvml_users.admit()
        return session

    def _open_device(self, nvml: Any, session: _Session, index: int) -> None:
        """Open one GPU, or note why it cannot be: that concerns this GPU only."""
        self._asked = f"GPU {index}"
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
        except nvml.NVMLError as error:
            session.unopened[index] = error.value, gpu_error("open it", error.value, str(error))
            return
        except UnicodeDecodeError as error:  # who it is cannot be told, so nothing goes by it
            session.unopened[index] = UNKNOWN, gpu_error("open it", UNKNOWN, str(error))
            return
        try:
            name = self._get(nvml.nvmlDeviceGetName, handle)
            pci = self._get(nvml.nvmlDeviceGetPciInfo, handle)
            near = read_near(nvml, handle, self._get)
        except _Unreadable as error:
            session.unopened[index] = error.code, gpu_error(f"read {uuid}", error.code)
            return
        session.unopened.pop(index, None)
        called = one_line(name or "NVIDIA GPU", 96)
        bus_id = pci.busId if pci else None
        session.devices.append(_Device(index, handle, uuid, called, bus_id, near))

    def _shut_down(self) -> None:
        if self._session is None:
            return
        import pynvml

        self._session = None
        self.nvml_users.send_away(_PARTING)
        with suppress(pynvml.NVMLError):  # it may be uninitialised already
            pynvml.nvmlShutdown()

    def _read(self, nvml: Any, session: _Session) -> GpuInventory:
        self._asked = "the driver"
        nvml.nvmlDeviceGetCount()  # fails where the library as a whole does
        self._codes = {code for code, _ in session.unopened.values()}
        unopened = {index: UnopenedGpu(index, *why) for index, (_, why) in session.unopened.items()}
        gpus = []
        names: dict[int, processes.Stat | None] = {}
        for device in session.devices:
            self._asked = f"GPU {device.index} ({device.uuid})"
            try:
                gpu = self._read_gpu(nvml, device, names)
                held = partial(self._held, nvml, names=names)
                gpus += read_slices(nvml, device.handle, gpu, self._get, held)
            except _Unreadable as error:
                what = f"read {device.uuid} at {device.pci_bus_id or 'an unknown bus id'}"
                unopened[device.index] = UnopenedGpu(
                    device.index, *gpu_error(what, error.code), device.uuid
                )
        return GpuInventory(
            source="nvml",
            gpus=tuple(sorted(gpus, key=lambda gpu: gpu.index)),
            unopened=tuple(unopened[index] for index in sorted(unopened)),
            driver=session.driver,
            nvml=session.nvml,
            cuda=session.cuda,
        )

    # --- one GPU ------------------------------------------------------------------------------

    def _read_gpu(self, nvml: Any, device: _Device, names: dict[int, processes.Stat | None]) -> Gpu:
        handle = device.handle
        draw = self._get(nvml.nvmlDeviceGetPowerUsage, handle)
        limit = self._get(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        rates = self._get(nvml.nvmlDeviceGetUtilizationRates, handle)
        return Gpu(
            uuid=device.uuid,
            index=device.index,
            name=device.name,
            pci_bus_id=device.pci_bus_id,
            **self._held(nvml, handle, names),
            power_draw=None if draw is None else draw / 1000,
            power_limit=None if limit is None else limit / 1000,
            utilization=None if rates is None else rates.gpu / 100,
            temperature=temperature(nvml, handle, self._get),
            telemetry=read_telemetry(nvml, handle, self._get),
            near=device.near,
            **self._condition(nvml, handle),
        )

    def _condition(self, nvml: Any, handle: Any) -> dict[str, Any]:
        """What the driver says of how the GPU is, and its modes."""
        fields = self._get(nvml.nvmlDeviceGetFieldValues, handle, [RECOVERY_ACTION])
        action = recovery_action(fields[0]) if fields else None
        remapped = self._get(nvml.nvmlDeviceGetRemappedRows, handle)
        persistence = self._get(nvml.nvmlDeviceGetPersistenceMode, handle)
        mig = self._get(nvml.nvmlDeviceGetMigMode, handle)
        return {
            "trouble": trouble_of(action, remapped is not None and bool(remapped[3])),
            "recovery_action": None if action is None else action.value,
            "persistence": None if persistence is None else bool(persistence),
            "mig": None if mig is None else bool(mig[0]),
        }

    def _get(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function answers; None if this GPU or this driver does not know.

        Raises _Unreadable where the GPU itself is gone.
        """
        import pynvml

        try:
            return function(*args)
        except pynvml.NVMLError as error:
            self._note(error.value)
        except (pynvml.NVMLLibraryMismatchError, UnicodeDecodeError):
            pass
        return None

    def _held(
        self, nvml: Any, handle: Any, names: dict[int, processes.Stat | None]
    ) -> dict[str, Any]:
        """Memory and processes, of a GPU or of a slice."""
        memory = self._memory(nvml, handle)
        total = memory.total if memory else None
        return {"memory": memory, **self._processes(nvml, handle, total, names)}

    def _memory(self, nvml: Any, handle: Any) -> GpuMemory | None:
        try:
            info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        except nvml.NVMLError as error:
            if error.value not in {*MISSING, ARGUMENT_VERSION_MISMATCH}:
                self._note(error.value)
                return None
            # The first version counts what the driver reserves, some 300 MB, as used.
            old = self._get(nvml.nvmlDeviceGetMemoryInfo, handle)
            return GpuMemory(int(old.total), int(old.used), int(old.free)) if old else None
        return GpuMemory(int(info.total), int(info.used), int(info.free), int(info.reserved))

    def _processes(
        self, nvml: Any, handle: Any, total: int | None, names: dict[int, processes.Stat | None]
    ) -> dict[str, Any]:
        """Everyone on the GPU, by PID; or why not, unless every list of the driver can be read."""
        kinds: dict[int, list[str]] = {}
        used: dict[int, int | None] = {}
        for kind, function in _LISTS:
            try:
                rows = self._list(nvml, function, handle, total)
            except _Implausible:
                return {"processes": None, "unlisted": "implausible"}
            except nvml.NVMLError as error:
                if error.value in MISSING and kind != "compute":
                    continue  # this driver knows no such processes
                self._note(error.value)
                untold = "untold" if error.value in MISSING else None
                return {"processes": None, "unlisted": untold}
            for row in rows:
                kinds.setdefault(row.pid, []).append(kind)
                amounts = [n for n in (used.get(row.pid), row.usedGpuMemory) if n is not None]
                used[row.pid] = max(amounts, default=None)
        for pid in kinds:
            if pid not in names:
                names[pid] = processes.readable(pid)
        found = tuple(
            GpuProcess(
                pid=pid,
                name=stat.name if (stat := names[pid]) else None,
                used_memory=used[pid],
                start_time=stat.start_time if stat else None,
                kinds=tuple(kinds[pid]),
                started_at=clocks.in_wall(clocks.from_ticks(stat.start_time)) if stat else None,
            )
            for pid in sorted(kinds)
        )
        return {"processes": found}

    def _list(self, nvml: Any, function: str, handle: Any, total: int | None) -> list[Any]:
        """One list of processes, from the newest version of the function that gives a true one.

        Drivers 535.43 to 535.86 answer the third with rows of another size, so that numbers stand
        in each other's places. Raises NVMLError, and _Implausible where no list can be true.
        """
        version = "_v3"
        for _ in range(5):
            try:
                rows: list[Any] = getattr(nvml, function + version)(handle)
            except nvml.NVMLError as error:
                if error.value == FUNCTION_NOT_FOUND and version == "_v3":
                    version = "_v2"
                # More processes came between the question for the size and that for the list.
                elif error.value != INSUFFICIENT_SIZE:
                    raise
                continue
            if all(plausible(row, total) for row in rows):
                return rows
            if version == "_v2":
                raise _Implausible
            version = "_v2"
        raise nvml.NVMLError(INSUFFICIENT_SIZE)

    def _note(self, code: int) -> None:
        self._codes.add(code)
        if code in GONE:
            raise _Unreadable(code)


def _failed(cause: str, hint: str) -> GpuInventory:
    return GpuInventory(source="nvml", error=f"cannot read GPUs: {cause}", hint=hint)


# --- calls that may never return ----------------------------------------------------------------


T = TypeVar("T")


class DidNotReturn(Exception):
    """The call, or one before it, still runs. `timeout` is what it was given, in seconds."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.timeout = timeout


class Contained:
    """Runs one call at a time, each on a thread of its own, and waits no longer than asked.

    A call that outlives its time is left running, since a thread inside a C library cannot be
    ended. Until it returns every further call fails at once; its own result is dropped, being
    old by then. The threads are daemons: they do not keep the interpreter from exiting.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = threading.Lock()
        self._thread: threading.Thread | None = None
        self._timeout = 0.0

    def call(self, function: Callable[[], T], timeout: float) -> T:
        """What `function` returns or raises.

        Raises DidNotReturn after `timeout` seconds, the wait for other callers included, and
        RuntimeError if no thread can be started.
        """
        deadline = time.monotonic() + timeout
        if not self._turn.acquire(timeout=timeout):
            raise DidNotReturn(self._timeout)
        try:
            if self._thread is not None and self._thread.is_alive():
                raise DidNotReturn(self._timeout)
            answer: Future[T] = Future()

            def run() -> None:
                try:
                    answer.set_result(function())
                # Whatever it is belongs to the caller, who gets it below.
                except BaseException as error:  # noqa: BLE001
                    answer.set_exception(error)

            self._timeout = timeout
            thread = threading.Thread(target=run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise DidNotReturn(self._timeout)
        finally:
            self._turn.release()
        return answer.result()
