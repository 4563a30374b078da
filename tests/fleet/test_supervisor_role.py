"""The role `supervisor` on a machine that systemd runs: unit, settings, drop-in, doctor."""

from __future__ import annotations

import docker
import pytest

from tests.fleet.controller import Controller
from tests.fleet.machine import VARS, reach
from tests.support.systemd import SystemdMachine

pytestmark = pytest.mark.engine


def test_the_role_starts_the_daemon_and_a_second_run_changes_nothing(
    controller: Controller, engine: docker.APIClient, systemd_machine: SystemdMachine
) -> None:
    machine = systemd_machine
    reach(controller, engine, machine)
    controller.write("group_vars/all.yaml", VARS.format(level="info"))

    controller.play("site.yaml")
    assert machine.show("mic.service", "ActiveState") == "active"
    assert machine.show("mic.service", "UnitFileState") == "enabled"
    assert "10.20.0.0/16" in machine.show("mic.service", "IPAddressAllow")
    first = machine.show("mic.service", "MainPID")

    again = controller.play("site.yaml")
    assert again.recap("machine")["changed"] == 0
    assert machine.show("mic.service", "MainPID") == first

    controller.write("group_vars/all.yaml", VARS.format(level="loud"))
    refused = controller.play("site.yaml", rc=2)
    assert "MIC_LOG_LEVEL" in refused.text
    assert 'MIC_LOG_LEVEL="info"' in machine.sh("cat /etc/mic/mic.env").stdout
    assert machine.show("mic.service", "MainPID") == first

    controller.write("group_vars/all.yaml", VARS.format(level="debug"))
    controller.play("site.yaml")
    assert machine.show("mic.service", "MainPID") != first
    assert 'MIC_LOG_LEVEL="debug"' in machine.sh("cat /etc/mic/mic.env").stdout
