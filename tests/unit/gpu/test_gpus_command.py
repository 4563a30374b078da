"""`mic-supervisor gpus`: what it prints, and how it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mic_supervisor.cli import gpus as command
from mic_supervisor.cli.gpus import lines, print_tables
from mic_supervisor.gpu.source import open_source
from mic_supervisor.model import (
    Gpu,
    GpuInventory,
    GpuMemory,
    GpuProcess,
    Owner,
    OwnerKind,
    UnopenedGpu,
)
from tests.mock_nvml import GIB, MIB, MockGpu, MockNvml, MockProcess, Rules, mock_uuid
from tests.support.mic import here

A = "3f" * 32
SLICE = "MIG-f15ae561-7b5c-5a0c-8ab1-3a1e0c2d9f10"

FULL = GpuInventory(
    source="nvml",
    driver="575.57.08",
    gpus=(
        Gpu(
            "GPU-a",
            0,
            "NVIDIA A100",
            pci_bus_id="00000000:3B:00.0",
            memory=GpuMemory(80 * GIB, 18 * GIB, 62 * GIB - MIB, MIB),
            power_draw=71.3,
            power_limit=400.0,
            utilization=0.37,
            temperature=36.0,
            processes=(
                GpuProcess(
                    1, "tritonserver", 17 * GIB, 5, owner=Owner(OwnerKind.MANAGED, A, "换脸-0")
                ),
                GpuProcess(2, "python", None, 6, owner=Owner(OwnerKind.CONTAINER, A)),
                GpuProcess(3, "python", 1, 7, owner=Owner(OwnerKind.UNIT, "comfyui.service")),
                GpuProcess(4, "\x1b[2Jx", 1, 8, owner=Owner(OwnerKind.ORPHAN)),
                GpuProcess(5, None, 1, owner=Owner(OwnerKind.ORPHAN)),
                GpuProcess(6, None, 1, owner=Owner(OwnerKind.UNKNOWN)),
            ),
        ),
        Gpu("GPU-c", 2, "NVIDIA A100"),
    ),
    unopened=(UnopenedGpu(1, "cannot open it: the GPU fell off the bus"),),
)


def document(*arguments: Any) -> Any:
    """As it is printed."""
    return json.loads(json.dumps(command.document(*arguments)))


def test_the_plain_lines() -> None:
    assert lines(FULL) == [
        "0\tGPU-a\tNVIDIA A100\t18.0/80.0 GiB\t71/400 W\t37 %\t36 °C\t"
        "1 tritonserver 17.0 GiB 换脸-0; 2 python ? container 3f3f3f3f3f3f; "
        "3 python 0.0 GiB unit comfyui.service; 4 \ufffd[2Jx 0.0 GiB nobody; "
        "5 ? 0.0 GiB gone; 6 ? 0.0 GiB ?\t-",
        "1\t?\tcannot open it: the GPU fell off the bus",
        "2\tGPU-c\tNVIDIA A100\t?\t?\t?\t?\t?\t-",
    ]


def test_what_is_amiss_with_a_gpu_is_told_in_every_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sick = replace(FULL.gpus[1], trouble="Xid 79; reset it", mig=True, persistence=False)
    inventory = replace(FULL, gpus=(sick,), unopened=())
    told = [
        "unhealthy: Xid 79; reset it",
        "MIG is on: a model gets one of its slices",
        "persistence mode is off",
    ]

    assert lines(inventory)[0].endswith("\t?\t" + "; ".join(told))
    print_tables(inventory)
    assert capsys.readouterr().out.splitlines()[-3:] == [f"GPU 2: {text}" for text in told]
    (found,) = document(inventory, "h", None, [])["gpus"]
    assert (found["trouble"], found["mig"], found["persistence"]) == (
        "Xid 79; reset it",
        True,
        False,
    )


def test_slices_follow_their_gpu_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    memory = GpuMemory(10 << 30, 1 << 30, 9 << 30)
    whole = replace(FULL.gpus[1], mig=True, processes=())
    part = Gpu(
        SLICE, whole.index, "A100 MIG 1g.5gb", memory=memory, processes=(), parent=whole.uuid
    )
    inventory = replace(FULL, gpus=(whole, part), unopened=())

    assert lines(inventory) == [
        "2\tGPU-c\tNVIDIA A100\t?\t?\t?\t?\t-\tMIG is on: a model gets one of its slices",
        f"2\t{SLICE}\tA100 MIG 1g.5gb\t1.0/10.0 GiB\t?\t?\t?\t-\tslice of GPU 2",
    ]
    print_tables(inventory)
    out = capsys.readouterr().out
    assert "MIG-f15ae561" in out
    assert f"GPU {SLICE}: slice of GPU 2" in out
    rows = document(inventory, "h", None, [])["gpus"]
    assert [(row["uuid"], row["index"], row["parent"]) for row in rows] == [
        ("GPU-c", 2, None),
        (SLICE, 2, "GPU-c"),
    ]


def test_a_table_that_is_too_wide_is_cut_where_it_hurts_least(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    unit = Owner(OwnerKind.UNIT, f"{'a-long-name-' * 5}.service")
    gpu = replace(
        FULL.gpus[0],
        uuid="GPU-51000000-0000",
        index=10,
        name="NVIDIA H100 80GB HBM3 and then some",
        memory=GpuMemory(round(139.8 * GIB), round(139.7 * GIB), 0),
        power_draw=700.0,
        power_limit=700.0,
        utilization=1.0,
        temperature=101.0,
        processes=(
            *(FULL.gpus[0].processes or ())[:1],
            GpuProcess(4194303, "VLLM::EngineCor", 137 * GIB, 3, owner=unit),
        ),
    )

    print_tables(replace(FULL, gpus=(gpu, replace(FULL.gpus[1], uuid="GPU-51000002-0000"))))

    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "GPU  UUID          NAME                         MEMORY      POWER   UTIL    TEMP",
        "10   GPU-51000000  NVIDIA H100 80GB …  139.7/139.8 GiB  700/700 W  100 %  101 °C",
        "2    GPU-51000002  NVIDIA A100                       ?          ?      ?       ?",
        "GPU 1: cannot open it: the GPU fell off the bus",
        "GPU 2: its holders cannot be read",
        "",
        "GPU      PID  PROCESS             MEMORY  OWNER",
        "10         1  tritonserver      17.0 GiB  换脸-0",
        "10   4194303  VLLM::EngineCor  137.0 GiB  unit a-long-name-a-long-name-a-long-n…",
    ]


def number(kind: str = "number") -> dict[str, Any]:
    return {"type": [kind, "null"]}


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
MAYBE = {"type": ["string", "null"]}


def optional(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


PROCESS = record(
    pid={"type": "integer"},
    name=MAYBE,
    used_memory=number("integer"),
    start_time=number("integer"),
    kinds={"type": "array", "items": {"enum": ["compute", "graphics", "mps"]}},
    owner=optional(
        record(
            kind={"enum": ["managed", "container", "unit", "orphan", "unknown"]},
            ref=MAYBE,
            instance=MAYBE,
        )
    ),
)
SCHEMA = record(
    version={"const": 1},
    host=TEXT,
    source={"enum": ["nvml", "simulated", "none"]},
    driver=MAYBE,
    error=MAYBE,
    warnings={"type": "array", "items": TEXT},
    gpus={
        "type": "array",
        "items": record(
            uuid=TEXT,
            index={"type": "integer"},
            name=TEXT,
            pci_bus_id=MAYBE,
            memory=optional(
                record(
                    total={"type": "integer"},
                    used=number("integer"),
                    free=number("integer"),
                    reserved=number("integer"),
                )
            ),
            power_draw=number(),
            power_limit=number(),
            utilization=number(),
            temperature=number(),
            trouble=MAYBE,
            recovery_action=MAYBE,
            mig=number("boolean"),
            persistence=number("boolean"),
            parent=MAYBE,
            near=optional(
                record(
                    cpus={"type": "array", "items": {"type": "integer"}},
                    nodes={"type": "array", "items": {"type": "integer"}},
                )
            ),
            processes=optional({"type": "array", "items": PROCESS}),
            unlisted={"enum": ["implausible", "untold", None]},
        ),
    },
    unopened={"type": "array", "items": record(index={"type": "integer"}, error=TEXT)},
)


@pytest.mark.parametrize("inventory", [FULL, open_source("simulated", 2).observe()])
def test_the_document_keeps_its_shape(inventory: GpuInventory) -> None:
    jsonschema.validate(document(inventory, "host", None, []), SCHEMA)


def test_the_document_keeps_unknown_apart_from_nothing() -> None:
    found = document(FULL, "gpu-01", None, ["w"])

    assert (found["host"], found["driver"], found["warnings"]) == ("gpu-01", "575.57.08", ["w"])
    assert found["gpus"][0]["processes"][1] == {
        "pid": 2,
        "name": "python",
        "used_memory": None,
        "start_time": 6,
        "kinds": [],
        "owner": {"kind": "container", "ref": A, "instance": None},
    }
    unknown = found["gpus"][1]
    assert (unknown["memory"], unknown["processes"], unknown["power_draw"]) == (None, None, None)
    assert (
        document(open_source("simulated", 1).observe(), "h", None, [])["gpus"][0]["processes"] == []
    )
    assert found["unopened"] == [
        {"index": 1, "error": "cannot open it: the GPU fell off the bus"},
    ]


# --- the command ------------------------------------------------------------------------------


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("MIC_", "DOCKER_"))}
    return bare | {
        "MIC_STATE_DIR": str(tmp_path / "state"),
        "MIC_RUN_DIR": str(tmp_path / "run"),
        "MIC_DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock",
        "MIC_PROCESS_RUNTIME": "subprocess",
        **more,
    }


def gpus(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a process: the driver's library is loaded once in each."""
    return subprocess.run(
        [sys.executable, "-m", "mic_supervisor.cli", "gpus", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def on_a_terminal(env: dict[str, str]) -> list[str]:
    """What the command shows on a terminal of 80 columns, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    env = {k: v for k, v in env.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-m", "mic_supervisor.cli", "gpus"],
        env=env,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ) as child:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:
            pass  # EIO: the other end is closed
        child.wait(30)
    os.close(ours)
    assert child.returncode == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r", "")
    return [line.rstrip() for line in text.splitlines()]


def test_simulated_gpus_as_lines(tmp_path: Path) -> None:
    done = here("gpus", env=environment(tmp_path, MIC_GPU_SOURCE="simulated:2"))

    assert (done.rc, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{n}\tGPU-5100000{n}-0000-4000-8000-00000000000{n}\tSimulated GPU\t?/24.0 GiB\t?\t?\t?"
        "\t-\t-"
        for n in range(2)
    ]


def test_no_source(tmp_path: Path) -> None:
    env = environment(tmp_path, MIC_GPU_SOURCE="none")

    done = here("gpus", env=env)
    assert (done.rc, done.stdout) == (1, "")
    assert done.stderr == "error: cannot read GPUs: MIC_GPU_SOURCE is none\n"

    done = here("gpus", "--json", env=env)
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA)
    assert (done.rc, found["source"], found["error"], found["gpus"]) == (
        1,
        "none",
        "cannot read GPUs: MIC_GPU_SOURCE is none",
        [],
    )


def test_a_driver_that_does_not_answer(tmp_path: Path) -> None:
    mock = MockNvml(tmp_path)
    mock.break_library(9)
    env = environment(tmp_path) | mock.env()

    done = gpus(env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: cannot read GPUs: the NVIDIA kernel module is not loaded; "
        "load it with: modprobe nvidia\n"
    )

    done = gpus(env, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"].startswith("cannot read GPUs: the NVIDIA kernel")


def test_a_machine_whose_driver_counts_no_gpus(tmp_path: Path) -> None:
    done = gpus(environment(tmp_path) | MockNvml(tmp_path).env())

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "the driver counts no GPUs\n")


def test_a_wrong_setting(tmp_path: Path) -> None:
    done = here("gpus", env=environment(tmp_path, MIC_GPU_SOURCE="nvlm"))

    assert done.rc == 1
    assert "MIC_GPU_SOURCE" in done.stderr


@pytest.fixture
def held(tmp_path: Path) -> MockNvml:
    """GPU 0 is free, 1 is held by this very process, 2 cannot be opened, 3 has unknown holders."""
    mock = MockNvml(tmp_path)
    no_list = {"nvmlDeviceGetComputeRunningProcesses_v3": 999}
    mock.set(
        [
            MockGpu(name="NVIDIA A100-SXM4-80GB", memory_total=80 * GIB),
            MockGpu(memory_used=7 * GIB, processes=[MockProcess(os.getpid(), 6 * GIB)]),
            MockGpu(open_error=15),
            MockGpu(power_draw=None, rules=Rules(errors=no_list)),
        ]
    )
    return mock


def test_json_through_the_driver(tmp_path: Path, held: MockNvml) -> None:
    done = gpus(environment(tmp_path) | held.env(), "--json")

    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA)
    assert done.returncode == 0
    assert [gpu["uuid"] for gpu in found["gpus"]] == [mock_uuid(n) for n in (0, 1, 3)]
    (holder,) = found["gpus"][1]["processes"]
    assert (holder["pid"], holder["used_memory"], holder["kinds"]) == (
        os.getpid(),
        6 * GIB,
        ["compute"],
    )
    assert holder["owner"]["kind"] in ("container", "unit", "orphan")
    assert found["gpus"][2]["processes"] is None
    assert [gpu["index"] for gpu in found["unopened"]] == [2]
    # There is no engine, so which containers are ours is not known, and that is said.
    assert [w.split(": ")[0] for w in found["warnings"]] == [
        "cannot find out which holders are ours"
    ]


def test_the_tables_fit_eighty_columns(tmp_path: Path, held: MockNvml) -> None:
    shown = on_a_terminal(environment(tmp_path) | held.env())

    assert shown[:8] == [
        "GPU  UUID          NAME                         MEMORY     POWER  UTIL   TEMP",
        "0    GPU-a0000000  NVIDIA A100-SXM4-80GB  0.0/80.0 GiB  71/400 W   0 %  36 °C",
        "1    GPU-a0000001  Mock A100              7.0/40.0 GiB  71/400 W   0 %  36 °C",
        "3    GPU-a0000003  Mock A100              0.0/40.0 GiB   ?/400 W   0 %  36 °C",
        "GPU 2: cannot open it: the GPU fell off the bus; find the cause with: dmesg |",
        "grep -i xid, then reboot",
        "GPU 3: its holders cannot be read",
        "",
    ]
    assert shown[8].split() == ["GPU", "PID", "PROCESS", "MEMORY", "OWNER"]
    assert shown[9].split()[:2] == ["1", str(os.getpid())]
    assert "6.0 GiB" in shown[9]
    assert len(shown) == 10
    assert all(len(line) <= 80 for line in shown)
