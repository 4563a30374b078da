"""What `mic-supervisor doctor` finds of the machine itself."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.cli.doctor import lines
from mic_supervisor.config.settings import Address, PortRange
from mic_supervisor.doctor import (
    Finding,
    host,
)
from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.host import start_daemon
from mic_supervisor.host.lock import lock_holder, writer
from mic_supervisor.model import Gpu, GpuInventory, Listener, UnopenedGpu
from mic_supervisor.plan.memory import Drained, Memory


def said(findings: Iterator[Finding] | list[Finding]) -> list[str]:
    return lines([*findings])


# --- Docker -----------------------------------------------------------------------------------

FACTS: dict[str, Any] = {
    "address": "/var/run/docker.sock",
    "version": "28.2.2",
    "api": "1.50",
    "root": "/var/lib/docker",
    "driver": "overlay2",
    "cgroup_driver": "systemd",
    "cgroup_version": "2",
    "runtimes": ["nvidia", "runc"],
    "default_runtime": "runc",
    "cdi_devices": ["nvidia.com/gpu=0", "nvidia.com/gpu=GPU-a", "nvidia.com/gpu=MIG-b"],
    "live_restore": True,
    "podman": None,
    "rootless": False,
}
NOWHERE = Path("/nonexistent")


def docker(**changes: Any) -> list[str]:
    return said(host.engine(lambda: FACTS | changes, real_gpus=True, toolkit=NOWHERE))


def test_an_engine_in_order() -> None:
    assert docker() == [
        "ok    docker: Engine 28.2.2 (API 1.50) answers at /var/run/docker.sock",
        "ok    docker live-restore: containers outlive a restart of Docker",
        "ok    docker gpus: 2 CDI devices of nvidia.com/gpu, by UUID",
        "ok    docker cgroups: driver systemd",
    ]


def test_devices_that_are_named_by_index_only_are_not_used() -> None:
    found = docker(cdi_devices=["nvidia.com/gpu=0", "nvidia.com/gpu=all"])
    assert found[2:4] == [
        "ok    docker gpus: the NVIDIA runtime is there",
        "warn  docker gpus: 2 CDI devices are named by index only, so they are not used; fix: "
        "nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml",
    ]
    assert found[4].startswith("warn  docker cgroups: `systemctl daemon-reload` takes the GPUs")


def test_podman_ignores_requests_for_gpus() -> None:
    facts = FACTS | {"podman": "Podman 4.3.1", "api": "1.41"}
    assert said(host.engine(lambda: facts, real_gpus=True)) == [
        "ok    docker: Podman 4.3.1 (API 1.41) answers at /var/run/docker.sock",
        "fail  docker gpus: Podman 4.3.1 takes a request for a GPU and ignores it: no model that "
        "needs one is started there; fix: install Docker Engine, and have MIC_DOCKER_HOST name "
        "its socket; the package podman-docker puts Podman at Docker's usual one",
    ]
    assert len(said(host.engine(lambda: facts, real_gpus=False))) == 1


def test_a_rootless_engine_needs_no_control_groups_for_gpus_or_cdi(tmp_path: Path) -> None:
    found = docker(rootless=True, cgroup_driver="none", cdi_devices=[])
    assert found[2] == (
        "warn  docker cgroups: it is rootless and has no control groups: `limits` of memory and "
        "CPUs do nothing; fix: use control groups version 2, and delegate memory and cpu to the "
        "user: https://docs.docker.com/engine/security/rootless/"
    )
    assert found[4] == (
        "warn  docker rootless: the NVIDIA runtime wants control groups, which a rootless engine "
        "may not change: no container with a GPU starts; fix: nvidia-ctk config --set "
        "nvidia-container-cli.no-cgroups --in-place"
    )
    toolkit = tmp_path / "config.toml"
    toolkit.write_text("[nvidia-container-cli]\n  no-cgroups = true\n")
    facts = FACTS | {"rootless": True, "cdi_devices": []}
    assert len(said(host.engine(lambda: facts, real_gpus=True, toolkit=toolkit))) == 3
    assert len(docker(rootless=True)) == 3  # CDI writes into no control group itself


def test_the_socket_of_a_rootless_engine_is_found_where_there_is_no_other(tmp_path: Path) -> None:
    def away() -> Any:
        raise RuntimeUnavailable("cannot ask: there is no Docker socket")

    path = tmp_path / "1000" / "docker.sock"
    path.parent.mkdir()
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))
        found = said(host.engine(away, real_gpus=True, users=tmp_path))
    assert found == [
        "fail  docker: cannot ask: there is no Docker socket",
        f"warn  docker rootless: a rootless engine has its socket at {path}; fix: use it: put "
        f"MIC_DOCKER_HOST=unix://{path} into /etc/mic/mic.env",
    ]


def test_legacy_mode_with_systemds_cgroups_loses_gpus_by_a_daemon_reload() -> None:
    assert docker(cdi_devices=[])[2:] == [
        "ok    docker gpus: the NVIDIA runtime is there",
        "warn  docker cgroups: `systemctl daemon-reload` takes the GPUs from running containers "
        "(legacy mode, cgroup driver systemd); fix: use CDI: nvidia-ctk cdi generate "
        "--output=/etc/cdi/nvidia.yaml, with Engine 25 or later; or set "
        '"exec-opts": ["native.cgroupdriver=cgroupfs"] in /etc/docker/daemon.json',
    ]
    assert docker(cdi_devices=[], cgroup_driver="cgroupfs")[3] == (
        "ok    docker cgroups: driver cgroupfs"
    )


def test_an_engine_without_live_restore_and_with_a_default_that_gives_all_gpus() -> None:
    found = docker(live_restore=False, default_runtime="nvidia")
    assert found[1].startswith("warn  docker live-restore: is off")
    assert found[4].startswith("warn  docker runtime: nvidia is the default runtime")


def test_an_engine_that_cannot_give_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_path_of_dockerd", lambda: str(tmp_path))
    assert docker(runtimes=["runc"], cdi_devices=[])[2] == (
        "fail  docker gpus: Docker has no NVIDIA runtime and no CDI devices: no container "
        "gets a GPU; fix: install nvidia-container-toolkit, then: nvidia-ctk runtime configure "
        "--runtime=docker and systemctl restart docker"
    )
    hook = tmp_path / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    assert docker(runtimes=None, cdi_devices=[])[2].startswith("ok    docker gpus: nvidia-cont")
    assert len(said(host.engine(lambda: FACTS, real_gpus=False))) == 2


# --- GPUs -------------------------------------------------------------------------------------


def test_gpus() -> None:
    inventory = GpuInventory(
        "nvml",
        gpus=(
            Gpu("GPU-a", 0, "NVIDIA A100", processes=(), persistence=False, mig=True),
            Gpu("MIG-a", 0, "NVIDIA A100 MIG 1g.5gb", processes=(), parent="GPU-a"),
            Gpu("MIG-b", 0, "NVIDIA A100 MIG 1g.5gb", processes=(), parent="GPU-a"),
            Gpu("GPU-b", 2, "NVIDIA A100", persistence=True),
            Gpu("GPU-c", 3, "NVIDIA A100", unlisted="untold", mig=True),
        ),
        unopened=(UnopenedGpu(1, "cannot open it: it fell off the bus", "reboot"),),
        driver="575.57.08",
    )
    assert said(host.gpus(lambda: inventory)) == [
        "ok    gpus: 3 of them (NVIDIA A100), driver 575.57.08",
        "fail  gpu 1: cannot open it: it fell off the bus; fix: reboot",
        "warn  gpu 2: its holders cannot be read, so nothing is started on it; "
        "fix: check it with: nvidia-smi",
        "warn  gpu 3: the driver does not say who is on it, so only a model that ignores foreign "
        "processes is started there; fix: set `on_foreign: ignore` for a model that has this GPU "
        "to itself",
        "warn  persistence mode: is off on GPU 0: each start wakes the driver first, for seconds; "
        "fix: switch it on with: systemctl enable --now nvidia-persistenced",
        "ok    mig: is on for GPU 0, with 2 slices; power and utilization of a slice are unknown",
        "warn  mig: is on for GPU 3, which has no slices: no model can have it; fix: make slices "
        "with `nvidia-smi mig`, or switch MIG off with: nvidia-smi -i 3 -mig 0",
    ]


@pytest.mark.parametrize(
    ("inventory", "line"),
    [
        (
            GpuInventory("nvml", error="cannot read GPUs: no driver", hint="load it"),
            "fail  gpus: cannot read GPUs: no driver; fix: load it",
        ),
        (
            GpuInventory("nvml"),
            "fail  gpus: the driver counts none; fix: look for them with: lspci -d 10de:",
        ),
        (
            GpuInventory("none"),
            "warn  gpus: switched off by MIC_GPU_SOURCE=none: every entry is blocked; "
            "fix: unset it",
        ),
        (
            GpuInventory("simulated", gpus=(Gpu("GPU-a", 0, "x"),)),
            "ok    gpus: 1 simulated by MIC_GPU_SOURCE",
        ),
    ],
)
def test_no_gpus(inventory: GpuInventory, line: str) -> None:
    assert said(host.gpus(lambda: inventory)) == [line]


# --- systemd and the daemon -------------------------------------------------------------------


def fake_systemctl(directory: Path, unit: str, slice_: str = "LoadState=loaded") -> str:
    script = directory / "systemctl"
    script.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        f"mic.service) printf '{unit}';;\n"
        f"mic.slice) printf '{slice_}';;\n"
        "*) echo 'systemd 252 (252.39-1~deb12u1)'; echo '+PAM';;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (
            "LoadState=loaded\\nActiveState=active\\nUnitFileState=enabled\\nNRestarts=2\\n",
            ["ok    mic.service: runs, after 2 restarts"],
        ),
        (
            "LoadState=loaded\\nActiveState=failed\\nResult=exit-code\\nUnitFileState=disabled\\n",
            [
                "fail  mic.service: has failed (exit-code): exit status ?; "
                "fix: see more: journalctl -u mic -e",
                "warn  mic.service: is disabled: it does not come back after a boot; "
                "fix: enable it with: systemctl enable mic",
            ],
        ),
        (
            "LoadState=loaded\\nActiveState=failed\\nResult=exit-code\\nExecMainStatus=78\\n"
            "StatusText=cannot run: MIC_SCOPES is no setting\\nUnitFileState=enabled\\n",
            [
                "fail  mic.service: has failed (exit-code): cannot run: MIC_SCOPES is no setting; "
                "fix: see more: journalctl -u mic -e",
            ],
        ),
        (
            "LoadState=loaded\\nActiveState=activating\\nSubState=auto-restart\\nNRestarts=41\\n"
            "ExecMainStatus=1\\nUnitFileState=enabled\\n",
            [
                "fail  mic.service: does not stay up, and was started 41 times again: "
                "exit status 1; fix: see more: journalctl -u mic -e",
            ],
        ),
        (
            "LoadState=loaded\\nActiveState=failed\\nUnitFileState=enabled\\n"
            "ExecStart={ path=/no/mic-supervisor ; argv[]=/no/mic-supervisor run ; }\\n",
            [
                "fail  mic.service: starts /no/mic-supervisor, which is not there; "
                "fix: install it anew: mic-supervisor install",
            ],
        ),
        (
            "LoadState=loaded\\nActiveState=inactive\\nUnitFileState=enabled\\n",
            ["warn  mic.service: is inactive; fix: start it with: systemctl start mic"],
        ),
        (
            "LoadState=not-found\\nActiveState=inactive\\n",
            ["warn  mic.service: is not installed; fix: install it with: mic-supervisor install"],
        ),
    ],
)
def test_the_unit(tmp_path: Path, unit: str, expected: list[str]) -> None:
    program = fake_systemctl(tmp_path, unit, "TasksCurrent=12")
    assert said(host.systemd(tmp_path, program, last_words=0.1)) == [
        "ok    systemd: systemd 252 (252.39-1~deb12u1)",
        *expected,
        "ok    mic.slice: 12 tasks in it",
    ]


def test_without_systemd(tmp_path: Path) -> None:
    (line,) = said(host.systemd(tmp_path / "no"))
    assert line.startswith("warn  systemd: is not PID 1: ")


def test_who_has_no_systemd_is_not_told_to_use_it(tmp_path: Path) -> None:
    assert start_daemon(tmp_path) == "systemctl start mic"
    assert start_daemon(tmp_path / "no") == "mic-supervisor run"


def test_the_daemon_and_its_lock(tmp_path: Path) -> None:
    path, lock = tmp_path / "mic.sock", tmp_path / "x.lock"
    assert said(host.daemon(lambda: None, path, lock)) == [
        f"warn  daemon: none listens at {path}; fix: start it with: {start_daemon()}"
    ]
    with writer(lock, "mic-supervisor run", 1.0):
        (line,) = said(host.daemon(lambda: None, path, lock))
        assert line.startswith(
            f"warn  daemon: does not listen at {path}, and PID {os.getpid()} (mic-supervisor run, "
        )
        status = {
            "config": {"path": "/etc/mic/gpus.yaml", "last_reload_ok": False},
            "warnings": ["cannot write memory.json: No space left on device"],
        }
        found = said(host.daemon(lambda: status, path, lock))
        assert found[0].startswith(f"ok    daemon: answers at {path}; the lock is held by PID ")
        assert found[1] == (
            "warn  daemon: rejected /etc/mic/gpus.yaml as it is now; what was good before keeps "
            "running; fix: see why: mic-supervisor check"
        )
        assert found[2:] == [
            "warn  daemon: it warns: cannot write memory.json: No space left on device"
        ]


def test_a_lock_that_its_holder_left_by_being_killed_is_nobodys(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    with writer(lock, "mic-supervisor run", 1.0):
        left = lock.read_text()
        holder = lock_holder(lock)
        assert holder is not None
        assert (holder.pid, holder.command) == (os.getpid(), "mic-supervisor run")
    lock.write_text(left)
    assert lock_holder(lock) is None
    lock.write_text("{")
    assert lock_holder(lock) is None
    assert lock_holder(tmp_path / "none") is None


# --- ports and clock --------------------------------------------------------------------------


def test_ports(tmp_path: Path) -> None:
    ephemeral, reserved = tmp_path / "e", tmp_path / "r"
    ephemeral.write_text("32768\t60999\n")
    reserved.write_text("\n")

    def found(first: int, last: int, gpus: int = 2, taken: tuple[int, ...] = ()) -> list[str]:
        listeners = tuple(Listener(port) for port in taken)
        return said(
            host.ports(
                PortRange(first, last),
                lambda: listeners,
                gpus,
                ephemeral=ephemeral,
                reserved=reserved,
            )
        )

    assert found(20000, 20999, taken=(20000, 20001, 80)) == [
        "ok    ports: 998 of 1000 free in 20000-20999"
    ]
    assert found(20000, 20009) == [
        "warn  ports: 10 of 10 free in 20000-20009, and 2 GPUs may need 12; "
        "fix: widen MIC_PORT_RANGE"
    ]
    clash = found(32700, 32800)
    assert clash[1] == (
        "warn  ports: the kernel gives ports of 32700-32800 to outgoing connections (32768-60999); "
        "fix: sysctl net.ipv4.ip_local_reserved_ports=32700-32800, or change MIC_PORT_RANGE"
    )
    reserved.write_text("80,32768-32800\n")
    assert len(found(32700, 32800)) == 1
    assert said(host.ports(PortRange(1, 9), lambda: None, 0))[0].startswith("fail  ports: ")


def test_the_port_of_the_daemon(tmp_path: Path) -> None:
    def found(owner: Listener | None, address: str = "127.0.0.1") -> list[str]:
        where = Address(address, 6004)
        return said(host.listen(where, tmp_path / "lock", lambda _port: owner))

    assert found(None) == ["ok    http: 127.0.0.1:6004 is free"]
    assert found(Listener(6004, 7, "nginx")) == [
        "fail  http: PID 7 (nginx) listens at port 6004; fix: change MIC_LISTEN"
    ]
    assert found(None, "0.0.0.0")[1].startswith("warn  http: 0.0.0.0:6004 can be reached")
    with writer(tmp_path / "lock", "mic-supervisor run", 1.0):
        assert found(Listener(6004, os.getpid(), "python")) == [
            "ok    http: the daemon answers at 127.0.0.1:6004"
        ]


def test_the_clock(tmp_path: Path) -> None:
    def found(at: float) -> list[str]:
        return said(host.clock(tmp_path, systemd=False, now=lambda: at))

    now = time.time()
    assert found(now)[0].startswith("ok    clock: 20")
    assert found(1000.0) == ["fail  clock: it says a year before 2025; fix: set it, and enable NTP"]
    (tmp_path / "memory.json").write_text("{}")
    os.utime(tmp_path / "memory.json", (now + 3600, now + 3600))
    (line,) = found(now)
    assert line.startswith(f"warn  clock: it went back: {tmp_path} was written 36")


def test_a_drained_host_is_said_where_no_daemon_warns_of_it() -> None:
    memory = Memory(drained=Drained(since=time.time(), reason="a new riser"))
    (found,) = host.drained(memory, lambda: None)
    assert found.level == "warn" and "(a new riser)" in found.text
    assert found.fix == "end it with: mic-supervisor undrain"
    assert list(host.drained(memory, dict)) == []
    assert list(host.drained(Memory(), lambda: None)) == []
