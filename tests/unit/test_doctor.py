"""`mic-supervisor doctor`: what each check finds, and that none stands in another's way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.cli.doctor import lines, table
from mic_supervisor.config.settings import Address, PortRange, Settings
from mic_supervisor.doctor import (
    Check,
    Finding,
    engine,
    examine,
    files,
    host,
    ok,
    warn,
)
from mic_supervisor.errors import RuntimeUnavailable
from mic_supervisor.gpu.nvml import GpuModes, read_modes
from mic_supervisor.host.lock import lock_holder, writer
from mic_supervisor.model import Gpu, GpuInventory, Listener, UnopenedGpu
from tests.mock_nvml import MockGpu, MockNvml
from tests.support.mic import Mic


def said(findings: Iterator[Finding] | list[Finding]) -> list[str]:
    return lines([*findings])


# --- the checks as a whole --------------------------------------------------------------------


def test_one_that_hangs_raises_or_refuses_leaves_the_others() -> None:
    release = threading.Event()

    def hangs() -> Iterator[Finding]:
        release.wait(30)
        yield ok("a", "too late")

    def raises() -> Iterator[Finding]:
        yield ok("b", "half of it")
        raise ZeroDivisionError("a defect")

    def refuses() -> Iterator[Finding]:
        raise RuntimeUnavailable("cannot reach it: it is gone", hint="start it")

    began = time.monotonic()
    found = examine(
        [
            Check("a", hangs),
            Check("b", raises),
            Check("c", refuses),
            Check("d", lambda: [ok("d", "well"), warn("d", "ill", "rest")]),
        ],
        bound=0.3,
    )
    assert time.monotonic() - began < 5
    release.set()
    assert lines(found) == [
        "fail  a: cannot be checked: no answer within 0.3 s",
        "fail  b: cannot be checked: ZeroDivisionError: a defect",
        "fail  c: cannot reach it: it is gone; fix: start it",
        "ok    d: well",
        "warn  d: ill; fix: rest",
    ]


def test_a_table_of_eighty_columns() -> None:
    findings = [
        ok("gpus", "4 of them (NVIDIA A100), driver 575.57.08"),
        warn(
            "docker live-restore",
            "is off: every container ends when Docker is restarted or upgraded",
            'set "live-restore": true in /etc/docker/daemon.json, then: systemctl reload docker',
        ),
    ]
    assert table(findings, 80) == [
        "\x1b[32mok  \x1b[0m  gpus                 4 of them (NVIDIA A100), driver 575.57.08",
        "\x1b[33mwarn\x1b[0m  docker live-restore  "
        "is off: every container ends when Docker is restarted",
        "                           or upgraded",
        '                           fix: set "live-restore": true in',
        "                                /etc/docker/daemon.json, then: systemctl reload",
        "                                docker",
    ]


def test_a_table_without_colours() -> None:
    assert table([ok("gpus", "4 of them")], 80, colours=False) == ["ok    gpus  4 of them"]


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
    "cdi_devices": ["nvidia.com/gpu=0", "nvidia.com/gpu=all"],
    "live_restore": True,
}


def docker(**changes: Any) -> list[str]:
    return said(engine.engine(lambda: FACTS | changes, real_gpus=True))


def test_an_engine_in_order() -> None:
    assert docker() == [
        "ok    docker: Engine 28.2.2 (API 1.50) answers at /var/run/docker.sock",
        "ok    docker live-restore: containers outlive a restart of Docker",
        "ok    docker gpus: 2 CDI devices of nvidia.com/gpu",
        "ok    docker cgroups: driver systemd",
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
    monkeypatch.setattr(engine, "_path_of_dockerd", lambda: str(tmp_path))
    assert docker(runtimes=["runc"], cdi_devices=[])[2] == (
        "fail  docker gpus: neither the NVIDIA runtime nor CDI devices are there: no container "
        "gets a GPU; fix: install nvidia-container-toolkit, then: nvidia-ctk runtime configure "
        "--runtime=docker and systemctl restart docker"
    )
    hook = tmp_path / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    assert docker(runtimes=None, cdi_devices=[])[2].startswith("ok    docker gpus: nvidia-cont")
    assert len(said(engine.engine(lambda: FACTS, real_gpus=False))) == 2


# --- GPUs -------------------------------------------------------------------------------------


def test_gpus() -> None:
    inventory = GpuInventory(
        "nvml",
        gpus=(Gpu("GPU-a", 0, "NVIDIA A100", processes=()), Gpu("GPU-b", 2, "NVIDIA A100")),
        unopened=(UnopenedGpu(1, "cannot open it: it fell off the bus", "reboot"),),
        driver="575.57.08",
    )
    modes = (GpuModes(0, persistence=False, mig=True), GpuModes(2, persistence=True, mig=None))
    assert said(host.gpus(lambda: inventory, lambda: modes)) == [
        "ok    gpus: 2 of them (NVIDIA A100), driver 575.57.08",
        "fail  gpu 1: cannot open it: it fell off the bus; fix: reboot",
        "warn  gpu 2: its holders cannot be read, so nothing is started on it; "
        "fix: check it with: nvidia-smi",
        "warn  persistence mode: is off on GPU 0: each start wakes the driver first, for seconds; "
        "fix: switch it on with: systemctl enable --now nvidia-persistenced",
        "warn  mig: is on for GPU 0: instances get whole GPUs, and utilization is unknown; "
        "fix: switch it off with: nvidia-smi -i 0 -mig 0",
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
    assert said(host.gpus(lambda: inventory, lambda: ())) == [line]


def test_modes_come_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mock = MockNvml(tmp_path)
    mock.load(monkeypatch.setenv)
    mock.set(
        [
            MockGpu(persistence_mode=0, mig_mode=(1, 1)),
            MockGpu(persistence_mode=None, mig_mode=None),
            MockGpu(open_error=15),
        ]
    )
    assert read_modes() == (
        GpuModes(0, persistence=False, mig=True),
        GpuModes(1, persistence=None, mig=None),
    )
    mock.break_library(999)
    assert read_modes() == ()


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
                "fail  mic.service: has failed (exit-code); fix: see why: journalctl -u mic -e",
                "warn  mic.service: is disabled: it does not come back after a boot; "
                "fix: enable it with: systemctl enable mic",
            ],
        ),
        (
            "LoadState=loaded\\nActiveState=inactive\\nUnitFileState=enabled\\n",
            ["warn  mic.service: is inactive; fix: start it with: systemctl start mic"],
        ),
        (
            "LoadState=not-found\\nActiveState=inactive\\n",
            [
                "warn  mic.service: is not installed; "
                "fix: copy systemd/mic.service to /etc/systemd/system"
            ],
        ),
    ],
)
def test_the_unit(tmp_path: Path, unit: str, expected: list[str]) -> None:
    program = fake_systemctl(tmp_path, unit, "TasksCurrent=12")
    assert said(host.systemd(tmp_path, program)) == [
        "ok    systemd: systemd 252 (252.39-1~deb12u1)",
        *expected,
        "ok    mic.slice: 12 tasks in it",
    ]


def test_without_systemd(tmp_path: Path) -> None:
    (line,) = said(host.systemd(tmp_path / "no"))
    assert line.startswith("warn  systemd: is not PID 1: ")


def test_the_daemon_and_its_lock(tmp_path: Path) -> None:
    path, lock = tmp_path / "mic.sock", tmp_path / "x.lock"
    assert said(host.daemon(lambda: None, path, lock)) == [
        f"warn  daemon: none listens at {path}; fix: start it with: systemctl start mic"
    ]
    with writer(lock, "mic-supervisor run", 1.0):
        (line,) = said(host.daemon(lambda: None, path, lock))
        assert line.startswith(
            f"warn  daemon: does not listen at {path}, and PID {os.getpid()} (mic-supervisor run, "
        )
        status = {"config": {"path": "/etc/mic/gpus.yaml", "last_reload_ok": False}}
        found = said(host.daemon(lambda: status, path, lock))
        assert found[0].startswith(f"ok    daemon: answers at {path}; the lock is held by PID ")
        assert found[1] == (
            "warn  daemon: rejected /etc/mic/gpus.yaml as it is now; what was good before keeps "
            "running; fix: see why: mic-supervisor check"
        )


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


# --- files ------------------------------------------------------------------------------------


def test_directories(tmp_path: Path) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    settings = Settings(state_dir=state, run_dir=run)
    found = said(files.directories(settings))
    assert all("it is made with the first start" in line for line in found)
    state.mkdir(mode=0o700)
    run.mkdir()
    run.chmod(0o777)
    found = said(files.directories(settings))
    assert found[0].startswith(("ok    state: ", "warn  state: "))
    assert found[1] == (f"warn  run: {run} is open to others (mode 777); fix: chmod go-w {run}")
    state.chmod(0o755)
    assert said(files.directories(settings))[0] == (
        f"warn  state: {state} is open to others (mode 755); fix: chmod 700 {state}"
    )
    state.rmdir()
    state.write_text("")
    assert said(files.directories(settings))[0] == (
        f"fail  state: cannot write to {state}; fix: run as root, or point MIC_STATE_DIR to a "
        "directory you may write to"
    )


# --- the command ------------------------------------------------------------------------------


def tree(home: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(home.rglob("*"))
    }


def test_it_finds_what_is_wrong_with_a_configuration_and_changes_nothing(
    mic: Mic, tmp_path: Path
) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    secrets = tmp_path / "whisper.env"
    secrets.write_text("TOKEN=s3cret\n")
    secrets.chmod(0o644)
    mic.write(
        f"""
        version: 1
        models:
          good: {{backend: process, command: [/bin/sleep, "9"], env_file: {secrets}}}
          bad: {{backend: process, command: [/bin/sleep, "9"], env_file: /no/such.env}}
        gpus: {{0: good, 1: bad}}
        """
    )
    mic.state_dir.chmod(0o700)
    before = tree(mic.home)
    done = mic("doctor", rc=1)
    assert tree(mic.home) == before
    assert done.stderr == ""
    assert "s3cret" not in done.stdout
    found = done.stdout.splitlines()
    assert f"ok    settings: scope {mic.scope}" in found
    assert f"ok    config: {mic.config} is valid: 2 GPUs; 2 models" in found
    assert (
        "fail  models: bad on GPU 1: cannot configure bad: its env_file /no/such.env cannot be "
        "read: No such file or directory; fix: create /no/such.env, or name another file"
    ) in found
    assert (
        f"warn  models: {secrets} may be read by others than its owner; fix: chmod 600 {secrets}"
    ) in found
    assert "ok    models: 1 instance can be configured" in found
    assert "ok    gpus: 4 simulated by MIC_GPU_SOURCE" in found

    secrets.chmod(0o600)
    mic.write("{version: 1, models: {g: {backend: process, command: [/bin/true]}}, gpus: {0: g}}")
    document = mic("doctor", "--json", rc=0).json()
    assert document["version"] == 1
    assert document["ok"] is True
    assert {"level", "subject", "text", "mend"} == set(document["findings"][0])
    assert {item["level"] for item in document["findings"]} == {"ok", "warn"}


def test_an_invalid_file_and_none_at_all(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    found = mic("doctor", rc=1).stdout.splitlines()
    assert (
        f"fail  config: {mic.config} does not exist; "
        "fix: write a first one with: mic-supervisor init"
    ) in found
    mic.write("{version: 1, gpus: {0: nothing}}")
    found = mic("doctor", rc=1).stdout.splitlines()
    (line,) = [line for line in found if "  config: " in line]
    assert line.endswith("; fix: see all of its errors: mic-supervisor check")


def test_settings_that_cannot_be_read(mic: Mic) -> None:
    mic.env["MIC_RESYNC"] = "soon"
    done = mic("doctor", rc=1)
    assert done.stdout.startswith("fail  settings: cannot read the settings: environment: MIC_RES")


def test_an_engine_that_is_away_is_said_once(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "unix:///no/such.sock"
    mic.write("{version: 1, models: {g: {backend: container, image: x}}, gpus: {0: g}}")
    found = mic("doctor", rc=1).stdout.splitlines()
    (line,) = [line for line in found if "/no/such.sock" in line]
    assert line.startswith("fail  docker: cannot ask for the engine's version: ")


@pytest.mark.engine
def test_images_of_the_file(mic: Mic, busybox_image: str) -> None:
    mic.write(
        f"""
        version: 1
        models:
          a: {{backend: container, image: "{busybox_image}"}}
          b: {{backend: container, image: "mic-test/nowhere:1"}}
        gpus: {{0: a, 1: b}}
        """
    )
    found = mic("doctor", rc=0).stdout.splitlines()
    assert [line for line in found if "  images: " in line] == [
        f"ok    images: {busybox_image} is here",
        "warn  images: mic-test/nowhere:1 is not here: the next start pulls it first; "
        "fix: pull it now with: docker pull mic-test/nowhere:1",
    ]


@pytest.mark.slow
def test_beside_a_running_daemon(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.write(
        "{version: 1, models: {g: {backend: process, command: [/bin/sleep, '9']}}, gpus: {0: g}}"
    )
    daemon = mic.run()
    found = mic("doctor", rc=0).stdout.splitlines()
    assert f"ok    http: the daemon answers at {mic.listen}" in found
    (line,) = [line for line in found if "  daemon: " in line]
    assert line.startswith(
        f"ok    daemon: answers at {mic.socket}; the lock is held by PID {daemon.pid} "
        "(mic-supervisor run, by "
    )
    mic.write("{version: 2}")
    from tests.support.waiting import until

    rejected = f"warn  daemon: rejected {mic.config} as it is now; what was good before keeps "
    until(lambda: rejected in mic("doctor", rc=1).stdout, "the rejection")
    assert daemon.stop() == 0
