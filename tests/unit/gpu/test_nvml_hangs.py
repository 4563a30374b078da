"""NvmlSource on a driver that does not answer, or late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.model import GpuInventory
from tests.mock_nvml import MockGpu, MockNvml, Rules, mock_uuid
from tests.unit.gpu.conftest import in_another_process

POWER = "nvmlDeviceGetPowerUsage"


def hang(mock: MockNvml, number: int) -> None:
    mock.change(number, rules=Rules(hangs=[POWER]))


def test_a_call_that_hangs_costs_one_time_out_and_nothing_after(
    mock: MockNvml, open_nvml: Callable[..., NvmlSource]
) -> None:
    mock.set([MockGpu(), MockGpu()])
    source = open_nvml(timeout=0.3)
    source.observe()
    hang(mock, 1)
    expected = GpuInventory(
        source="nvml",
        error=f"cannot read GPUs: NVML did not answer within 0.3 s, asked about GPU 1 "
        f"({mock_uuid(1)})",
        hint="find the cause with: dmesg | grep -i -e xid -e nvrm",
    )

    start = time.monotonic()
    assert source.observe() == expected
    assert time.monotonic() - start > 0.25  # and the call hangs until it is told otherwise

    start = time.monotonic()
    assert [source.observe() for _ in range(200)] == [expected] * 200
    assert time.monotonic() - start < 20  # 60 s, were each to wait in vain
    assert [t.name for t in threading.enumerate()].count("nvml") == 1

    mock.change(1, rules=Rules(), temperature=50)
    deadline = time.monotonic() + 30
    while (inventory := source.observe()).error:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [gpu.temperature for gpu in inventory.gpus] == [36.0, 50.0]


def test_callers_that_wait_behind_a_hanging_call_are_let_go_too(
    mock: MockNvml, open_nvml: Callable[..., NvmlSource]
) -> None:
    mock.set([MockGpu()])
    source = open_nvml(timeout=0.5)
    source.observe()
    hang(mock, 0)
    took: list[float] = []

    def look() -> None:
        start = time.monotonic()
        assert source.observe().error
        took.append(time.monotonic() - start)

    threads = [threading.Thread(target=look) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(took) == 60
    assert max(took) < 10  # 30 s, were one to wait after the other


def test_the_first_look_may_take_longer_since_it_wakes_the_gpus(
    mock: MockNvml, open_nvml: Callable[..., NvmlSource]
) -> None:
    mock.set([MockGpu()], rules=Rules(sleeps={"nvmlInitWithFlags": 1500}))
    source = open_nvml(timeout=1.0, init_timeout=30.0)

    assert source.observe().error is None
    assert source.observe().error is None


def test_a_slow_driver_is_waited_for(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(rules=Rules(sleeps={POWER: 100})), MockGpu()])

    start = time.monotonic()
    inventory = source.observe()

    assert inventory.error is None
    assert len(inventory.gpus) == 2
    assert time.monotonic() - start >= 0.1


def test_nvml_is_not_shut_down_while_a_call_hangs_in_it(
    mock: MockNvml, open_nvml: Callable[..., NvmlSource]
) -> None:
    mock.set([MockGpu()])
    source = open_nvml(timeout=0.1)
    source.observe()
    hang(mock, 0)
    source.observe()
    before = mock.calls("nvmlDeviceGetCount_v2")

    source.close()  # the mock, like the real library, would kill the process
    source.close()

    assert source.observe().error is not None
    assert mock.calls("nvmlDeviceGetCount_v2") == before

    # Once the call returns the library is released after all: a new source enumerates anew.
    mock.set([MockGpu(), MockGpu()])
    deadline = time.monotonic() + 30
    while any(thread.name == "nvml" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert len(open_nvml().observe().gpus) == 2


def test_a_hanging_call_does_not_keep_the_program_from_ending(tmp_path: Path) -> None:
    mock = MockNvml(tmp_path)
    mock.set([MockGpu(rules=Rules(hangs=[POWER]))])
    program = (
        "from mic_supervisor.gpu.nvml import NvmlSource; s = NvmlSource(init_timeout=0.2);"
        "print(s.observe().error is not None); s.close()"
    )

    start = time.monotonic()
    assert in_another_process(program, mock.env()) == "True"
    assert time.monotonic() - start < 20
