"""The role `supervisor` with a package: installed, upgraded, and no model restarted."""

from __future__ import annotations

import json
from pathlib import Path

import docker
import pytest

from tests.fleet.controller import Controller, Played
from tests.fleet.machine import VARS, reach
from tests.setup import debs
from tests.setup import fleet as setup
from tests.support import scopes, systemd, wheel
from tests.support.systemd import SystemdMachine
from tests.support.waiting import until

pytestmark = pytest.mark.engine

GPUS = """\
version: 1
models:
  idle: {backend: process, command: [/bin/sleep, infinity]}
gpus: {0: idle}
"""


def test_the_role_installs_the_package_and_upgrades_it_under_running_models(
    controller: Controller, engine: docker.APIClient, systemd_image: str
) -> None:
    with systemd.machine(engine, scopes.new_scope(), image=systemd_image) as machine:
        machine.boot()
        reach(controller, engine, machine)
        for path in setup.sshd().glob("usr/lib/python3/dist-packages/apt*"):
            for file in filter(Path.is_file, [path, *path.rglob("*")]):
                machine.write(f"/{file.relative_to(setup.sshd())}", file.read_bytes())

        def installs(version: str) -> Played:
            package = debs.build(wheel.build(), "3.11", version)
            given = VARS.format(level="info") + f"supervisor_package: {package}\n"
            controller.write("group_vars/all.yaml", given)
            return controller.play("site.yaml")

        installs("0.1.0")
        assert machine.show("mic.service", "ActiveState") == "active"
        machine.write("/etc/mic/gpus.yaml", GPUS)
        machine.exec("mic-supervisor", "apply")
        daemon, model = machine.show("mic", "MainPID"), pid_of(machine)
        assert installs("0.1.0").recap("machine")["changed"] == 0
        assert machine.show("mic", "MainPID") == daemon

        installs("0.2.0")
        shown = machine.sh("dpkg-query --show --showformat='${Version}' mic-supervisor").stdout
        assert shown.startswith("0.2.0-")
        until(lambda: machine.show("mic", "SubState") == "running", "the new daemon")
        assert machine.show("mic", "MainPID") != daemon
        assert machine.exec("mic-supervisor", "plan").stdout == "No changes.\n"
        assert pid_of(machine) == model


def pid_of(machine: SystemdMachine) -> int:
    (row,) = json.loads(machine.exec("mic-supervisor", "status", "--json").stdout)["instances"]
    assert row["phase"] == "unprobed"
    return int(row["pid"])
