"""The mock library itself, through pynvml: what other tests may rely on."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from tests import mock_nvml
from tests.mock_nvml import (
    FUNCTIONS,
    GIB,
    MIB,
    XID,
    MockGpu,
    MockMig,
    MockNvml,
    MockProcess,
    Rules,
    mock_uuid,
)


@pytest.fixture
def nvml(mock: MockNvml) -> Iterator[MockNvml]:
    """Three GPUs, initialised."""
    mock.set([MockGpu(), MockGpu(), MockGpu()])
    pynvml.nvmlInit()
    yield mock
    mock.set()
    pynvml.nvmlShutdown()


def handle(number: int) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(number)


def code(function: Any, *args: Any) -> int:
    """The NVML code that a call ends with."""
    try:
        function(*args)
    except pynvml.NVMLError as error:
        return int(error.value)
    return 0


def test_every_function_is_exported_and_bound_by_pynvml() -> None:
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", str(mock_nvml.build())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    bound = Path(pynvml.__file__).read_text()

    assert {name for name in exported if name.startswith("nvml")} == set(FUNCTIONS)
    for name in FUNCTIONS:
        assert f'"{name}"' in bound, name


def test_the_library_and_its_gpus(nvml: MockNvml) -> None:
    assert pynvml.nvmlSystemGetDriverVersion() == "575.57.08"
    assert pynvml.nvmlSystemGetNVMLVersion() == "12.575.57.08"
    assert pynvml.nvmlSystemGetCudaDriverVersion() == 12090
    assert pynvml.nvmlDeviceGetCount() == 3
    assert pynvml.nvmlErrorString(15) == "GPU is lost"
    for number in range(3):
        gpu = handle(number)
        assert pynvml.nvmlDeviceGetUUID(gpu) == mock_uuid(number)
        assert pynvml.nvmlDeviceGetName(gpu) == "Mock A100"
        assert pynvml.nvmlDeviceGetMinorNumber(gpu) == number
        pci = pynvml.nvmlDeviceGetPciInfo(gpu)
        assert (pci.busId, pci.bus) == (f"00000000:{0x3B + number:02X}:00.0", 0x3B + number)
        by_uuid = pynvml.nvmlDeviceGetHandleByUUID(mock_uuid(number))
        by_bus = pynvml.nvmlDeviceGetHandleByPciBusId(pci.busId.lower())
        assert pynvml.nvmlDeviceGetUUID(by_uuid) == pynvml.nvmlDeviceGetUUID(by_bus)
    assert code(handle, 3) == 2
    assert code(pynvml.nvmlDeviceGetHandleByUUID, "GPU-0") == 6
    assert code(pynvml.nvmlDeviceGetHandleByPciBusId, "0000:00:00.0") == 6


def test_every_metric(nvml: MockNvml) -> None:
    nvml.change(
        1,
        memory_used=GIB,
        utilization=37,
        memory_utilization=12,
        ecc_mode=(1, 0),
        ecc_errors=(5, 2),
        remapped_rows=(1, 2, 0, 1),
        compute_mode=3,
        persistence_mode=0,
        clocks_event_reasons=8,
        recovery_action=4,
        fields={7: 2**40},
    )
    gpu = handle(1)

    new = pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2)
    old = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    assert (new.total, new.reserved, new.used) == (40 * GIB, 300 * MIB, GIB)
    assert (old.total, old.used, old.free) == (40 * GIB, GIB + 300 * MIB, new.free)
    assert new.total == new.reserved + new.used + new.free
    rates = pynvml.nvmlDeviceGetUtilizationRates(gpu)
    assert (rates.gpu, rates.memory) == (37, 12)
    assert pynvml.nvmlDeviceGetPowerUsage(gpu) == 71300
    assert pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) == 400000
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) == 123_456_789
    assert pynvml.nvmlDeviceGetTemperatureV(gpu, pynvml.NVML_TEMPERATURE_GPU) == 36
    assert pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU) == 36
    assert [pynvml.nvmlDeviceGetClockInfo(gpu, n) for n in range(4)] == [210, 210, 1215, 585]
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu) == 8
    assert pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) == 8
    assert pynvml.nvmlDeviceGetEccMode(gpu) == [1, 0]
    assert [pynvml.nvmlDeviceGetTotalEccErrors(gpu, n, 0) for n in range(2)] == [5, 2]
    assert pynvml.nvmlDeviceGetRemappedRows(gpu) == (1, 2, 0, 1)
    assert pynvml.nvmlDeviceGetPersistenceMode(gpu) == 0
    assert pynvml.nvmlDeviceGetComputeMode(gpu) == 3
    action, wide, absent = pynvml.nvmlDeviceGetFieldValues(gpu, [230, 7, 99])
    assert (action.nvmlReturn, action.value.uiVal) == (0, 4)
    assert (wide.nvmlReturn, wide.valueType, wide.value.ullVal) == (0, 3, 2**40)
    assert absent.nvmlReturn == 3


def test_what_is_none_is_not_supported(nvml: MockNvml) -> None:
    nvml.change(
        0,
        name=None,
        memory_total=None,
        power_draw=None,
        power_limit=None,
        energy=None,
        utilization=None,
        temperature=None,
        clocks=None,
        clocks_event_reasons=None,
        ecc_mode=None,
        ecc_errors=None,
        remapped_rows=None,
        compute_mode=None,
        persistence_mode=None,
        mig_mode=None,
        recovery_action=None,
        supported_events=None,
    )
    gpu = handle(0)
    calls: list[tuple[Any, ...]] = [
        (pynvml.nvmlDeviceGetName, gpu),
        (pynvml.nvmlDeviceGetMemoryInfo, gpu),
        (pynvml.nvmlDeviceGetPowerUsage, gpu),
        (pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu),
        (pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu),
        (pynvml.nvmlDeviceGetUtilizationRates, gpu),
        (pynvml.nvmlDeviceGetTemperatureV, gpu, 0),
        (pynvml.nvmlDeviceGetTemperature, gpu, 0),
        (pynvml.nvmlDeviceGetClockInfo, gpu, 0),
        (pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu),
        (pynvml.nvmlDeviceGetEccMode, gpu),
        (pynvml.nvmlDeviceGetTotalEccErrors, gpu, 0, 0),
        (pynvml.nvmlDeviceGetRemappedRows, gpu),
        (pynvml.nvmlDeviceGetComputeMode, gpu),
        (pynvml.nvmlDeviceSetComputeMode, gpu, 0),
        (pynvml.nvmlDeviceGetPersistenceMode, gpu),
        (pynvml.nvmlDeviceGetMigMode, gpu),
        (pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu),
        (pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, 0),
        (pynvml.nvmlDeviceGetSupportedEventTypes, gpu),
    ]

    assert {call[0].__name__: code(*call) for call in calls} == {
        call[0].__name__: 3 for call in calls
    }
    assert pynvml.nvmlDeviceGetFieldValues(gpu, [230])[0].nvmlReturn == 3


def test_the_compute_mode_can_be_set(nvml: MockNvml) -> None:
    gpu = handle(2)

    pynvml.nvmlDeviceSetComputeMode(gpu, 2)

    assert pynvml.nvmlDeviceGetComputeMode(gpu) == 2
    assert code(pynvml.nvmlDeviceSetComputeMode, gpu, 9) == 2


def test_mig_devices(nvml: MockNvml) -> None:
    nvml.change(0, mig_mode=(1, 1), mig_devices=[MockMig("MIG-a"), MockMig("MIG-b", 20, 5)])
    gpu = handle(0)

    assert pynvml.nvmlDeviceGetMigMode(gpu) == [1, 1]
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu) == 7
    one = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 1)
    assert pynvml.nvmlDeviceGetUUID(one) == "MIG-b"
    assert pynvml.nvmlDeviceGetMemoryInfo(one).free == 15
    assert code(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, 2) == 6
    assert pynvml.nvmlDeviceGetName(one) == "Mock A100 MIG 1g.5gb"
    assert code(pynvml.nvmlDeviceGetPowerUsage, one) == 3
    assert code(pynvml.nvmlDeviceGetUtilizationRates, one) == 3


NONE = 0xFFFFFFFF  # the instance that a process without one has in the driver's lists


def test_processes_of_mig_devices_are_in_the_lists_of_their_gpu(nvml: MockNvml) -> None:
    slices = [MockMig("MIG-a"), MockMig("MIG-b", processes=[MockProcess(7, 5)])]
    nvml.change(0, mig_mode=(1, 1), mig_devices=slices, processes=[MockProcess(6)])
    gpu = handle(0)
    first, second = (pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, n) for n in range(2))

    def listed(handle: Any) -> list[tuple[int, int | None, int | None]]:
        rows = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return [(row.pid, row.gpuInstanceId, row.computeInstanceId) for row in rows]

    assert listed(gpu) == [(6, NONE, NONE), (7, 2, 0)]
    assert (listed(first), listed(second)) == ([], [(7, 2, 0)])
    nvml.change(0, mig_devices=slices[:1])
    assert code(pynvml.nvmlDeviceGetUUID, second) == 2


def test_process_lists(nvml: MockNvml) -> None:
    many = [MockProcess(pid) for pid in range(1, 100)]
    nvml.change(0, processes=[*many, MockProcess(7, None, "graphics"), MockProcess(8, 5, "mps")])
    gpu = handle(0)

    compute = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    assert [(p.pid, p.usedGpuMemory) for p in compute] == [(pid, GIB) for pid in range(1, 100)]
    graphics = pynvml.nvmlDeviceGetGraphicsRunningProcesses(gpu)
    assert [(p.pid, p.usedGpuMemory) for p in graphics] == [(7, None)]
    mps = pynvml.nvmlDeviceGetMPSComputeRunningProcesses(gpu)
    assert [(p.pid, p.usedGpuMemory) for p in mps] == [(8, 5)]
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle(1)) == []


def test_errors_of_one_gpu_and_of_all(nvml: MockNvml) -> None:
    nvml.change(1, rules=Rules(errors={"nvmlDeviceGetPowerUsage": 999}))
    assert [code(pynvml.nvmlDeviceGetPowerUsage, handle(n)) for n in range(3)] == [0, 999, 0]

    nvml.set_rules(errors={"nvmlDeviceGetPowerUsage": 3})
    assert [code(pynvml.nvmlDeviceGetPowerUsage, handle(n)) for n in range(3)] == [3, 3, 3]

    nvml.break_library(18)
    assert code(pynvml.nvmlDeviceGetCount) == 18


def test_a_rule_for_a_function_that_is_not_there_is_refused(nvml: MockNvml) -> None:
    with pytest.raises(ValueError, match=r"the mock has no function nvmlDeviceGetPower$"):
        nvml.change(0, rules=Rules(errors={"nvmlDeviceGetPower": 3}))


def test_lost_and_unopenable_gpus(nvml: MockNvml) -> None:
    gpu = handle(1)
    nvml.change(1, lost=True)
    nvml.change(2, open_error=15)

    assert code(pynvml.nvmlDeviceGetTemperature, gpu, 0) == 15
    assert code(handle, 1) == 15
    assert code(handle, 2) == 15
    assert pynvml.nvmlDeviceGetCount() == 3


def test_only_a_new_initialisation_enumerates_anew(nvml: MockNvml) -> None:
    old = handle(1)
    nvml.set([MockGpu(uuid=mock_uuid(0)), MockGpu(uuid=mock_uuid(2))])
    assert pynvml.nvmlDeviceGetCount() == 3
    assert code(pynvml.nvmlDeviceGetUUID, old) == 15

    pynvml.nvmlInit()  # a second reference changes nothing
    assert pynvml.nvmlDeviceGetCount() == 3
    pynvml.nvmlShutdown()
    pynvml.nvmlShutdown()
    assert code(pynvml.nvmlDeviceGetCount) == 1
    pynvml.nvmlInit()

    assert pynvml.nvmlDeviceGetCount() == 2
    assert pynvml.nvmlDeviceGetUUID(handle(1)) == mock_uuid(2)
    assert code(pynvml.nvmlDeviceGetUUID, old) == 2


def test_slow_and_hanging_calls(nvml: MockNvml) -> None:
    gpu = handle(0)
    nvml.set_rules(sleeps={"nvmlDeviceGetPowerUsage": 50})
    start = time.monotonic()
    pynvml.nvmlDeviceGetPowerUsage(gpu)
    assert 0.05 <= time.monotonic() - start < 2

    nvml.set_rules(hangs=["nvmlDeviceGetPowerUsage"])
    thread = threading.Thread(target=pynvml.nvmlDeviceGetPowerUsage, args=(gpu,), daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    assert pynvml.nvmlDeviceGetTemperature(gpu, 0) == 36  # the others answer meanwhile

    nvml.set_rules()
    thread.join(5)
    assert not thread.is_alive()


# --- events -----------------------------------------------------------------------------------


@pytest.fixture
def events(nvml: MockNvml) -> Iterator[Any]:
    nvml.add_event(0, 99)  # before the registration: never seen
    made = pynvml.nvmlEventSetCreate()
    for number in range(2):
        pynvml.nvmlDeviceRegisterEvents(handle(number), XID, made)
    yield made
    pynvml.nvmlEventSetFree(made)


def test_waiting_for_an_event_blocks_until_its_time_is_up(events: Any) -> None:
    start = time.monotonic()

    assert code(pynvml.nvmlEventSetWait_v2, events, 120) == 10
    # The two clocks need not agree to the millisecond.
    assert 0.11 <= time.monotonic() - start < 2


def test_an_event_wakes_the_one_who_waits(nvml: MockNvml, events: Any) -> None:
    timer = threading.Timer(0.05, nvml.add_event, (1, 79))
    timer.start()
    start = time.monotonic()

    event = pynvml.nvmlEventSetWait_v2(events, 10_000)

    assert time.monotonic() - start < 5
    assert (event.eventType, event.eventData) == (XID, 79)
    assert pynvml.nvmlDeviceGetUUID(event.device) == mock_uuid(1)
    timer.join()


def test_events_come_in_order_once_and_as_registered(nvml: MockNvml, events: Any) -> None:
    nvml.add_event(1, 13)
    nvml.add_event(2, 31)  # not registered
    nvml.add_event(0, 1, type=1)  # registered, but of another type
    nvml.add_event(0, 48)

    seen = [pynvml.nvmlEventSetWait_v2(events, 1000).eventData for _ in range(2)]

    assert seen == [13, 48]
    assert code(pynvml.nvmlEventSetWait_v2, events, 1) == 10


def test_events_that_a_gpu_does_not_know_cannot_be_registered(nvml: MockNvml, events: Any) -> None:
    nvml.change(2, supported_events=1)

    assert pynvml.nvmlDeviceGetSupportedEventTypes(handle(2)) == 1
    assert code(pynvml.nvmlDeviceRegisterEvents, handle(2), XID, events) == 3


# --- building ---------------------------------------------------------------------------------


def test_without_gcc_the_build_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIC_TEST_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(RuntimeError, match="install it with: apt-get install gcc"):
        mock_nvml.build()


def test_the_build_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIC_TEST_CACHE", str(tmp_path))

    first = mock_nvml.build()
    made = first.stat().st_mtime_ns

    assert mock_nvml.build() == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == ["libnvidia-ml.so.1"]


def test_shutting_down_under_a_call_kills_the_process_as_the_real_library_does(
    tmp_path: Path,
) -> None:
    import os
    import sys

    mock = MockNvml(tmp_path)
    mock.set([MockGpu()], rules=Rules(hangs=["nvmlDeviceGetCount_v2"]))
    program = (
        "import pynvml, threading, time; pynvml.nvmlInit();"
        "threading.Thread(target=pynvml.nvmlDeviceGetCount, daemon=True).start();"
        "time.sleep(0.2); pynvml.nvmlShutdown()"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **mock.env()},
        capture_output=True,
        text=True,
    )

    assert done.returncode == -6
    assert "nvmlShutdown while 1 calls run" in done.stderr
