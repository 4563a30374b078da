"""GPUs of the mock NVML and a real engine that accepts requests for GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.integration.docker_world import environ_of
from tests.integration.job_world import World, lines_of, outcome, web, world
from tests.mock_nvml import MockGpu, MockMig, MockNvml, MockProcess, mock_uuid
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("device_requests")]

INSTANCES = [f"a-a000000{number}" for number in range(4)]


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient, busybox_image: str
) -> Iterator[World]:
    home = tmp_path_factory.mktemp("job")
    nvml = MockNvml(home)
    with world(home, engine, nvml=nvml) as made:
        made.nvml = nvml
        yield made


@pytest.fixture
def four(job: World) -> Iterator[World]:
    """`a` on each of four GPUs, ready."""
    nvml = nvml_of(job)
    nvml.set([MockGpu() for _ in range(4)])
    job.models.clear()
    job.write({"0-3": "a"}, a=web())
    job.apply("--rebind")
    assert sorted(job.runs()) == INSTANCES
    return job


def nvml_of(job: World) -> MockNvml:
    assert job.nvml is not None
    return job.nvml


def devices_of(job: World, instance: str) -> list[str]:
    """What the NVIDIA runtime would give the container."""
    name = "NVIDIA_VISIBLE_DEVICES="
    environment = environ_of(job.run_of(instance).pid)
    return [item.removeprefix(name) for item in environment if item.startswith(name)]


def test_each_container_is_given_its_own_gpu(four: World) -> None:
    for number, instance in enumerate(INSTANCES):
        assert devices_of(four, instance) == [mock_uuid(number)]
        (request,) = four.one(instance)["HostConfig"]["DeviceRequests"]
        assert request["DeviceIDs"] == [mock_uuid(number)]
        assert request["Capabilities"] == [["gpu", "compute", "utility"]]
    four.unchanged()


def test_an_instance_over_two_gpus_is_given_both(four: World) -> None:
    four.write({"2,1": "a"})
    four.apply()
    (instance,) = four.runs()
    assert instance == "a-a0000002x2"
    assert devices_of(four, instance) == [f"{mock_uuid(2)},{mock_uuid(1)}"]
    four.unchanged()


def test_each_container_is_given_its_own_slice(four: World) -> None:
    slices = [mock_uuid(8, "MIG"), mock_uuid(9, "MIG")]
    nvml_of(four).set([MockGpu(mig_mode=(1, 1), mig_devices=[MockMig(one) for one in slices])])
    four.write(dict.fromkeys(slices, "a"))
    four.apply()
    assert sorted(four.runs()) == ["a-a0000008", "a-a0000009"]
    for instance, one in zip(("a-a0000008", "a-a0000009"), slices, strict=True):
        assert devices_of(four, instance) == [one]
        (request,) = four.one(instance)["HostConfig"]["DeviceRequests"]
        assert request["DeviceIDs"] == [one]
    four.unchanged()


def test_a_gpu_that_drops_out_moves_nothing_and_blocks_its_own_entry(four: World) -> None:
    before = four.runs()
    nvml = nvml_of(four)
    nvml.set([MockGpu(uuid=mock_uuid(number)) for number in (0, 2, 3)])
    gone = (
        f"! blocked  a-a0000001 on {mock_uuid(1)}: GPU 1 is bound to {mock_uuid(1)}, "
        "which is not there\n"
        "    hint: if the hardware was changed on purpose: mic-supervisor apply --rebind\n"
    )
    renumbered = "".join(
        f"warning: GPU {old} of the file stays with {mock_uuid(old)}, which the driver now calls "
        f"{old - 1}; `apply --rebind` binds the file's numbers anew\n"
        for old in (2, 3)
    )
    assert four.plan() == f"{gone}\n{renumbered}\nNo changes; 1 blocked.\n"
    four.apply(rc=3)
    assert four.runs() == before
    states = [(gpu["uuid"], gpu["index"], gpu["state"]) for gpu in four.status(rc=3)["gpus"]]
    assert states == [
        (mock_uuid(0), 0, "managed"),
        (mock_uuid(2), 1, "managed"),
        (mock_uuid(3), 2, "managed"),
        (mock_uuid(1), None, "lost"),
    ]

    nvml.set([MockGpu(uuid=mock_uuid(number)) for number in range(4)])
    four.unchanged()
    four.apply()
    assert four.runs() == before


def test_rebind_takes_todays_numbers(four: World) -> None:
    before = four.runs()
    nvml_of(four).set([MockGpu(uuid=mock_uuid(number)) for number in (0, 2, 3)])
    four.write({0: "a", 1: "a"})
    four.apply("--rebind")
    assert four.runs() == {name: before[name] for name in ("a-a0000000", "a-a0000002")}
    four.unchanged()


def test_gpus_in_another_order_move_nothing(four: World) -> None:
    before = four.runs()
    nvml_of(four).set([MockGpu(uuid=mock_uuid(number)) for number in (3, 2, 1, 0)])
    done = four.mic("plan", "--detailed-exitcode", rc=0)
    assert done.stdout.endswith("\nNo changes.\n")
    assert len(lines_of(done.stdout, "warning: GPU ")) == 4
    four.apply()
    assert four.runs() == before


def test_a_gpu_that_a_foreign_process_holds_is_not_taken(four: World) -> None:
    four.write({"0-2": "a"})
    four.apply()
    nvml = nvml_of(four)
    nvml.change(3, processes=[MockProcess(os.getpid(), used=3 << 30)])
    four.write({"0-3": "a"})
    me = Path("/proc/self/comm").read_text().strip()
    blocked, summary = lines_of(four.plan(), "! blocked", "No changes")
    assert blocked.startswith(
        f"! blocked  a-a0000003 on GPU 3: GPU 3 is held by PID {os.getpid()} ({me}, 3.0 GiB), "
        "not ours: "
    )
    assert " since " in blocked
    assert summary == "No changes; 1 blocked."
    four.apply(rc=3)
    nvml.change(3, processes=[])
    four.apply()
    assert sorted(four.runs()) == INSTANCES


def test_a_replacement_waits_until_the_driver_has_let_go(four: World) -> None:
    """A process that has ended stays in the driver's list for a while."""
    nvml, old = nvml_of(four), four.run_of("a-a0000000")
    nvml.change(0, processes=[MockProcess(old.pid)])
    four.write({"0-3": "a"}, a=web("env: {STEP: '1'}", "rollout: {max_unavailable: 4}"))
    apply = four.mic.start("apply")
    until(lambda: "waiting for the GPU to be released" in apply.text(), "the wait")
    others = [f"a-a000000{number}: ready" for number in (1, 2, 3)]
    until(lambda: all(one in apply.text() for one in others), "the other GPUs")
    assert f"waiting for the GPU to be released by PID {old.pid}" in apply.text()
    assert "a-a0000000" not in four.runs()
    nvml.change(0, processes=[])
    assert apply.process.wait(60) == 0, apply.text()
    assert sorted(four.runs()) == INSTANCES
    four.unchanged()


def test_a_driver_that_cannot_be_read_freezes_everything(four: World) -> None:
    before = four.runs()
    nvml = nvml_of(four)
    nvml.break_library(18)
    cause = (
        "cannot read GPUs: the NVIDIA driver library and the loaded kernel module differ in "
        "version; load the installed module (stop what uses the GPUs, then rmmod nvidia_uvm nvidia "
        "and modprobe nvidia), or reboot"
    )
    four.write({0: "none", 1: "a"})
    planned = four.plan()
    assert lines_of(planned, "+", "-", "~") == []
    assert f"warning: {cause}; nothing is started or stopped meanwhile\n" in planned
    done = four.mic("apply", rc=1)
    rows = [line.split("  ") for line in outcome(done.stdout).splitlines()[:5]]
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        ("blocked", "a-a0000000", "it stays while none on GPU 0 is blocked"),
        *(("blocked", instance, cause) for instance in (*INSTANCES[1:], "none on GPU 0")),
    ]
    assert four.runs() == before
    nvml.break_library(0)
    four.write({"0-3": "a"})
    four.apply()
    assert four.runs() == before
    four.unchanged()
