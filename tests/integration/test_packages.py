"""The Debian package on machines that systemd runs: installed, upgraded, removed, purged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import docker
import pytest

from tests.setup import debs
from tests.support import scopes, systemd, wheel
from tests.support.systemd import NO_ENGINE, SystemdMachine
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

UNIT = "/usr/lib/systemd/system/mic.service"
STATE = "/var/lib/mic"
GPUS = """\
version: 1
models:
  web:
    backend: process
    command: [/usr/bin/python3, -m, http.server, --bind, 127.0.0.1, "${port}"]
    probe: {http: /, period: 500ms}
  idle: {backend: process, command: [/bin/sleep, infinity]}
gpus: {0: web, 1: idle}
"""


@dataclass
class Packaged:
    """A machine, and what dpkg said last."""

    machine: SystemdMachine
    image: str
    python: str
    said: str = ""

    def dpkg(self, *words: str) -> str:
        done = self.machine.exec("dpkg", "--force-unsafe-io", *words, timeout=120)
        self.said = done.stdout + done.stderr
        return self.said

    def install(self, version: str) -> str:
        package = debs.build(wheel.build(), self.python, version)
        self.machine.write("/root/mic.deb", package.read_bytes())
        return self.dpkg("--install", "/root/mic.deb")

    def pids(self) -> dict[str, str]:
        """Of the instances that run, by unit."""
        listed = self.machine.exec(
            *("systemctl", "list-units", "--plain", "--no-legend", "--state=running"),
            "mic-default-*",
        ).stdout
        units = [line.split()[0] for line in listed.splitlines()]
        return {unit: self.machine.show(unit, "MainPID") for unit in sorted(units)}

    def reloads(self) -> int:
        """How often systemd read all units again since the machine is up."""
        self.machine.exec("journalctl", "--sync")
        said = self.machine.exec("journalctl", "--quiet", "--output=cat", "_PID=1").stdout
        return len(re.findall(r"^Reloading(?: finished|\.)", said, re.MULTILINE))


@pytest.fixture(scope="module")
def packaged(debian: tuple[str, str], engine: docker.APIClient) -> Iterator[Packaged]:
    image, python = debian
    with systemd.machine(engine, scopes.new_scope(), image=image) as machine:
        machine.boot()
        yield Packaged(machine, image, python)


def test_it_is_installed_without_docker_and_gpus_and_says_what_is_missing(
    packaged: Packaged,
) -> None:
    machine = packaged.machine
    said = packaged.install("0.1.0")
    assert re.search(r"^fail  docker: .* there is no Docker socket", said, re.MULTILINE), said
    assert "write a first one with: mic-supervisor init" in said
    assert "group mic" not in said  # it was made
    assert machine.sh("getent group mic").stdout.startswith("mic:")
    assert machine.sh("mic-supervisor --version").stdout == "mic-supervisor, version 0.1.0\n"
    assert machine.show("mic.service", "UnitFileState") == "disabled"
    done = machine.exec("systemd-analyze", "verify", UNIT)
    assert (done.stdout, done.stderr) == ("", "")
    # Without numpy, and it reads Triton's configurations.
    inside = "/usr/lib/mic-supervisor/bin/python3"
    load = "from mic_supervisor.backends.triton import config; print(config._load_messages())"
    assert "model_config_pb2" in machine.exec(inside, "-c", load).stdout
    assert machine.exec(inside, "-c", "import numpy", rc=1).stderr.endswith("'numpy'\n")
    assert (
        machine.sh("cat /usr/share/mic/gpus.schema.json").stdout
        == machine.sh("mic-supervisor schema").stdout
    )
    assert (
        "/etc/mic/mic.env" in machine.sh("cat /var/lib/dpkg/info/mic-supervisor.conffiles").stdout
    )
    size = int(machine.sh("du -sm /usr/lib/mic-supervisor").stdout.split()[0])
    assert size < 80, f"{size} MiB, compiled"


def test_an_upgrade_touches_no_model_and_no_setting_and_reloads_nothing(
    packaged: Packaged,
) -> None:
    machine = packaged.machine
    machine.write("/etc/mic/mic.env", NO_ENGINE)
    machine.write("/etc/mic/gpus.yaml", GPUS)
    machine.exec("systemctl", "enable", "--now", "mic")
    machine.exec("mic-supervisor", "apply")
    before, daemon, reloads = packaged.pids(), machine.show("mic", "MainPID"), packaged.reloads()
    assert len(before) == 2
    packaged.install("0.2.0")
    until(lambda: machine.show("mic", "SubState") == "running", "the new daemon")
    assert machine.show("mic", "MainPID") != daemon
    machine.exec("mic-supervisor", "apply")
    assert packaged.pids() == before
    assert packaged.reloads() == reloads
    assert machine.show("mic", "NeedDaemonReload") == "no"
    assert machine.sh("cat /etc/mic/mic.env").stdout == NO_ENGINE


def test_a_unit_that_changed_is_read_where_that_costs_no_container_its_gpus(
    packaged: Packaged,
) -> None:
    machine, at_risk = packaged.machine, packaged.python == "3.13"
    machine.sh(f"echo '# older' >> {UNIT}; systemctl daemon-reload")
    before, reloads = packaged.pids(), packaged.reloads()
    if at_risk:
        text = "#!/bin/sh\necho 'warn  docker cgroups: takes the GPUs away'\n"
        machine.write("/usr/local/bin/mic-supervisor", text, 0o755)
    said = packaged.install("0.2.0")
    machine.sh("rm -f /usr/local/bin/mic-supervisor")
    assert ("would take the GPUs from containers that run" in said) == at_risk
    assert packaged.reloads() == reloads + (not at_risk)
    assert machine.show("mic", "ActiveState") == "active"
    assert packaged.pids() == before


def test_removing_it_stops_no_model_and_says_what_runs_and_how_to_end_it(
    packaged: Packaged,
) -> None:
    machine = packaged.machine
    before = packaged.pids()
    said = packaged.dpkg("--remove", "mic-supervisor")
    assert "These go on running: idle-51000001, web-51000000\n" in said
    assert "When the program is gone: systemctl stop 'mic-default-*.service'\n" in said
    assert packaged.pids() == before
    assert machine.show("mic", "ActiveState") == "inactive"
    assert machine.sh(f"ls {UNIT} /usr/bin/mic-supervisor /usr/lib/mic-supervisor", rc=2)
    assert machine.sh("cat /etc/mic/mic.env").stdout == NO_ENGINE
    said = packaged.dpkg("--purge", "mic-supervisor")
    assert f"{STATE} stays, since models may be running that use it." in said
    assert packaged.pids() == before


def test_installed_again_it_adopts_them_and_purged_without_them_it_leaves_nothing_of_its_own(
    packaged: Packaged,
) -> None:
    machine = packaged.machine
    before = packaged.pids()
    machine.write("/etc/mic/mic.env", NO_ENGINE)
    packaged.dpkg("--force-confold", "--install", "/root/mic.deb")
    machine.exec("systemctl", "enable", "--now", "mic")
    machine.exec("mic-supervisor", "apply")
    assert packaged.pids() == before
    machine.exec("systemctl", "disable", "--now", "mic")
    machine.exec("mic-supervisor", "down", "--yes")
    said = packaged.dpkg("--purge", "mic-supervisor")
    assert "No instance runs here.\n" in said
    assert "/etc/mic/gpus.yaml is yours, and stays." in said
    assert machine.sh("ls -A /etc/mic").stdout == "gpus.yaml\n"
    left = "ls -d /var/lib/mic /usr/lib/mic-supervisor /usr/share/mic 2>/dev/null"
    assert machine.sh(left, rc=2).stdout == ""
