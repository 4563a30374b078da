"""The sources that need no driver, and the choice between them."""

from __future__ import annotations

import pytest

from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.gpu.source import SimulatedSource, open_source
from mic_supervisor.model import Gpu, GpuInventory, GpuMemory


def test_simulated_gpus_are_the_same_every_time() -> None:
    source = open_source("simulated", 2)

    assert source.observe() == open_source("simulated", 2).observe()
    assert source.observe().gpus[1] == Gpu(
        uuid="GPU-51000001-0000-4000-8000-000000000001",
        index=1,
        name="Simulated GPU",
        pci_bus_id="00005100:01:00.0",
        memory=GpuMemory(total=24 * 1024**3, used=None, free=None),
        processes=(),
        simulated=True,
    )
    source.close()
    assert len(source.observe().gpus) == 2


def test_many_simulated_gpus_differ_in_every_name() -> None:
    gpus = open_source("simulated", 600).observe().gpus

    assert [gpu.index for gpu in gpus] == list(range(600))
    assert len({gpu.uuid[4:12] for gpu in gpus}) == 600
    assert len({gpu.pci_bus_id for gpu in gpus}) == 600


def test_a_negative_number_cannot_be_simulated() -> None:
    with pytest.raises(ValueError, match="cannot simulate -1 GPUs"):
        SimulatedSource(-1)


def test_no_gpus_by_choice_is_no_error() -> None:
    source = open_source("none")

    assert source.observe() == GpuInventory("none", error=None)
    source.close()


def test_nvml_is_opened_without_touching_the_driver() -> None:
    source = open_source("nvml")

    assert isinstance(source, NvmlSource)
    source.close()
