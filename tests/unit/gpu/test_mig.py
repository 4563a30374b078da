"""MIG slices through the real pynvml, on the mock library."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from mic_supervisor.gpu.events import XidRecord, XidSeverity, with_xids
from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.model import Gpu, GpuMemory, Near
from tests.mock_nvml import GIB, MockGpu, MockMig, MockNvml, MockProcess, Rules, mock_uuid

SLICES = (mock_uuid(8, "MIG"), mock_uuid(9, "MIG"))


@pytest.fixture
def sleepers() -> Iterator[list[int]]:
    running = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield [one.pid for one in running]
    for one in running:
        one.kill()
        one.wait()


def parted(*slices: MockMig, **values: object) -> MockGpu:
    return MockGpu(mig_mode=(1, 1), utilization=None, mig_devices=slices, **values)  # type: ignore[arg-type]


def pids(gpu: Gpu) -> list[int] | None:
    return None if gpu.processes is None else [process.pid for process in gpu.processes]


def test_a_slice_is_a_gpu_with_a_parent(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([parted(MockMig(SLICES[0], used=3 * GIB), MockMig(SLICES[1], 20 * GIB)), MockGpu()])

    inventory = source.observe()

    whole, first, second, other = inventory.gpus
    assert (whole.uuid, whole.mig, whole.utilization) == (mock_uuid(0), True, None)
    assert first == Gpu(
        uuid=SLICES[0],
        index=0,
        name="Mock A100 MIG 1g.5gb",
        memory=GpuMemory(10 * GIB, 3 * GIB, 7 * GIB, 0),
        processes=(),
        recovery_action="none",
        parent=mock_uuid(0),
    )
    assert (second.uuid, other.uuid) == (SLICES[1], mock_uuid(1))
    assert inventory.indices == {mock_uuid(0): 0, mock_uuid(1): 1}
    assert inventory.numbers == inventory.indices | {uuid: uuid for uuid in SLICES}


def test_a_slice_is_next_to_what_its_gpu_is_next_to(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([parted(MockMig(SLICES[0]), cpus=0b101, nodes=0b10)])
    assert [gpu.near for gpu in source.observe().gpus] == [Near((0, 2), (1,))] * 2


def test_a_process_is_on_its_slice_alone(
    mock: MockNvml, source: NvmlSource, sleepers: list[int]
) -> None:
    first, second = (MockProcess(pid) for pid in sleepers)
    slices = [
        MockMig(SLICES[0], processes=[first]),
        MockMig(SLICES[1], processes=[second]),
    ]
    mock.set([parted(*slices)])

    found = [pids(gpu) for gpu in source.observe().gpus]

    assert found == [[], [first.pid], [second.pid]]


def test_slices_come_and_go_without_opening_the_driver_anew(
    mock: MockNvml, source: NvmlSource
) -> None:
    mock.set([parted(MockMig(SLICES[0]))])
    assert [gpu.uuid for gpu in source.observe().gpus] == [mock_uuid(0), SLICES[0]]
    opened = mock.calls("nvmlInitWithFlags")

    mock.change(0, mig_devices=[MockMig(SLICES[1])])
    assert [gpu.uuid for gpu in source.observe().gpus] == [mock_uuid(0), SLICES[1]]
    mock.change(0, mig_devices=[], mig_mode=(0, 0))
    assert [gpu.uuid for gpu in source.observe().gpus] == [mock_uuid(0)]
    assert mock.calls("nvmlInitWithFlags") == opened


def test_lists_that_cannot_be_read_are_unknown_on_the_slice_too(
    mock: MockNvml, source: NvmlSource
) -> None:
    code = {"nvmlDeviceGetComputeRunningProcesses_v3": 999}
    mock.set([parted(MockMig(SLICES[0]), rules=Rules(errors=code))])

    assert [pids(gpu) for gpu in source.observe().gpus] == [None, None]


def test_a_gpu_in_trouble_has_its_slices_in_trouble(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([parted(MockMig(SLICES[0]), recovery_action=1)])
    inventory = source.observe()
    asks = "the driver asks for a reset of the GPU"
    assert [gpu.trouble for gpu in inventory.gpus] == [asks, asks]

    xid = XidRecord(mock_uuid(0), 79, 1, 5.0, XidSeverity.CRITICAL, None)
    marked = with_xids(inventory, (xid,), 6.0)
    assert [gpu.trouble for gpu in marked.gpus] == [f"Xid 79; {asks}"] * 2
