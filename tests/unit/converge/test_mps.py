"""Whom an MPS server on a GPU serves, by a /proc that is made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mic_supervisor.converge.mps import with_servers
from mic_supervisor.model import (
    ContainerSpec,
    Gpu,
    GpuInventory,
    GpuProcess,
    Instance,
    Mount,
    Owner,
    OwnerKind,
    ProcessSpec,
    Workload,
)

DAEMON, SERVER, CLIENT = 100, 101, 102
OPERATORS = Owner(OwnerKind.UNIT, "nvidia-mps.service")
OURS = Owner(OwnerKind.MANAGED, "mic-x.service", "a-1")
_MPS = "nvidia-cuda-mps"


class Machine:
    """A control daemon that waits in `pipes`, and its server, which is on GPU 0."""

    def __init__(self, root: Path) -> None:
        self.root = root / "proc"
        self.pipes = root / "pipes"
        self.pipes.mkdir()
        self.note(str(DAEMON))
        self.add(DAEMON, parent=1)
        self.add(SERVER, parent=DAEMON, user=1000)

    def note(self, text: str) -> None:
        (self.pipes / "nvidia-cuda-mps-control.pid").write_text(text)

    def add(
        self, pid: int, *, parent: int, name: str = _MPS, user: int = 0, numbers: str = ""
    ) -> None:
        directory = self.root / str(pid)
        directory.mkdir(parents=True, exist_ok=True)
        rest = " ".join(["S", str(parent), *["0"] * 17, "500", *["0"] * 30])
        (directory / "stat").write_text(f"{pid} ({name}) {rest}\n")
        uids = "\t".join([str(user)] * 4)
        status = f"Name:\t{name}\nUid:\t{uids}\nNSpid:\t{numbers or pid}\n"
        (directory / "status").write_text(status)

    def serves(self, workload: Workload, *others: GpuProcess, owner: Owner = OPERATORS) -> bool:
        """Whether the server counts with instance a-1, of this workload, on GPU 0."""
        instance = Instance("a-1", "a", "process", ("GPU-0",), workload)
        row = GpuProcess(SERVER, _MPS, 30 << 20, 500, ("compute",), owner)
        gpu = Gpu("GPU-0", 0, "", processes=(row, *others))
        beside = replace(gpu, uuid="GPU-1", index=1)
        seen = with_servers(GpuInventory("nvml", (gpu, beside)), {"GPU-0": instance})
        assert seen.gpus[1] == beside  # it has no instance
        (found, *rest) = seen.gpus[0].processes or ()
        assert rest == [*others]
        assert found in (row, replace(row, owner=replace(owner, instance="a-1")))
        return found.instance == "a-1"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    return Machine(tmp_path)


def process(pipes: str | Path, **given: Any) -> ProcessSpec:
    return ProcessSpec(("x",), env=(("CUDA_MPS_PIPE_DIRECTORY", str(pipes)),), **given)


def container(pipes: str, *mounts: Mount) -> ContainerSpec:
    return ContainerSpec("x", env=(("CUDA_MPS_PIPE_DIRECTORY", pipes),), mounts=mounts)


def client(owner: Owner, start_time: int | None = 500) -> GpuProcess:
    return GpuProcess(CLIENT, "python", 1 << 30, start_time, ("mps",), owner)


def test_a_server_of_the_daemon_in_our_directory_serves_ours(machine: Machine) -> None:
    assert machine.serves(process(machine.pipes))
    assert machine.serves(process(machine.pipes), client(OURS))
    in_file = (("CUDA_MPS_PIPE_DIRECTORY", str(machine.pipes)),)
    assert machine.serves(ProcessSpec(("x",), file_env=in_file))
    named = str(machine.pipes).replace("pipes", "${env:NAME}")
    assert machine.serves(process(named, variables=(("NAME", "pipes"),)))


def test_the_server_of_another_instance_of_ours_serves_this_one_as_well(machine: Machine) -> None:
    other = Owner(OwnerKind.MANAGED, "mic-y.service", "b-2")
    assert machine.serves(process(machine.pipes), owner=other)


def test_a_daemon_that_is_not_asked_stays_foreign(machine: Machine, tmp_path: Path) -> None:
    assert not machine.serves(process(tmp_path / "another"))
    assert not machine.serves(process("/tmp/mps-${port}"))
    machine.note("77")
    assert not machine.serves(process(machine.pipes))
    machine.note("none")
    assert not machine.serves(process(machine.pipes))


def test_a_server_that_foreign_clients_share_on_the_gpu_stays_foreign(machine: Machine) -> None:
    somebody = Owner(OwnerKind.ORPHAN)
    assert not machine.serves(process(machine.pipes), client(OURS), client(somebody))
    assert machine.serves(process(machine.pipes), client(somebody, start_time=None))  # it is gone


def test_a_container_reaches_the_daemon_through_a_mount(machine: Machine, tmp_path: Path) -> None:
    mount = Mount(str(machine.pipes), "/mps/pipes")
    assert machine.serves(container("/mps/pipes", mount))
    assert machine.serves(container("/mps/pipes", Mount("/nowhere", "/mps"), mount))
    assert machine.serves(container("/mps/pipes", Mount(str(tmp_path), "/mps")))
    assert not machine.serves(container(str(machine.pipes)))
    assert not machine.serves(container("/mps/pipes", Mount("/nowhere", "/mps/pipes")))


def test_a_daemon_in_a_container_notes_its_number_there(machine: Machine) -> None:
    machine.add(DAEMON, parent=1, numbers=f"{DAEMON}\t1")
    machine.note("1")
    assert machine.serves(process(machine.pipes))


def test_a_file_that_anybody_may_write_makes_no_strange_process_ours(machine: Machine) -> None:
    machine.add(DAEMON, parent=1, user=1001)
    assert not machine.serves(process(machine.pipes))
    assert machine.serves(process(machine.pipes, user="1001"))  # a daemon of the model's own user
    machine.add(DAEMON, parent=1, name="systemd")
    assert not machine.serves(process(machine.pipes))
    machine.add(DAEMON, parent=1)
    machine.add(SERVER, parent=DAEMON + 20)
    assert not machine.serves(process(machine.pipes))
