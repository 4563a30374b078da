"""What metrics alone are made of: energy, clocks, what holds them back, memory errors."""

from __future__ import annotations

import pytest

from mic_supervisor.gpu.driver import cuda_version
from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.model import GpuTelemetry
from tests.mock_nvml import MockGpu, MockNvml, Rules

NOT_FOUND = 13


def test_telemetry_in_full(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(clocks_event_reasons=0x4 | 0x20, ecc_errors=(3, 1))])

    (gpu,) = source.observe().gpus

    assert gpu.telemetry == GpuTelemetry(
        energy=123456.789,
        clocks=(("graphics", 210e6), ("sm", 210e6), ("memory", 1215e6), ("video", 585e6)),
        clock_events=(
            ("gpu_idle", False),
            ("applications_clocks_setting", False),
            ("sw_power_cap", True),
            ("hw_slowdown", False),
            ("sync_boost", False),
            ("sw_thermal_slowdown", True),
            ("hw_thermal_slowdown", False),
            ("hw_power_brake_slowdown", False),
            ("display_clock_setting", False),
        ),
        ecc_errors=(("corrected", 3), ("uncorrected", 1)),
    )


def test_what_a_gpu_does_not_know_is_left_out(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(energy=None, clocks=None, clocks_event_reasons=None, ecc_errors=None)])

    (gpu,) = source.observe().gpus

    assert gpu.telemetry == GpuTelemetry()
    assert gpu.power_draw is not None


def test_an_old_driver_is_asked_by_the_former_name(mock: MockNvml, source: NvmlSource) -> None:
    rules = Rules(errors={"nvmlDeviceGetCurrentClocksEventReasons": NOT_FOUND})
    mock.set([MockGpu(clocks_event_reasons=0x1)], rules=rules)

    (gpu,) = source.observe().gpus

    assert gpu.telemetry is not None
    assert [name for name, active in gpu.telemetry.clock_events if active] == ["gpu_idle"]


@pytest.mark.parametrize(
    ("number", "text"), [(12090, "12.9"), (13000, "13.0"), (11080, "11.8"), (None, None)]
)
def test_cuda_version(number: int | None, text: str | None) -> None:
    assert cuda_version(number) == text
