"""A machine that systemd runs, as a host of Ansible's."""

from __future__ import annotations

from pathlib import Path

import docker

from tests.fleet.controller import Controller
from tests.setup import fleet as setup
from tests.support.systemd import SystemdMachine

VARS = """\
supervisor_settings:
  MIC_GPU_SOURCE: simulated:2
  MIC_DOCKER_HOST: none
  MIC_LOG_LEVEL: "{level}"
supervisor_unit: |
  [Service]
  IPAddressAllow=10.20.0.0/16
"""
SITE = """\
- hosts: all
  gather_facts: false
  roles: [mic.supervisor.supervisor]
"""
SSHD = """\
HostKey /root/host_key
AuthorizedKeysFile /root/key.pub
StrictModes no
PidFile none
"""


def reach(controller: Controller, engine: docker.APIClient, machine: SystemdMachine) -> None:
    """Have the controller know the machine, and the machine let it in."""
    start_sshd(machine, controller.home / "key")
    looked = engine.inspect_container(machine.id)
    address = looked["NetworkSettings"]["Networks"]["bridge"]["IPAddress"]
    controller.write("hosts.yaml", f"all: {{hosts: {{machine: {{ansible_host: {address}}}}}}}\n")


def start_sshd(machine: SystemdMachine, key: Path) -> None:
    """In the machine's own network namespace, unpacked: nothing of it is installed."""
    for name in ("usr/sbin/sshd", *_libraries()):
        machine.write(f"/opt/sshd/{name}", (setup.sshd() / name).read_bytes(), 0o755)
    machine.write("/root/host_key", key.with_name("host_key").read_bytes(), 0o600)
    machine.write("/root/key.pub", key.with_suffix(".pub").read_bytes(), 0o600)
    machine.write("/root/sshd_config", SSHD)
    machine.sh("useradd --system --home /run/sshd sshd && mkdir -p /run/sshd")
    where = ":".join(sorted({f"/opt/sshd/{Path(name).parent}" for name in _libraries()}))
    machine.sh(
        f"systemd-run --quiet --unit=test-sshd --setenv=LD_LIBRARY_PATH={where} "
        "/opt/sshd/usr/sbin/sshd -D -e -f /root/sshd_config"
    )


def _libraries() -> list[str]:
    found = setup.sshd().rglob("libwrap.so.0")
    return [str(path.relative_to(setup.sshd())) for path in found]
