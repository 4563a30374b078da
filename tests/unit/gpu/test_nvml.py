"""NvmlSource through the real pynvml, on the mock library: what a healthy look gives."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from mic_supervisor.gpu.nvml import Contained, DidNotReturn, NvmlSource
from mic_supervisor.host import processes
from mic_supervisor.model import Gpu, GpuInventory, GpuMemory, GpuProcess, Near
from tests.mock_nvml import GIB, MIB, MockGpu, MockNvml, MockProcess, Rules, mock_uuid


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child.pid
        child.kill()


def test_a_gpu_in_full(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(memory_used=7 * GIB, utilization=37)])

    inventory = source.observe()

    (gpu,) = inventory.gpus  # its telemetry has a test of its own, in test_driver.py
    assert replace(inventory, gpus=(replace(gpu, telemetry=None),)) == GpuInventory(
        source="nvml",
        gpus=(
            Gpu(
                uuid=mock_uuid(0),
                index=0,
                name="Mock A100",
                pci_bus_id="00000000:3B:00.0",
                memory=GpuMemory(
                    total=40 * GIB,
                    used=7 * GIB,
                    free=33 * GIB - 300 * MIB,
                    reserved=300 * MIB,
                ),
                processes=(),
                power_draw=71.3,
                power_limit=400.0,
                utilization=0.37,
                temperature=36.0,
                recovery_action="none",
                mig=False,
                persistence=True,
            ),
        ),
        driver="575.57.08",
        nvml="12.575.57.08",
        cuda="12.9",
    )


def test_no_gpus_is_an_empty_inventory_and_no_error(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([])

    assert source.observe() == GpuInventory(
        source="nvml", driver="575.57.08", nvml="12.575.57.08", cuda="12.9"
    )


def test_each_look_sees_what_changed(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(), MockGpu()])
    source.observe()

    mock.change(1, memory_used=3 * GIB, power_draw=None, temperature=81)

    zero, one = source.observe().gpus
    assert zero.memory and zero.memory.used == 0
    assert one.memory and one.memory.used == 3 * GIB
    assert (one.power_draw, one.temperature) == (None, 81.0)


def test_nvml_is_initialised_and_each_gpu_identified_once(
    mock: MockNvml, source: NvmlSource
) -> None:
    mock.set([MockGpu() for _ in range(3)])
    names = ("nvmlInitWithFlags", "nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlShutdown")
    before = [mock.calls(name) for name in names]

    for _ in range(20):
        source.observe()

    assert [mock.calls(name) - n for name, n in zip(names, before, strict=True)] == [1, 3, 3, 0]


@pytest.mark.parametrize("code", [3, 4, 13])
@pytest.mark.parametrize(
    ("function", "attribute"),
    [
        ("nvmlDeviceGetPowerUsage", "power_draw"),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit"),
        ("nvmlDeviceGetUtilizationRates", "utilization"),
        ("nvmlDeviceGetPciInfo_v3", "pci_bus_id"),
    ],
)
def test_what_is_not_supported_is_none_and_harms_nothing_else(
    mock: MockNvml, source: NvmlSource, function: str, attribute: str, code: int
) -> None:
    mock.set([MockGpu(rules=Rules(errors={function: code})), MockGpu()])

    inventory = source.observe()

    assert (inventory.error, inventory.unopened) == (None, ())
    spoilt, sound = inventory.gpus
    for name in ("memory", "power_draw", "power_limit", "utilization", "pci_bus_id", "temperature"):
        assert (getattr(spoilt, name) is None) is (name == attribute), name
        assert getattr(sound, name) is not None


def test_the_first_memory_function_stands_in_for_the_second(
    mock: MockNvml, source: NvmlSource
) -> None:
    mock.set(
        [MockGpu(memory_used=GIB, rules=Rules(errors={"nvmlDeviceGetMemoryInfo_v2": 13}))],
    )

    (gpu,) = source.observe().gpus

    assert gpu.memory == GpuMemory(
        total=40 * GIB, used=GIB + 300 * MIB, free=39 * GIB - 300 * MIB, reserved=None
    )


def test_memory_that_neither_function_knows_is_none(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(memory_total=None)])

    assert [gpu.memory for gpu in source.observe().gpus] == [None]


def test_memory_that_may_not_be_read_is_not_asked_for_in_another_way(
    mock: MockNvml, source: NvmlSource
) -> None:
    mock.set([MockGpu(rules=Rules(errors={"nvmlDeviceGetMemoryInfo_v2": 999}))])

    assert [gpu.memory for gpu in source.observe().gpus] == [None]


@pytest.mark.parametrize("code", [3, 13, 25])
def test_the_old_temperature_function_stands_in_for_the_new(
    mock: MockNvml, source: NvmlSource, code: int
) -> None:
    mock.set([MockGpu(temperature=64, rules=Rules(errors={"nvmlDeviceGetTemperatureV": code}))])

    assert [gpu.temperature for gpu in source.observe().gpus] == [64.0]


def test_an_older_binding_without_the_new_temperature_function(
    mock: MockNvml, source: NvmlSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("pynvml.nvmlDeviceGetTemperatureV")
    mock.set([MockGpu(temperature=64)])

    assert [gpu.temperature for gpu in source.observe().gpus] == [64.0]


def test_modes_that_a_gpu_does_not_have_are_none(mock: MockNvml, source: NvmlSource) -> None:
    mock.set(
        [
            MockGpu(persistence_mode=0, mig_mode=(1, 1)),
            MockGpu(persistence_mode=None, mig_mode=None),
            MockGpu(open_error=15),
        ]
    )
    found = [(gpu.index, gpu.persistence, gpu.mig) for gpu in source.observe().gpus]
    assert found == [(0, False, True), (1, None, None)]


def test_what_is_next_to_a_gpu_is_what_the_driver_says(mock: MockNvml, source: NvmlSource) -> None:
    mock.set(
        [
            MockGpu(cpus=0b1100_0001, nodes=0b10),
            MockGpu(cpus=1 << 63),
            MockGpu(nodes=1),
            MockGpu(cpus=1, rules=Rules(errors={"nvmlDeviceGetMemoryAffinity": 13})),
        ]
    )
    assert [gpu.near for gpu in source.observe().gpus] == [
        Near((0, 6, 7), (1,)),
        Near((63,)),
        None,
        Near((0,)),
    ]
    before = mock.calls("nvmlDeviceGetCpuAffinityWithinScope")
    source.observe()
    assert mock.calls("nvmlDeviceGetCpuAffinityWithinScope") == before, "it never changes"


# --- holders ----------------------------------------------------------------------------------


def test_holders_are_named_from_proc_and_identified_by_start_time(
    mock: MockNvml, source: NvmlSource, sleeper: int
) -> None:
    mock.set([MockGpu(processes=[MockProcess(sleeper, 2 * GIB)])])

    (gpu,) = source.observe().gpus

    stat = processes.stat(sleeper)
    assert stat and gpu.processes == (
        GpuProcess(
            sleeper,
            "sleep",
            2 * GIB,
            start_time=stat.start_time,
            kinds=("compute",),
            started_at=gpu.processes[0].started_at,
        ),
    )
    started = gpu.processes[0].started_at
    assert started is not None and abs(started - time.time()) < 30


def test_holders_are_the_union_of_three_lists(mock: MockNvml, source: NvmlSource) -> None:
    mock.set(
        [
            MockGpu(
                processes=[
                    MockProcess(4000003, 5 * MIB, "graphics"),
                    MockProcess(4000001, 2 * GIB, "compute"),
                    MockProcess(4000001, None, "graphics"),
                    MockProcess(4000002, None, "mps"),
                ]
            )
        ]
    )

    (gpu,) = source.observe().gpus

    assert gpu.processes == (
        GpuProcess(4000001, None, 2 * GIB, kinds=("compute", "graphics")),
        GpuProcess(4000002, None, None, kinds=("mps",)),
        GpuProcess(4000003, None, 5 * MIB, kinds=("graphics",)),
    )


def test_a_holder_that_no_longer_exists_has_neither_name_nor_start_time(
    mock: MockNvml, source: NvmlSource
) -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    mock.set([MockGpu(processes=[MockProcess(child.pid)])])

    (gpu,) = source.observe().gpus

    assert gpu.processes == (GpuProcess(child.pid, None, GIB, kinds=("compute",)),)


def test_a_holder_of_two_gpus_is_on_both(mock: MockNvml, source: NvmlSource) -> None:
    pid = os.getpid()
    mock.set([MockGpu(processes=[MockProcess(pid, GIB)]), MockGpu(processes=[MockProcess(pid)])])

    assert [[p.pid for p in gpu.processes or ()] for gpu in source.observe().gpus] == [[pid], [pid]]


COMPUTE = "nvmlDeviceGetComputeRunningProcesses_v3"
GRAPHICS = "nvmlDeviceGetGraphicsRunningProcesses_v3"
MPS = "nvmlDeviceGetMPSComputeRunningProcesses_v3"


def holders(mock: MockNvml, source: NvmlSource, **errors: int) -> list[int] | None:
    mock.set([MockGpu(processes=[MockProcess(4000001)], rules=Rules(errors=errors))])
    (gpu,) = source.observe().gpus
    return None if gpu.processes is None else [p.pid for p in gpu.processes]


@pytest.mark.parametrize("errors", [{GRAPHICS: 3}, {MPS: 3}, {GRAPHICS: 3, MPS: 3}])
def test_kinds_of_processes_that_the_driver_does_not_know_are_no_holders(
    mock: MockNvml, source: NvmlSource, errors: dict[str, int]
) -> None:
    assert holders(mock, source, **errors) == [4000001]


@pytest.mark.parametrize(
    "errors",
    [{COMPUTE: 3}, {COMPUTE: 999}, {COMPUTE: 4}, {GRAPHICS: 4}, {MPS: 999}, {COMPUTE: 7}],
)
def test_a_list_that_cannot_be_read_leaves_the_holders_unknown(
    mock: MockNvml, source: NvmlSource, errors: dict[str, int]
) -> None:
    assert holders(mock, source, **errors) is None


@pytest.mark.parametrize(
    ("errors", "why"),
    [
        ({COMPUTE: 3}, "untold"),  # NOT_SUPPORTED: WSL2, some vGPU
        ({COMPUTE: 3, GRAPHICS: 3, MPS: 3}, "untold"),
        ({COMPUTE: 13, COMPUTE.replace("_v3", "_v2"): 13}, "untold"),
        ({COMPUTE: 999}, None),
        ({COMPUTE: 4}, None),
        ({GRAPHICS: 999}, None),
    ],
)
def test_a_platform_that_does_not_tell_is_no_list_that_cannot_be_read_now(
    mock: MockNvml, source: NvmlSource, errors: dict[str, int], why: str | None
) -> None:
    assert holders(mock, source, **errors) is None
    (gpu,) = source.observe().gpus
    assert gpu.unlisted == why


@pytest.mark.parametrize(
    "row",
    [
        MockProcess(0),
        MockProcess((1 << 22) + 1),
        MockProcess(4000001, 41 * GIB),  # of a card of 40
        MockProcess(0, 1 * MIB, "graphics"),
        MockProcess(0, None, "mps"),
    ],
)
def test_a_list_that_cannot_be_true_leaves_the_holders_unknown(
    mock: MockNvml, source: NvmlSource, row: MockProcess
) -> None:
    mock.set([MockGpu(processes=[MockProcess(4000002), row])])
    (gpu,) = source.observe().gpus
    assert (gpu.processes, gpu.unlisted) == (None, "implausible")


def test_the_older_function_stands_in_where_the_newest_gives_rows_of_another_size(
    mock: MockNvml, source: NvmlSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers 535.43 to 535.86: the amount of one row is read as the PID of the next."""
    import pynvml

    real = pynvml.nvmlDeviceGetComputeRunningProcesses_v2

    def shifted(handle: object) -> object:
        rows = real(handle)
        for row in rows:
            row.pid, row.usedGpuMemory = 0, row.pid
        return rows

    monkeypatch.setattr(pynvml, COMPUTE, shifted)

    assert holders(mock, source) == [4000001]


