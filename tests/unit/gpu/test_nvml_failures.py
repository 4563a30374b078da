"""NvmlSource on a driver that misbehaves: what is lost, what stays known, and what is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.model import GpuInventory, UnopenedGpu
from tests.mock_nvml import MockGpu, MockNvml, MockProcess, Rules, mock_uuid
from tests.unit.gpu.conftest import Clock, in_another_process


def nothing_but(inventory: GpuInventory) -> str | None:
    """The error of an inventory with nothing else in it, and what to do about it."""
    assert inventory == GpuInventory("nvml", error=inventory.error, hint=inventory.hint)
    return inventory.error_line


def by_index(inventory: GpuInventory) -> dict[int, str]:
    return {gpu.index: gpu.uuid for gpu in inventory.gpus}


# --- one GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            15,
            "cannot open it: the GPU fell off the bus; "
            "find the cause with: dmesg | grep -i xid, then reboot",
        ),
        (
            16,
            "cannot open it: the GPU needs a reset; reset it with: nvidia-smi --gpu-reset -i ID",
        ),
        (
            4,
            "cannot open it: no permission; check the mode of its /dev/nvidia device",
        ),
        (
            999,
            "cannot open it: NVML says: “Unknown Error” (999); check it with: nvidia-smi",
        ),
    ],
)
def test_a_gpu_that_cannot_be_opened_harms_no_other(
    mock: MockNvml, source: NvmlSource, code: int, text: str
) -> None:
    mock.set([MockGpu(), MockGpu(open_error=code), MockGpu()])

    inventory = source.observe()

    assert inventory.error is None
    assert by_index(inventory) == {0: mock_uuid(0), 2: mock_uuid(2)}
    assert [(gpu.index, gpu.error_line) for gpu in inventory.unopened] == [(1, text)]


def test_texts_of_the_driver_that_nobody_can_read_harm_nothing(
    mock: MockNvml, source: NvmlSource
) -> None:
    mock.set(
        gpus=[
            MockGpu(name="caf\udce9"),
            MockGpu(name="\x1b[2J\u202eB200"),
            MockGpu(uuid="GPU-\udcff"),
            MockGpu(name="x" * 90),
        ],
        driver_version="575\udce9",
        nvml_version="\x1b[2J",
    )
    seen = source.observe()
    assert seen.error is None and seen.driver is None
    assert seen.nvml == "\N{REPLACEMENT CHARACTER}[2J"
    assert {gpu.index: gpu.name for gpu in seen.gpus} == {
        0: "NVIDIA GPU",
        1: "\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}B200",
        3: "x" * 90,
    }
    (unopened,) = seen.unopened
    assert unopened.index == 2 and unopened.error.startswith("cannot open it: NVML says: “")


def test_a_gpu_without_a_uuid_is_not_opened(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(rules=Rules(errors={"nvmlDeviceGetUUID": 999})), MockGpu()])

    inventory = source.observe()

    assert by_index(inventory) == {1: mock_uuid(1)}
    assert [gpu.index for gpu in inventory.unopened] == [0]


@pytest.mark.parametrize("code", [4, 15])
def test_a_gpu_that_opens_again_is_found_after_the_wait(
    mock: MockNvml, source: NvmlSource, clock: Clock, code: int
) -> None:
    mock.set([MockGpu(open_error=code), MockGpu()])
    source.observe()
    mock.change(0, open_error=None)

    assert by_index(source.observe()) == {1: mock_uuid(1)}
    clock.now += 10

    assert by_index(source.observe()) == {0: mock_uuid(0), 1: mock_uuid(1)}
    assert source.observe().unopened == ()


def test_a_gpu_that_is_lost_is_reported_with_its_identity(
    mock: MockNvml, source: NvmlSource
) -> None:
    mock.set([MockGpu(), MockGpu()])
    source.observe()
    mock.change(0, rules=Rules(errors={"nvmlDeviceGetPowerUsage": 15}))

    inventory = source.observe()

    assert inventory.error is None
    assert by_index(inventory) == {1: mock_uuid(1)}
    assert inventory.unopened == (
        UnopenedGpu(
            0,
            f"cannot read {mock_uuid(0)} at 00000000:3B:00.0: the GPU fell off the bus",
            "find the cause with: dmesg | grep -i xid, then reboot",
            mock_uuid(0),
        ),
    )


@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetTemperatureV",
    ],
)
def test_whichever_call_finds_the_loss_the_gpu_is_lost(
    mock: MockNvml, source: NvmlSource, function: str
) -> None:
    mock.set([MockGpu(rules=Rules(errors={function: 15})), MockGpu()])

    inventory = source.observe()

    assert by_index(inventory) == {1: mock_uuid(1)}
    assert [gpu.index for gpu in inventory.unopened] == [0]


def test_a_gpu_that_drops_out_renumbers_the_others_and_comes_back(
    mock: MockNvml, source: NvmlSource, clock: Clock
) -> None:
    all_three = [MockGpu(uuid=mock_uuid(n), pci_bus_id=f"00000000:0{n}:00.0") for n in range(3)]
    mock.set(all_three)
    assert by_index(source.observe()) == {n: mock_uuid(n) for n in range(3)}
    started = mock.calls("nvmlInitWithFlags")

    mock.set([all_three[0], all_three[2]])
    inventory = source.observe()

    assert by_index(inventory) == {0: mock_uuid(0), 1: mock_uuid(2)}
    assert [gpu.pci_bus_id for gpu in inventory.gpus] == [
        "00000000:00:00.0",
        "00000000:02:00.0",
    ]
    assert inventory.unopened == ()
    assert mock.calls("nvmlInitWithFlags") == started + 1

    mock.set(all_three)
    assert by_index(source.observe()) == {0: mock_uuid(0), 1: mock_uuid(2)}
    clock.now += 10
    assert by_index(source.observe()) == {n: mock_uuid(n) for n in range(3)}


def test_a_missing_gpu_is_looked_for_ever_less_often(
    mock: MockNvml, source: NvmlSource, clock: Clock
) -> None:
    mock.set([MockGpu(), MockGpu()])
    source.observe()
    mock.set([MockGpu()])
    started = mock.calls("nvmlInitWithFlags")
    times = []

    for second in range(1300):
        source.observe()
        if mock.calls("nvmlInitWithFlags") > started:
            times.append(second)
            started += 1
        clock.now += 1

    assert times == [0, 10, 30, 70, 150, 310, 610, 910, 1210]


# --- the library ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            9,
            "cannot read GPUs: the NVIDIA kernel module is not loaded; "
            "load it with: modprobe nvidia",
        ),
        (
            18,
            "cannot read GPUs: the NVIDIA driver library and the loaded kernel module differ in "
            "version; load the installed module (stop what uses the GPUs, then rmmod nvidia_uvm "
            "nvidia and modprobe nvidia), or reboot",
        ),
        (
            4,
            "cannot read GPUs: no permission to open the NVIDIA devices; run it as root",
        ),
        (
            999,
            "cannot read GPUs: NVML answers Unknown Error (999), as it does where the device "
            "cgroup denies /dev/nvidiactl; allow the NVIDIA devices to the unit "
            "(DeviceAllow=char-nvidiactl rw, char-nvidia rw, char-nvidia-uvm rw); in a container, "
            "recreate it",
        ),
        (
            28,
            "cannot read GPUs: NVML says: “GPU not found” (28); check the driver with: nvidia-smi",
        ),
    ],
)
def test_nvml_that_does_not_start_says_why_and_recovers(
    mock: MockNvml, source: NvmlSource, code: int, text: str
) -> None:
    mock.set([MockGpu()], rules=Rules(errors={"nvmlInitWithFlags": code}))

    assert nothing_but(source.observe()) == text
    assert source.outdated is False

    mock.set([MockGpu()])
    assert by_index(source.observe()) == {0: mock_uuid(0)}


def test_a_driver_that_is_replaced_under_the_program(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu()])
    source.observe()

    mock.break_library(18)

    assert nothing_but(source.observe()) == (
        "cannot read GPUs: the NVIDIA driver was replaced while this program ran; "
        "restart it with: systemctl restart mic"
    )
    assert source.outdated is True


@pytest.mark.parametrize("code", [1, 9, 15, 18, 28])
def test_a_library_that_loses_its_footing_is_initialised_again(
    mock: MockNvml, source: NvmlSource, code: int
) -> None:
    mock.set([MockGpu()])
    source.observe()
    started = mock.calls("nvmlInitWithFlags")
    mock.break_library(code)
    assert source.observe().error is not None

    mock.break_library(0)

    assert by_index(source.observe()) == {0: mock_uuid(0)}
    assert mock.calls("nvmlInitWithFlags") >= started + 1


def test_somebody_else_shut_nvml_down(mock: MockNvml, source: NvmlSource) -> None:
    import pynvml

    mock.set([MockGpu()])
    source.observe()
    pynvml.nvmlShutdown()

    assert by_index(source.observe()) == {0: mock_uuid(0)}


def test_a_library_that_is_too_old_for_the_binding(
    mock: MockNvml, source: NvmlSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pynvml

    def mismatch(*_: object) -> None:
        raise pynvml.NVMLLibraryMismatchError("versions differ")

    mock.set([MockGpu()])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", mismatch)
    assert [gpu.power_draw for gpu in source.observe().gpus] == [None]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", mismatch)
    assert source.observe().error_line == (
        "cannot read GPUs: the driver is older than nvidia-ml-py supports; upgrade the driver"
    )


def test_nothing_at_all_leaves_observe_as_an_exception(
    mock: MockNvml, source: NvmlSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("what the library wrote is no text")

    mock.set([MockGpu()])
    monkeypatch.setattr("pynvml.nvmlDeviceGetCount", broken)

    assert source.observe().error_line == (
        "cannot read GPUs: “ValueError: what the library wrote is no text”; "
        "check the driver with: nvidia-smi"
    )


def test_a_machine_without_the_driver_library(tmp_path: Path) -> None:
    # The loader stops at a file that is no library, so this holds where a driver is installed too.
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    program = (
        "from mic_supervisor.gpu.source import open_source; s = open_source('nvml');"
        "print(s.observe().error_line); print(s.observe().error_line); s.close()"
    )

    said = in_another_process(program, {"LD_LIBRARY_PATH": str(tmp_path)}).splitlines()

    assert said == 2 * [
        "cannot read GPUs: libnvidia-ml.so.1 was not found or cannot be loaded; install the "
        "NVIDIA driver, or set MIC_GPU_SOURCE=simulated:N to go without GPUs"
    ]


def test_a_process_finds_the_mock_by_its_environment(tmp_path: Path) -> None:
    mock = MockNvml(tmp_path)
    mock.set([MockGpu(), MockGpu()])
    program = (
        "from mic_supervisor.gpu.source import open_source;"
        "print([gpu.uuid for gpu in open_source('nvml').observe().gpus])"
    )

    assert in_another_process(program, mock.env()) == str([mock_uuid(0), mock_uuid(1)])


def test_a_closed_source_says_so(mock: MockNvml, source: NvmlSource) -> None:
    mock.set([MockGpu(processes=[MockProcess(1)])])
    source.observe()
    source.close()
    source.close()

    assert source.observe().error_line == (
        "cannot read GPUs: its source was closed; restart this program"
    )


def test_closing_what_was_never_opened(mock: MockNvml, source: NvmlSource) -> None:
    before = mock.calls("nvmlInitWithFlags"), mock.calls("nvmlShutdown")
    source.close()
    assert (mock.calls("nvmlInitWithFlags"), mock.calls("nvmlShutdown")) == before


OBSERVE = "from mic_supervisor.gpu.nvml import NvmlSource; print(NvmlSource().observe().error_line)"


@pytest.mark.parametrize("package", ["pynvml", None])
def test_another_package_in_the_place_of_the_binding_is_named(
    mock: MockNvml, tmp_path: Path, package: str | None
) -> None:
    """pynvml 11.5 brings a directory pynvml/, which hides nvidia-ml-py's pynvml.py."""
    mock.set([MockGpu()])
    (tmp_path / "pynvml").mkdir()
    (tmp_path / "pynvml" / "__init__.py").write_text("class NVMLError(Exception): pass\n")
    if package is not None:
        facts = tmp_path / f"{package}-11.5.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Name: {package}\nVersion: 11.5.0\n")
        (facts / "top_level.txt").write_text("pynvml\n")
    said = in_another_process(OBSERVE, {**mock.env(), "PYTHONPATH": str(tmp_path)})
    where = f"cannot read GPUs: the Python module pynvml in {tmp_path}/pynvml/__init__.py is not"
    assert said.startswith(where)
    if package is None:
        assert f"{sys.executable} -m pip install --upgrade nvidia-ml-py" in said
    else:
        assert "not that of nvidia-ml-py, but of the package pynvml; remove that with: " in said
        assert f"{sys.executable} -m pip uninstall pynvml; then: " in said
