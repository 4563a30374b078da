"""A stand-in for the NVIDIA driver library, driven from a test while the program runs.

    mock = MockNvml(tmp_path)
    mock.set(gpus=[MockGpu(), MockGpu()])
    subprocess.run([...], env={**os.environ, **mock.env()})

`set` and `change` take effect with the next NVML call of every process that has the mock loaded.

Two ways to load it:

- another process: `env()` puts it on LD_LIBRARY_PATH, which the loader reads at process start;
- this process: `load()` opens it by its full path. glibc matches a later
  `dlopen("libnvidia-ml.so.1")`, which is what pynvml does, against the SONAME of what is loaded
  already, so pynvml gets the mock and never searches the disk. pynvml keeps the library for the
  life of the process; MOCK_NVML_STATE says which state file the next call reads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

_HERE = Path(__file__).parent
_SOURCES = ("nvml.c", "state.c", "state.h")
_SONAME = "libnvidia-ml.so.1"

GIB = 1024**3
MIB = 1024**2

XID = 0x8
"""nvmlEventTypeXidCriticalError"""

FUNCTIONS = (
    "nvmlInitWithFlags",
    "nvmlShutdown",
    "nvmlErrorString",
    "nvmlSystemGetDriverVersion",
    "nvmlSystemGetNVMLVersion",
    "nvmlSystemGetCudaDriverVersion",
    "nvmlSystemGetProcessName",
    "nvmlEventSetCreate",
    "nvmlEventSetWait_v2",
    "nvmlEventSetFree",
    "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetHandleByUUID",
    "nvmlDeviceGetHandleByPciBusId_v2",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetName",
    "nvmlDeviceGetPciInfo_v3",
    "nvmlDeviceGetMinorNumber",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetTemperatureV",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetEccMode",
    "nvmlDeviceGetTotalEccErrors",
    "nvmlDeviceGetRemappedRows",
    "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetComputeMode",
    "nvmlDeviceSetComputeMode",
    "nvmlDeviceGetPersistenceMode",
    "nvmlDeviceGetCpuAffinityWithinScope",
    "nvmlDeviceGetMemoryAffinity",
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetMaxMigDeviceCount",
    "nvmlDeviceGetMigDeviceHandleByIndex",
    "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v2",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v2",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlDeviceGetSupportedEventTypes",
    "nvmlDeviceRegisterEvents",
)
"""Every function that the mock has; a rule for "*" concerns all of them."""


@dataclass(frozen=True)
class MockProcess:
    """One line of a process list. `used` None: NVML does not know how much memory it has."""

    pid: int
    used: int | None = GIB
    kind: Literal["compute", "graphics", "mps"] = "compute"


@dataclass(frozen=True)
class MockMig:
    """A slice of a GPU that has MIG on. Its processes are in the lists of its GPU, too."""

    uuid: str
    total: int = 10 * GIB
    used: int = 0
    profile: str = "1g.5gb"
    processes: Sequence[MockProcess] = ()


@dataclass(frozen=True)
class Rules:
    """What goes wrong with which functions.

    `errors` maps a function to an NVML code, `sleeps` to milliseconds; `hangs` lists functions that
    do not return until a later state no longer lists them. "*" is every function.
    """

    errors: Mapping[str, int] = field(default_factory=dict)
    sleeps: Mapping[str, int] = field(default_factory=dict)
    hangs: Sequence[str] = ()

    def lines(self) -> list[str]:
        for function in (*self.errors, *self.sleeps, *self.hangs):
            if function != "*" and function not in FUNCTIONS:
                raise ValueError(f"the mock has no function {function}")
        return [
            *(f"rule {name} error {int(code)}" for name, code in self.errors.items()),
            *(f"rule {name} sleep {int(ms)}" for name, ms in self.sleeps.items()),
            *(f"rule {name} hang" for name in self.hangs),
        ]


def mock_uuid(number: int, kind: Literal["GPU", "MIG"] = "GPU") -> str:
    """A UUID whose first eight hex digits differ per number."""
    return f"{kind}-{0xA0000000 + number:08x}-1111-4222-8333-{number:012x}"


@dataclass(frozen=True)
class MockGpu:
    """One GPU. Memory in bytes, power in watts, utilization in per cent; None is "not supported".

    `uuid`, `pci_bus_id` and `minor` are made from the place in the list where they are None.
    `lost`: every call on its handle answers 15 (GPU is lost). `open_error`: it is counted, but
    opening it by index gives this code.
    """

    uuid: str | None = None
    name: str | None = "Mock A100"
    pci_bus_id: str | None = None
    minor: int | None = None
    memory_total: int | None = 40 * GIB
    memory_reserved: int = 300 * MIB
    memory_used: int = 0
    processes: Sequence[MockProcess] = ()
    power_draw: float | None = 71.3
    power_limit: float | None = 400.0
    energy: int | None = 123_456_789  # mJ
    utilization: int | None = 0
    memory_utilization: int = 0
    temperature: int | None = 36
    clocks: tuple[int, int, int, int] | None = (210, 210, 1215, 585)  # graphics, SM, memory, video
    clocks_event_reasons: int | None = 1
    ecc_mode: tuple[int, int] | None = (1, 1)  # current, pending
    ecc_errors: tuple[int, int] | None = (0, 0)  # corrected, uncorrected
    remapped_rows: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    compute_mode: int | None = 0
    persistence_mode: int | None = 1
    cpus: int | None = None  # a bit for each CPU next to it
    nodes: int | None = None  # and for each node of memory
    mig_mode: tuple[int, int] | None = (0, 0)  # current, pending
    mig_devices: Sequence[MockMig] = ()
    recovery_action: int | None = 0  # field 230
    fields: Mapping[int, int] = field(default_factory=dict)
    supported_events: int | None = 0x1F
    lost: bool = False
    open_error: int | None = None
    rules: Rules = Rules()

    def lines(self, number: int) -> list[str]:
        numbers: dict[str, int | Sequence[int] | None] = {
            "minor": number if self.minor is None else self.minor,
            "memory": None
            if self.memory_total is None
            else (self.memory_total, self.memory_reserved, self.memory_used),
            "power": None if self.power_draw is None else round(self.power_draw * 1000),
            "power_limit": None if self.power_limit is None else round(self.power_limit * 1000),
            "energy": self.energy,
            "utilization": None
            if self.utilization is None
            else (self.utilization, self.memory_utilization),
            "temperature": self.temperature,
            "clocks": self.clocks,
            "clocks_event_reasons": self.clocks_event_reasons,
            "ecc_mode": self.ecc_mode,
            "ecc_errors": self.ecc_errors,
            "remapped_rows": self.remapped_rows,
            "compute_mode": self.compute_mode,
            "persistence_mode": self.persistence_mode,
            "cpus": self.cpus,
            "nodes": self.nodes,
            "mig_mode": self.mig_mode,
            "max_mig_devices": None if self.mig_mode is None else 7,
            "supported_events": self.supported_events,
            "open_error": self.open_error,
        }
        fields = dict(self.fields)
        if self.recovery_action is not None:
            fields.setdefault(230, self.recovery_action)
        texts = {
            "name": self.name,
            "pci_bus_id": self.pci_bus_id or f"00000000:{0x3B + number:02X}:00.0",
            **{
                key: " ".join(map(str, (value,) if isinstance(value, int) else value))
                for key, value in numbers.items()
                if value is not None
            },
        }
        held = [(process, "") for process in self.processes]
        for place, mig in enumerate(self.mig_devices):
            held += [(process, f" {place}") for process in mig.processes]
        if len(held) > 128:
            raise ValueError("the mock holds 128 processes per GPU")
        return [
            f"gpu {self.uuid or mock_uuid(number)}",
            *(f"set {key} {value}" for key, value in texts.items() if value is not None),
            *(
                f"proc {p.kind[0]} {p.pid} {'-' if p.used is None else p.used}{mig}"
                for p, mig in held
            ),
            *(f"field {key} {value}" for key, value in fields.items()),
            *(f"mig {m.uuid} {m.total} {m.used} {m.profile}" for m in self.mig_devices),
            *(["rule * error 15"] if self.lost else []),
            *self.rules.lines(),
        ]


class MockNvml:
    """One machine's worth of GPUs. Its state is one file in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "nvml-state"
        self.gpus: list[MockGpu] = []
        self.rules = Rules()
        self.versions: dict[str, str | None] = {}
        self._events: list[tuple[str, int, int, int]] = []  # uuid, seq, type, data
        self._generation = 0
        self._turn = threading.RLock()  # a thread of a test may change it at the same time
        self.set()

    def set(
        self,
        gpus: Sequence[MockGpu] = (),
        *,
        rules: Rules | None = None,
        driver_version: str | None = "575.57.08",
        nvml_version: str | None = "12.575.57.08",
        cuda_version: int | None = 12090,
    ) -> None:
        """Replace the whole state, GPUs in NVML's order. Past events are kept."""
        self.gpus = [
            gpu if gpu.uuid else replace(gpu, uuid=mock_uuid(number))
            for number, gpu in enumerate(gpus)
        ]
        self.rules = rules or Rules()
        self.versions = {
            "driver_version": driver_version,
            "nvml_version": nvml_version,
            "cuda_version": None if cuda_version is None else str(cuda_version),
        }
        self._write()

    def change(self, number: int, **changes: Any) -> None:
        """Change fields of the GPU at this place of the list."""
        with self._turn:
            self.gpus[number] = replace(self.gpus[number], **changes)
            self._write()

    def break_library(self, code: int) -> None:
        """Every call fails with this code from now on: 18 is a driver that was upgraded under us.

        Code 0 mends it.
        """
        self.rules = Rules(errors={"*": code}) if code else Rules()
        self._write()

    def set_rules(
        self,
        *,
        errors: Mapping[str, int] | None = None,
        sleeps: Mapping[str, int] | None = None,
        hangs: Sequence[str] = (),
    ) -> None:
        """Replace the rules that hold for the whole library."""
        self.rules = Rules(errors or {}, sleeps or {}, hangs)
        self._write()

    def add_event(self, number: int, data: int, type: int = XID) -> None:
        """An event on the GPU at this place: an Xid unless `type` says otherwise."""
        uuid = self.gpus[number].uuid
        assert uuid
        self._events.append((uuid, len(self._events) + 1, type, data))
        self._write()

    def env(self) -> dict[str, str]:
        """What a subprocess needs in its environment to find this mock as NVML."""
        library = str(build().parent)
        inherited = os.environ.get("LD_LIBRARY_PATH")
        return {
            "LD_LIBRARY_PATH": f"{library}:{inherited}" if inherited else library,
            "MOCK_NVML_STATE": str(self.state),
        }

    def load(self, setenv: Callable[[str, str], object]) -> None:
        """Make this mock the NVML of the current process; `setenv` is monkeypatch.setenv."""
        import pynvml

        setenv("MOCK_NVML_STATE", str(self.state))
        library = _library()
        loaded = pynvml.nvmlLib
        if loaded is not None and loaded._handle != library._handle:
            raise RuntimeError("cannot load the mock NVML: pynvml holds another library already")

    @staticmethod
    def calls(function: str) -> int:
        """How often the current process called this function so far."""
        return int(_library().mock_nvml_calls(function.encode()))

    def _write(self) -> None:
        # Two that write at once would leave what the slower one has seen, not what holds now.
        with self._turn:
            partial = self.state.with_suffix(".partial")
            # A file system's clock ticks slowly and inodes come back: the size tells two quick
            # writes apart for sure.
            self._generation += 1
            text = "\n".join(self._lines()) + "\n" * (1 + self._generation % 64)
            partial.write_bytes(text.encode(errors="surrogateescape"))
            partial.replace(self.state)

    def _lines(self) -> Iterator[str]:
        yield from (
            f"set {key} {value}" for key, value in self.versions.items() if value is not None
        )
        yield from self.rules.lines()
        for number, gpu in enumerate(self.gpus):
            yield from gpu.lines(number)
            for uuid, seq, type_, data in self._events[-64:]:
                if uuid == gpu.uuid:
                    yield f"event {seq} {type_} {data}"


def build() -> Path:
    """The path of the mock library, compiled on first use and kept outside the checkout."""
    source = b"".join((_HERE / name).read_bytes() for name in _SOURCES)
    given = os.environ.get("MIC_TEST_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(given) if given else base / "mic-supervisor-tests"
    target = cache / f"mock-nvml-{hashlib.sha256(source).hexdigest()[:16]}" / _SONAME
    if target.exists():
        return target
    gcc = shutil.which("gcc")
    if gcc is None:
        raise RuntimeError(
            "cannot build the mock NVML: gcc was not found; install it with: apt-get install gcc"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / _SONAME
        done = subprocess.run(
            [
                *(gcc, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
                *("-fvisibility=hidden", "-pthread", f"-Wl,-soname,{_SONAME}", "-o", str(built)),
                *(str(_HERE / name) for name in _SOURCES if name.endswith(".c")),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(f"cannot build the mock NVML: gcc failed:\n{done.stderr}")
        built.replace(target)
    return target


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    library.mock_nvml_calls.restype = ctypes.c_ulong
    return library