def test_an_amount_that_is_not_told_is_plausible_as_is_a_card_without_one(
    mock: MockNvml, source: NvmlSource
) -> None:
    memory = {"nvmlDeviceGetMemoryInfo": 3, "nvmlDeviceGetMemoryInfo_v2": 3}
    row = MockProcess(4000001, None)
    mock.set([MockGpu(processes=[row], rules=Rules(errors=memory))])
    (gpu,) = source.observe().gpus
    assert gpu.memory is None and gpu.processes is not None and len(gpu.processes) == 1


def test_an_older_driver_is_asked_with_the_older_functions(
    mock: MockNvml, source: NvmlSource
) -> None:
    assert holders(mock, source, **{COMPUTE: 13, GRAPHICS: 13, MPS: 13}) == [4000001]


def test_a_list_that_outgrows_the_binding_is_asked_for_again(
    mock: MockNvml, source: NvmlSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pynvml

    real = pynvml.nvmlDeviceGetComputeRunningProcesses_v3
    refusals = [7, 7]

    def grows(handle: object) -> object:
        if refusals:
            raise pynvml.NVMLError(refusals.pop())
        return real(handle)

    monkeypatch.setattr(pynvml, COMPUTE, grows)

    assert holders(mock, source) == [4000001]


# --- many looks -------------------------------------------------------------------------------


def test_threads_look_at_the_same_time(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(), MockGpu()])
    expected = source.observe()
    seen: list[GpuInventory] = []

    def look() -> None:
        seen.extend(source.observe() for _ in range(25))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == [expected] * 200


def test_a_thousand_looks_grow_nothing(
    mock: MockNvml, open_nvml: Callable[..., NvmlSource], sleeper: int
) -> None:
    mock.set([MockGpu(processes=[MockProcess(sleeper)]), MockGpu(memory_total=None)])
    source = open_nvml()

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def handles() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    for _ in range(200):
        source.observe()
    before = resident(), handles(), threading.active_count()
    for _ in range(1000):
        source.observe()
    after = resident(), handles(), threading.active_count()

    assert after[1:] == before[1:]
    assert after[0] - before[0] < MIB


def test_sixteen_gpus_take_a_few_milliseconds(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(processes=[MockProcess(os.getpid())]) for _ in range(16)])
    source.observe()
    took = []
    for _ in range(30):
        start = time.process_time()
        source.observe()
        took.append(time.process_time() - start)

    # 3 ms here, of processor time: others may be at work.
    assert median(took) < 0.02


def test_importing_the_source_does_not_load_the_driver_library() -> None:
    program = (
        "import sys, mic_supervisor.gpu.source as s; s.open_source('nvml').close();"
        "print('pynvml' in sys.modules, s.open_source('nvml').observe().error is None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )

    assert done.stdout.startswith("False "), done


# --- contained calls --------------------------------------------------------------------------


def test_a_contained_call_returns_and_raises_as_it_would_alone() -> None:
    calls = Contained("test")

    assert calls.call(lambda: 7, 5.0) == 7
    with pytest.raises(ZeroDivisionError):
        calls.call(lambda: 1 // 0, 5.0)
    assert calls.call(lambda: 8, 5.0) == 8


def test_a_late_result_is_dropped() -> None:
    calls, go = Contained("test"), threading.Event()

    with pytest.raises(DidNotReturn):
        calls.call(lambda: go.wait(10) and "old", 0.05)
    with pytest.raises(DidNotReturn) as refused:
        calls.call(lambda: "new", 5.0)
    assert refused.value.timeout == 0.05
    go.set()
    while True:
        try:
            assert calls.call(lambda: "new", 5.0) == "new"
            break
        except DidNotReturn:
            continue
